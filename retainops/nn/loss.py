"""Losses against class indices: of logits, and of the outputs of a linear layer that never exist as a whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from retainops.nn.point import HoldsPoints
from retainops.ops._check_classes import check_chunk, check_options
from retainops.ops._cross_entropy import Options
from retainops.ops.cross_entropy import CROSS_ENTROPY
from retainops.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY


class _ClassLoss(HoldsPoints):
    """What both losses have: a weight for each class, and options, which each call reads, as in PyTorch's modules."""

    weight: torch.Tensor | None
    ignore_index: Any

    def __init__(self, weight: torch.Tensor | None, options: Options) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing, self.z_loss, self.softcap = options
        check_options(type(self).__name__, *self._options())

    @property
    def options(self) -> Options:
        """Those of the op, as they are now."""
        return self._options()

    def _options(self) -> Options:
        return Options(self.ignore_index, self.reduction, self.label_smoothing, self.z_loss, self.softcap)

    def extra_repr(self) -> str:
        defaults = Options(-100, "mean", 0.0, 0.0, None)
        pairs = zip(Options._fields, self._options(), defaults, strict=True)
        return ", ".join(f"{name}={value!r}" for name, value, default in pairs if value != default)


class CrossEntropyLoss(_ClassLoss):
    """`ro.cross_entropy` in one kernel each way; its points are logits and p.

    As `torch.nn.CrossEntropyLoss` with class indices, state dict included; but classes are always the last dim.

    Args:
        weight: (V,), a constant weight for each class, or None. It is a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as of `ro.cross_entropy`. They are attributes, and
            may be set later.

    Shapes:
        logits: (..., V); target: (...); the output: (...) for reduction="none", else no dims.

    Raises:
        TypeError, ValueError: an option that `ro.cross_entropy` does not take.

    Example:
        >>> loss = ro.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(logits, target).backward()
    """

    op = CROSS_ENTROPY

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, Options(ignore_index, reduction, label_smoothing, z_loss, softcap))

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.call(logits, target, self.weight, *self._options())


class LinearCrossEntropyLoss(_ClassLoss):
    """A linear layer and the cross entropy of its outputs, which never exist as a whole; its points are x and logits.

    As `torch.nn.LinearCrossEntropyLoss` with class indices, state dict included. To share the weight of an embedding,
    assign it: `loss.linear.weight = embedding.weight`.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the layer has one.
        weight: (V,), a constant weight for each class, or None. It is a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap, chunk: as of `ro.linear_cross_entropy`. They are
            attributes, and may be set later. An ignore_index of None is -100, as PyTorch's module has it.
        device, dtype: of the layer.

    Shapes:
        x: (..., H); target: (...); the output: (...) for reduction="none", else no dims.

    Raises:
        TypeError, ValueError: an option that `ro.linear_cross_entropy` does not take.

    Example:
        >>> loss = ro.nn.LinearCrossEntropyLoss(4096, 128256)
        >>> loss(hidden, target).backward()
    """

    op = LINEAR_CROSS_ENTROPY
    inside = dataclasses.replace(op, points=op.points[1:])  # x is in memory anyway, and may have no gradient

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: torch.Tensor | None = None,
        ignore_index: int | None = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        ignored: Any = ignore_index
        super().__init__(weight, Options(ignored, reduction, label_smoothing, z_loss, softcap))
        check_chunk(type(self).__name__, chunk)
        self.linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.num_classes, self.chunk = num_classes, chunk

    def _options(self) -> Options:
        options: Any = super()._options()
        return Options(-100, *options[1:]) if options[0] is None else options

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        layer = self.linear.weight, target, self.linear.bias, self.weight
        return self.call(self.point("x", x), *layer, *self._options(), self.chunk, op=self.inside)

    def extra_repr(self) -> str:
        return ", ".join([text for text in (super().extra_repr(), self.chunk and f"chunk={self.chunk}") if text])
