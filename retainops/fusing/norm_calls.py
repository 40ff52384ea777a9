"""Norms that a forward calls as functions of PyTorch's, such as `F.layer_norm(x, self.weight.shape, self.weight)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from retainops.fusing._code import called, methods, sites_of
from retainops.fusing._patterns import Pattern
from retainops.fusing.norms import as_autocast_has_it, as_pytorch_has_it
from retainops.fusing.op_calls import ANY_CALL, EXCHANGED, Call, op_or_own
from retainops.nn.point import HoldsPoints
from retainops.ops.group_norm import GROUP_NORM
from retainops.ops.norm import LAYER_NORM, RMS_NORM, eps_of
from retainops.registry import PointInfo

Tensor = torch.Tensor

LAYER, RMS, GROUP = F.layer_norm, F.rms_norm, F.group_norm
"""PyTorch's, whatever stands there by now."""


def is_norm(function: Any) -> bool:
    """Whether it is one of these functions."""
    return any(function is known for known in (LAYER, RMS, GROUP))


def calls_norm(module: nn.Module) -> bool:
    """Whether a method of a module calls one of these functions."""
    functions = dict(methods(type(module)))
    sites = sites_of(type(module), Pattern(ANY_CALL, ANY_CALL))
    return any(is_norm(called(module, functions[site.method], name)) for site in sites for _, name in site.called)


class NormCall(HoldsPoints):
    """For a module that calls a norm of PyTorch's; its point is xhat."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo("xhat", "x, normalised", "of x"),)

    def fused_norm(self, function: Any, *args: Any, **named: Any) -> Any:
        """function(*args, **named)."""
        if not is_norm(function):
            found: Call | str = EXCHANGED
        else:
            in_order = _layer_norm if function is LAYER else _rms_norm if function is RMS else _group_norm
            found = in_order(*args, **named)
        if not isinstance(found, str):
            op, (x, *rest) = found
            found = op, (as_pytorch_has_it(x, op is not LAYER_NORM), *rest)
        return op_or_own(self, ("xhat",), found, function, args, named)


# From the functions' arguments to an op and its inputs, or a string: why PyTorch's function is to be called.


def _layer_norm(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Call | str:
    why = _last_dim(input, normalized_shape, weight, bias) or _no_eps(eps)
    return why or (LAYER_NORM, (input, weight, bias, eps))


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Call | str:
    why = _last_dim(input, normalized_shape, weight)
    if why is None and eps is None:
        eps = eps_of(as_autocast_has_it(input))
    return why or _no_eps(eps) or (RMS_NORM, (input, weight, eps, 0.0, False))


def _group_norm(input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5) -> Call | str:
    why = _no_data(input) or _no_eps(eps)
    if why is None and (input.dim() < 2 or _misfits(input.shape[1:2], weight, bias)):
        why = "its weights do not fit its input"
    return why or (GROUP_NORM, (input, num_groups, weight, bias, eps))


def _no_data(x: Any) -> str | None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or (x.is_nested and x.layout == torch.strided):
        return "its input is not a tensor of floating-point numbers that has a shape"
    return None


def _last_dim(x: Any, shape: Any, *weights: Any) -> str | None:
    if (why := _no_data(x)) is not None:
        return why
    if not isinstance(shape, (tuple, list)) or len(shape) != 1:
        return f"it is over the dims {shape}, and the op takes the last one alone"
    if x.shape[-1:] != tuple(shape) or shape[0] == 0 or _misfits(shape, *weights):
        return "its sizes do not fit its input"
    return None


def _misfits(shape: Sequence[int], *weights: Any) -> bool:
    return any(not isinstance(w, Tensor) or tuple(w.shape) != tuple(shape) for w in weights if w is not None)


def _no_eps(eps: Any) -> str | None:
    return None if isinstance(eps, (int, float)) and eps > 0 else f"its eps is {eps}; the op takes a number above 0"
