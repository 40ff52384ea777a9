"""What modules inherit from when they are fused: forwards, and methods that rewritten code calls, around an op each.

A method that stands for several modules' calls (a linear layer and an activation) calls them one by one where it must:
where one has hooks, or is another module by now. So whatever happens to a model after it was fused stays right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from retainops.fusing._classes import become, restore
from retainops.fusing._probe import FUNCTIONS, recognised
from retainops.nn.gated import Gated
from retainops.nn.point import HoldsPoints, gradients_reach
from retainops.ops.gated import GATED, PACKED, UNITS
from retainops.ops.group_norm import GROUP_NORM
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from retainops.ops.rope import ROPE
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX
from retainops.points import unretained
from retainops.registry import Op, PointInfo, find

Tensor = torch.Tensor

FUNCTION = "_retainops_function"
"""The attribute of an activation module that names its function, set while the module that calls it is fused."""

UNIT_OF = {function: unit for unit, function in UNITS.items()}
BIASED = {name: find(f"add_{name}") for name in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")}


def bare(module: Any) -> bool:
    """Whether to call a module is to call its forward: no hook waits for it."""
    if not isinstance(module, nn.Module):
        return True
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )


def function_of(act: Any) -> str | None:
    """The name of an activation's function, where it was recognised and nothing waits for its call."""
    if isinstance(act, nn.Module):
        return act.__dict__.get(FUNCTION) if bare(act) else None
    return FUNCTIONS.get(act)


class Norm(HoldsPoints):
    """A norm: its op, and what it calls it with besides x."""

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of(self.op, x)

    def norm_of(self, op: Op, *xs: Tensor) -> Any:
        inputs = *xs, *self.arguments(xs[-1])
        # The points are made of the xs alone: where these have no gradient, as in a first layer, nor have they.
        return self.call(*inputs, op=op) if gradients_reach(*xs) else op.call(*inputs)


class OfSum(Norm):
    """A norm whose module's parent adds, and has it norm the sum: its points are those of the op of a sum."""

    alone: Op

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of(self.alone, x)

    def takes_sum(self, x: Tensor) -> bool:
        """Whether x, or a sum of x, goes to the op as it is."""
        return True

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, summed = self.norm_of(self.op, x, residual)
        return y, summed


class TorchNorm(Norm):
    """Autocast on CUDA computes torch.nn's norms in float32, and returns that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_as_autocast_has_it(x))


def _widened(x: Tensor) -> bool:
    return x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16)


def _as_autocast_has_it(x: Tensor) -> Tensor:
    return x.float() if _widened(x) else x


class LayerNorm(TorchNorm):
    """torch.nn.LayerNorm over one dim."""

    op = LAYER_NORM

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.weight, self.bias, self.eps


class LayerNormOfSum(LayerNorm, OfSum):
    """The same, of a sum."""

    op, alone = ADD_LAYER_NORM, LAYER_NORM

    def takes_sum(self, x: Tensor) -> bool:
        return not _widened(x)


class LayerNorm2d(LayerNorm):
    """timm's, over the channels of (batch, channels, height, width); its point has the channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(TorchNorm):
    """torch.nn.GroupNorm."""

    op = GROUP_NORM

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.num_groups, self.weight, self.bias, self.eps


class TorchRMSNorm(TorchNorm):
    """torch.nn.RMSNorm over one dim."""

    op = RMS_NORM

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps, 0.0, False


class RMSNorm(Norm):
    """The RMSNorm of a model's own: computed in float32 and rounded once."""

    op = RMS_NORM
    offset, round_first = 0.0, False

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.weight, epsilon(self), self.offset, self.round_first

    @classmethod
    def plain(cls, module: Any, x: Tensor) -> Tensor:
        """What it would compute for a module that is not fused."""
        return RMS_NORM.reference(x, module.weight, epsilon(module), cls.offset, cls.round_first, unretained)


class LlamaRMSNorm(RMSNorm):
    """LLaMA's and its relatives': rounded before the weight too."""

    round_first = True


class GemmaRMSNorm(RMSNorm):
    """Gemma's: its weight is near 0."""

    offset = 1.0


class T5RMSNorm(LlamaRMSNorm):
    """T5's: it rounds to the weight's dtype, not to x's, and only if that has 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return self.scaled(self.call(x.float(), None, epsilon(self), 0.0, False), self.weight)

    @staticmethod
    def scaled(xhat: Tensor, weight: Tensor) -> Tensor:
        return weight * (xhat.to(weight.dtype) if weight.dtype.itemsize == 2 else xhat)

    @classmethod
    def plain(cls, module: Any, x: Tensor) -> Tensor:
        if x.dtype == module.weight.dtype:
            return super().plain(module, x)
        return cls.scaled(RMS_NORM.reference(x.float(), None, epsilon(module), 0.0, False, unretained), module.weight)


def epsilon(module: Any) -> float:
    """Under the name that this kind of norm has for it."""
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


class RMSNormOfSum(RMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class LlamaRMSNormOfSum(LlamaRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class GemmaRMSNormOfSum(GemmaRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


OF_SUM: dict[type[HoldsPoints], type[OfSum]] = {
    LayerNorm: LayerNormOfSum,
    RMSNorm: RMSNormOfSum,
    LlamaRMSNorm: LlamaRMSNormOfSum,
    GemmaRMSNorm: GemmaRMSNormOfSum,
}
"""From a norm to the same one for a module whose parent adds."""


class AddNorm(HoldsPoints):
    """For a module that adds and norms the sum. The points are those of the norm, a module of its own."""

    many = True  # a module may have several: their points are in modules of their own

    def point_infos(self) -> tuple[PointInfo, ...]:
        return ()

    @staticmethod
    def adopt(module: nn.Module, *, NORM: str, **_: str) -> None:
        norm = getattr(module, NORM)
        part = type(norm).fused_parts[0]
        if part in OF_SUM:
            restore(norm)
            become(norm, (OF_SUM[part],), ())

    def fused_add_norm(self, norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        tensors = isinstance(x, torch.Tensor) and isinstance(residual, torch.Tensor)
        if tensors and isinstance(norm, OfSum) and bare(norm) and norm.takes_sum(x):
            return norm.of_sum(x, residual)
        summed = x + residual
        if isinstance(norm, OfSum):
            summed = norm.point("summed", summed)
        return norm(summed), summed


class CallsActivation(HoldsPoints):
    """For a module that calls an activation: it marks it with the name of its function."""

    @staticmethod
    def adopt(module: nn.Module, *, ACT: str, **_: str) -> None:
        act = getattr(module, ACT)
        if isinstance(act, nn.Module):
            act.__dict__[FUNCTION] = recognised(act)


class GatedUnit(CallsActivation, Gated):
    """For a module that computes act(gate) * up, of two tensors or of the halves of one."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        gate, up = (PointInfo(name, name, f"of {name}") for name in ("gate", "up"))
        return gate, up, PointInfo("act", "f(gate)", "of gate")

    def fused_gated(self, act: Any, gate: Tensor, up: Tensor) -> Tensor:
        """act(gate) * up."""
        unit = UNIT_OF.get(function_of(act) or "")
        gate, up = self.point("gate", gate), self.point("up", up)
        return self.point("act", act(gate)) * up if unit is None else self.call(gate, up, op=GATED[unit])

    def fused_packed(self, act: Any, x: Tensor) -> Tensor:
        """act(gate) * up, gate the first half."""
        unit = UNIT_OF.get(function_of(act) or "")
        if unit is not None:
            return self.call(x, True, op=PACKED[unit])
        return self.fused_gated(act, *x.chunk(2, dim=-1))


class BiasAct(CallsActivation):
    """For a module that applies a linear layer and an activation; its point is c, what comes out of the layer."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo("c", "x @ weight + bias", "of the layer's output"),)

    def fused_bias_act(self, linear: Any, act: Any, x: Tensor) -> Tensor:
        """act(linear(x))."""
        op, bias = BIASED.get(function_of(act) or ""), getattr(linear, "bias", None)
        if op is None or bias is None or not has_plain_product(linear) or not bare(linear):
            return act(self.point("c", linear(x)))
        weight = linear.weight if type(linear) is nn.Linear else linear.weight.mT
        y = F.linear(x, weight)
        return self.call(y, bias.to(y.dtype), op=op)  # under autocast y has another dtype


def has_plain_product(linear: Any) -> bool:
    """Whether a layer is torch's Linear or transformers' Conv1D, and not something made of one."""
    cls = type(linear)
    return cls is nn.Linear or (cls.__name__, cls.__module__) == ("Conv1D", "transformers.pytorch_utils")


class Rotary(HoldsPoints):
    """For an attention module that applies rope by a function; its points are q_rot and k_rot."""

    op = ROPE

    def fused_rope(self, function: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """function(q, k, cos, sin)."""
        if all(t.dtype == q.dtype for t in (k, cos, sin)) and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]:
            q_rot, k_rot = self.call(q, k, cos, sin, False, False)
        else:
            q_rot, k_rot = function(q, k, cos, sin)
            q_rot, k_rot = self.point("q_rot", q_rot), self.point("k_rot", k_rot)
        return q_rot, k_rot


class Softmax(HoldsPoints):
    """torch.nn.Softmax."""

    op = SOFTMAX

    def forward(self, x: Tensor) -> Tensor:
        x = _as_autocast_has_it(x)
        if self.dim in (-1, x.dim() - 1):
            return self.call(x, 1.0, None, False)
        return self.call(x.movedim(self.dim, -1), 1.0, None, False).movedim(-1, self.dim)


class LogSoftmax(Softmax):
    """torch.nn.LogSoftmax."""

    op = LOG_SOFTMAX
