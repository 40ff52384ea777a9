"""What rewritten code calls: methods around an op each, which a module inherits when it is fused.

A method that stands for several modules' calls (a linear layer and an activation) calls them one by one where it must:
where one has hooks, or is another module by now. So whatever happens to a model after it was fused stays right.
A module may inherit several of these, so each says which op it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from retainops.fusing._classes import change_parts, clash, class_before
from retainops.fusing._probe import function_named, recognised
from retainops.fusing.norms import OF_SUM, OfSum
from retainops.fusing.outputs import is_asked
from retainops.nn.gated import Gated
from retainops.nn.point import HoldsPoints
from retainops.ops.attention import ATTENTION
from retainops.ops.gated import GATED, PACKED, UNITS
from retainops.registry import PointInfo, find

Tensor = torch.Tensor

FUNCTION = "_retainops_function"
"""The attribute of an activation module that names its function, set while the module that calls it is fused; of a
module with a method for its activation what `of_method` reads."""

UNIT_OF = {function: unit for unit, function in UNITS.items()}
BIASED = {name: find(f"add_{name}") for name in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")}


def bare(module: Any) -> bool:
    """Whether to call a module is to call the forward of its class: no hook waits for it, nor for its output."""
    if not isinstance(module, nn.Module):
        return True
    return type(module).__call__ is nn.Module.__call__ and not (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
        or is_asked(module)
    )


def function_of(act: Any, **options: str) -> str | None:
    """The name of an activation's function, where it was recognised and nothing waits for its call.

    Args:
        options: what it is called with besides its input: approximate="tanh" of `F.gelu`, or nothing.
    """
    if isinstance(act, MethodType):
        return None if options else of_method(act)
    if options:
        return "gelu_tanh" if function_named(act) == "gelu" else None
    if not isinstance(act, nn.Module):
        return function_named(act)
    name = act.__dict__.get(FUNCTION) if bare(act) else None
    form = act.__dict__.get("approximate")  # torch.nn.GELU's can be set at any time
    return name if form is None or name is None else "gelu" if form == "none" else "gelu_tanh"


def of_method(method: Any) -> str | None:
    """The name of a method's function, where it is the one that was recognised, and reads what it read then."""
    module = method.__self__
    if not isinstance(module, nn.Module) or not isinstance(known := module.__dict__.get(FUNCTION), tuple):
        return None
    function, name, approximate = known
    same = method.__func__ is function and module.__dict__.get("approximate") == approximate
    return name if same else None


def unit_of(act: Any, **options: str) -> str | None:
    """The gated unit of an activation, unless that works in place: the gate is then another tensor after it."""
    return None if getattr(act, "inplace", False) else UNIT_OF.get(function_of(act, **options) or "")


class AddNorm(HoldsPoints):
    """For a module that adds and norms the sum. The points are those of the norm, a module of its own."""

    many = True  # a module may have several: their points are in modules of their own

    def point_infos(self) -> tuple[PointInfo, ...]:
        return ()

    @staticmethod
    def adopt(module: nn.Module, *, NORM: str) -> None:
        norm = getattr(module, NORM)
        part, *more = type(norm).fused_parts
        if part in OF_SUM and not clash(norm, (OF_SUM[part],)):
            change_parts(norm, (OF_SUM[part], *more))

    def fused_add_norm(self, norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        tensors = isinstance(x, torch.Tensor) and isinstance(residual, torch.Tensor)
        if tensors and isinstance(norm, OfSum) and bare(norm) and norm.takes_sum(x, residual):
            return norm.of_sum(x, residual)
        summed = x + residual
        if isinstance(norm, OfSum):
            summed = norm.point("summed", summed, as_view=False)
        return norm(summed), summed


class CallsActivation(HoldsPoints):
    """For a module that calls an activation: it marks it with the name of its function."""

    @staticmethod
    def adopt(module: nn.Module, *, ACT: Any, **_: str) -> None:
        if isinstance(ACT, nn.Module):
            ACT.__dict__[FUNCTION] = recognised(ACT)
        elif isinstance(ACT, MethodType):
            module.__dict__[FUNCTION] = ACT.__func__, recognised(ACT), module.__dict__.get("approximate")


class GatedUnit(CallsActivation, Gated):
    """For a module that computes act(gate) * up, of two tensors or of the halves of one."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        gate, up = (PointInfo(name, name, f"of {name}") for name in ("gate", "up"))
        return gate, up, PointInfo("act", "f(gate), f the activation", "of gate")

    def fused_gated(self, act: Any, gate: Tensor, up: Tensor, **options: str) -> Tensor:
        """act(gate, **options) * up."""
        unit = None if up is None else unit_of(act, **options)  # to the op None is a packed gate, here an error
        gate, up = self.point("gate", gate), self.point("up", up)
        return self.point("act", act(gate, **options)) * up if unit is None else self.call(gate, up, op=GATED[unit])

    def fused_packed(self, act: Any, x: Tensor) -> Tensor:
        """act(gate) * up, gate the first half."""
        unit = unit_of(act)
        if unit is not None:
            return self.call(x, True, op=PACKED[unit])
        return self.fused_gated(act, *x.chunk(2, dim=-1))


class BiasAct(CallsActivation):
    """For a module that applies a linear layer and an activation; its point is c, what comes out of the layer."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo("c", "x @ weight + bias", "of the layer's output"),)

    def fused_bias_act(self, linear: Any, act: Any, x: Tensor, **options: str) -> Tensor:
        """act(linear(x), **options)."""
        op, bias = BIASED.get(function_of(act, **options) or ""), getattr(linear, "bias", None)
        if op is None or bias is None or not has_plain_product(linear) or not bare(linear):
            return act(self.point("c", linear(x), as_view=False), **options)  # which may work in place
        weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT
        y = F.linear(x, weight)
        return self.call(y, bias.to(y.dtype), op=op)  # under autocast y has another dtype


def has_plain_product(linear: Any) -> bool:
    """Whether a layer is torch's Linear or transformers' Conv1D, and not something made of one."""
    cls = class_before(linear)
    return cls is nn.Linear or (cls.__name__, cls.__module__) == ("Conv1D", "transformers.pytorch_utils")


SDPA = F.scaled_dot_product_attention
"""PyTorch's, whatever stands there by now."""


class Sdpa(HoldsPoints):
    """For a module that calls PyTorch's attention function, or one that does; its points are s, p and o."""

    op = ATTENTION

    def fused_sdpa(self, function: Any, *args: Any, **named: Any) -> Tensor:
        """function(*args, **named)."""
        if function is SDPA:
            return self.call(*in_order(*args, **named), op=ATTENTION)
        known = ATTENTIONS.get(function) if isinstance(function, FunctionType) else None
        if known is not None:
            return known(self, *args, **named)
        return self.point("o", function(*args, **named), as_view=False)


ATTENTIONS: dict[Any, Callable[..., Tensor]] = {}
"""From functions of other libraries, which come to PyTorch's, to what an `Sdpa` is to do for a call of one."""


def in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Any, ...]:
    """The arguments of PyTorch's function, as those of the op are."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
