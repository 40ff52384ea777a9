"""Values that a module holds: a number, a learned parameter, or a tensor that moves with it."""

from __future__ import annotations

import numbers

import torch
from torch import nn

Held = float | torch.Tensor


def hold(module: nn.Module, name: str, value: Held) -> None:
    """Set a number or an `nn.Parameter` as an attribute of a module, and any other tensor as a buffer.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
        return
    if not isinstance(value, (numbers.Real, nn.Parameter)):
        kind = type(value).__name__
        raise TypeError(f"{type(module).__name__}: {name} is {kind}; expected a number or a torch.Tensor")
    setattr(module, name, value)


def shown(value: Held) -> str:
    """For `extra_repr`: a number, or a tensor's shape."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else str(value)
