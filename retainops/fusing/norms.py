"""Norms and softmax as fused modules have them: forwards around an op, which work with the module's own attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from retainops.fusing.op_calls import op_or_own
from retainops.nn.point import HoldsPoints
from retainops.ops.group_norm import GROUP_NORM
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM, eps_of
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX
from retainops.points import unretained
from retainops.registry import Op

Tensor = torch.Tensor


class Norm(HoldsPoints):
    """A norm: its op, and what it calls it with besides x."""

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of(self.op, x)

    def norm_of(self, op: Op, *xs: Tensor) -> Any:
        return self.call(*xs, *self.arguments(xs[-1]), op=op)


class OfSum(Norm):
    """A norm whose module's parent adds, and has it norm the sum: its points are those of the op of a sum."""

    alone: Op

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of(self.alone, x)

    def takes_sum(self, x: Tensor, residual: Tensor) -> bool:
        """Whether these, and their sum, go to the op as they are."""
        return True

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, summed = self.norm_of(self.op, x, residual)
        return y, summed


class TorchNorm(Norm):
    """Autocast on CUDA computes torch.nn's norms in float32, and returns that; they return it contiguous."""

    normalized_shape: tuple[int, ...] = ()
    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        if x.is_nested and x.layout == torch.strided:  # which has no shape
            return self.fused_from.forward(self, x)  # type: ignore[union-attr]
        if self.normalized_shape and x.shape[-1:] != self.normalized_shape:
            F.layer_norm(x, self.normalized_shape)  # the error that PyTorch raises
        return super().forward(as_pytorch_has_it(x, self.channels_last))


def _widened(x: Tensor) -> bool:
    return x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16)


def as_autocast_has_it(x: Tensor) -> Tensor:
    """What autocast makes of the input of PyTorch's norms and softmax."""
    return x.float() if _widened(x) else x


def as_pytorch_has_it(x: Tensor, channels_last: bool = False) -> Tensor:
    """The input of PyTorch's norms as they have it: what they return is contiguous, or `channels_last` if x is.

    An op's output has the strides of its input, and a model's code may take a view of it.
    """
    x = as_autocast_has_it(x)
    if x.is_nested:
        return x
    if channels_last and not x.is_cuda and (format := suggest_memory_format(x)) != torch.contiguous_format:
        return x.contiguous(memory_format=format)
    return x.contiguous()


class LayerNorm(TorchNorm):
    """torch.nn.LayerNorm over one dim."""

    op = LAYER_NORM

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.weight, self.bias, self.eps


class LayerNormOfSum(LayerNorm, OfSum):
    """The same, of a sum."""

    op, alone = ADD_LAYER_NORM, LAYER_NORM

    def takes_sum(self, x: Tensor, residual: Tensor) -> bool:
        return not (_widened(x) or x.is_nested) and x.is_contiguous() and x.shape == residual.shape


class LayerNorm2d(LayerNorm):
    """timm's, over the channels of (batch, channels, height, width); its point has the channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(TorchNorm):
    """torch.nn.GroupNorm."""

    op, channels_last = GROUP_NORM, True

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.num_groups, self.weight, self.bias, self.eps


class TorchRMSNorm(TorchNorm):
    """torch.nn.RMSNorm over one dim."""

    op, channels_last = RMS_NORM, True

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.weight, eps_of(x) if self.eps is None else self.eps, 0.0, False


class RMSNorm(Norm):
    """The RMSNorm of a model's own: computed in float32 and rounded once."""

    op = RMS_NORM
    offset, round_first = 0.0, False

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        return self.arguments_of(self)

    @classmethod
    def arguments_of(cls, module: Any) -> tuple[Any, ...]:
        """With the class's offset: the module may have attributes of these names for something else."""
        return weight_of(module), epsilon(module), cls.offset, cls.round_first

    @classmethod
    def plain(cls, module: Any, x: Tensor) -> Tensor:
        """What it would compute for a module that is not fused."""
        return cls.op.reference(x, *cls.arguments_of(module), unretained)


class LlamaRMSNorm(RMSNorm):
    """LLaMA's and its relatives': rounded before the weight too."""

    round_first = True


class GemmaRMSNorm(RMSNorm):
    """Gemma's: its weight is near 0."""

    offset = 1.0


class UnitOffsetRMSNorm(RMSNorm):
    """One whose weight is near 0, too, and that adds the 1 in the weight's own dtype."""

    @classmethod
    def arguments_of(cls, module: Any) -> tuple[Any, ...]:
        return 1 + weight_of(module), epsilon(module), 0.0, False


class CohereLayerNorm(RMSNorm):
    """Cohere's: around the mean, without a bias."""

    op = LAYER_NORM

    @classmethod
    def arguments_of(cls, module: Any) -> tuple[Any, ...]:
        return weight_of(module), None, epsilon(module)


class T5RMSNorm(LlamaRMSNorm):
    """T5's: it rounds to the weight's dtype, not to x's, and only if that has 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == weight_of(self).dtype:
            return super().forward(x)
        return self.scaled(self.call(x.float(), None, epsilon(self), 0.0, False), weight_of(self))

    @staticmethod
    def scaled(xhat: Tensor, weight: Tensor) -> Tensor:
        return weight * (xhat.to(weight.dtype) if weight.dtype.itemsize == 2 else xhat)

    @classmethod
    def plain(cls, module: Any, x: Tensor) -> Tensor:
        weight = weight_of(module)
        if x.dtype == weight.dtype:
            return super().plain(module, x)
        return cls.scaled(RMS_NORM.reference(x.float(), None, epsilon(module), 0.0, False, unretained), weight)


WEIGHTS = ("weight", "scale", "gamma", "gain", "alpha", "g", "w")
EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
"""The names that norms have for them; the first one that a module has counts."""


def weight_of(module: Any) -> Any:
    """A norm's weight: a number may have another of these names."""
    for name in WEIGHTS:
        if isinstance(weight := getattr(module, name, None), Tensor):
            return weight
    return None


def epsilon(module: Any) -> Any:
    """A norm's eps."""
    for name in EPSILONS:
        if hasattr(module, name):
            return getattr(module, name)
    return None


class WeightlessRMSNorm(RMSNorm):
    """One that has no weight; what it has by such a name is something else."""

    @classmethod
    def arguments_of(cls, module: Any) -> tuple[Any, ...]:
        return None, epsilon(module), 0.0, False


class WeightlessLayerNorm(CohereLayerNorm):
    """The same, around the mean."""

    @classmethod
    def arguments_of(cls, module: Any) -> tuple[Any, ...]:
        return None, None, epsilon(module)


class RMSNormOfSum(RMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class LlamaRMSNormOfSum(LlamaRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class GemmaRMSNormOfSum(GemmaRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class UnitOffsetRMSNormOfSum(UnitOffsetRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class CohereLayerNormOfSum(CohereLayerNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_LAYER_NORM, LAYER_NORM


class WeightlessRMSNormOfSum(WeightlessRMSNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_RMS_NORM, RMS_NORM


class WeightlessLayerNormOfSum(WeightlessLayerNorm, OfSum):
    """As the others, of a sum."""

    op, alone = ADD_LAYER_NORM, LAYER_NORM


OF_SUM: dict[type[HoldsPoints], type[OfSum]] = {
    LayerNorm: LayerNormOfSum,
    RMSNorm: RMSNormOfSum,
    LlamaRMSNorm: LlamaRMSNormOfSum,
    GemmaRMSNorm: GemmaRMSNormOfSum,
    UnitOffsetRMSNorm: UnitOffsetRMSNormOfSum,
    CohereLayerNorm: CohereLayerNormOfSum,
    WeightlessRMSNorm: WeightlessRMSNormOfSum,
    WeightlessLayerNorm: WeightlessLayerNormOfSum,
}
"""From a norm to the same one for a module whose parent adds."""


class Softmax(HoldsPoints):
    """torch.nn.Softmax."""

    op = SOFTMAX
    function = staticmethod(F.softmax)
    dim: int

    def forward(self, x: Tensor) -> Any:
        x = as_autocast_has_it(x)
        if self.dim in (-1, x.dim() - 1):
            return self.call(x, 1.0, None, False)
        if x.is_nested:
            why = f"its input is nested, and dim {self.dim} is not the last one"
            return op_or_own(self, tuple(info.name for info in self.op.points), why, self.function, (x, self.dim), {})
        return self.call(x.movedim(self.dim, -1), 1.0, None, False).movedim(-1, self.dim).contiguous().view(x.shape)


class LogSoftmax(Softmax):
    """torch.nn.LogSoftmax."""

    op = LOG_SOFTMAX
    function = staticmethod(F.log_softmax)
