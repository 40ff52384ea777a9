"""What group norm takes."""

from __future__ import annotations

import numbers
from typing import Any

import torch

from retainops.ops._check import is_number, is_stand_in

Tensor = torch.Tensor


def check_group_norm(x: Any, num_groups: Any, weight: Any, bias: Any, eps: Any) -> None:
    """Inputs of group norm, in compiled code too.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: eps is not above 0.
        RuntimeError: x has no channels, num_groups does not divide them, or a weight does not go with them.
    """
    tensors = {"x": x, **{name: t for name, t in (("weight", weight), ("bias", bias)) if t is not None}}
    for name, t in tensors.items():
        if is_stand_in(t):
            return
        if not isinstance(t, Tensor):
            raise TypeError(f"group_norm: {name} is {type(t).__name__}; expected a torch.Tensor")
    if isinstance(num_groups, bool) or not is_number(num_groups, numbers.Integral):
        raise TypeError(f"group_norm: num_groups is {type(num_groups).__name__}; expected an integer, such as 32")
    if not is_number(eps):
        raise TypeError(f"group_norm: eps is {type(eps).__name__}; expected a number, such as 1e-5")
    if isinstance(eps, numbers.Real) and not float(eps) > 0:
        raise ValueError(f"group_norm: eps is {eps}; expected a number above 0, such as 1e-5")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"group_norm: x is {x.dtype}; expected a floating-point dtype: convert it with .to(torch.float32)"
        )
    if x.dim() < 2 or not x.shape[1]:
        raise RuntimeError(f"group_norm: x has shape {tuple(x.shape)}; expected (batch, channels, ...)")
    if isinstance(num_groups, numbers.Integral) and (num_groups < 1 or x.shape[1] % num_groups):
        raise RuntimeError(
            f"group_norm: num_groups is {num_groups}, and x of shape {tuple(x.shape)} has {x.shape[1]} channels; "
            "expected a number that divides them"
        )
    for name, t in tensors.items():
        if name != "x" and t.shape != x.shape[1:2]:
            raise RuntimeError(
                f"group_norm: {name} has shape {tuple(t.shape)}; expected {tuple(x.shape[1:2])}, one for each channel "
                f"of x of shape {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise RuntimeError(
                f"group_norm: {name} is on {t.device} and x on {x.device}; move one of them with .to(device)"
            )
