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


class CrossEntropyLoss(HoldsPoints):
    """`ro.cross_entropy` in one kernel each way; its points are logits and p.

    As `torch.nn.CrossEntropyLoss` with class indices, state dict included; but classes are always the last dim.

    Args:
        weight: (V,), a constant weight for each class, or None. It is a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as of `ro.cross_entropy`.

    Shapes:
        logits: (..., V); target: (...); the output: (...) for reduction="none", else no dims.

    Raises:
        TypeError, ValueError: an option that `ro.cross_entropy` does not take.

    Example:
        >>> loss = ro.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(logits, target).backward()
    """

    op = CROSS_ENTROPY
    weight: torch.Tensor | None

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
        super().__init__()
        self.register_buffer("weight", weight)
        self.options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
        check_options(type(self).__name__, *self.options)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.call(logits, target, self.weight, *self.options)

    def extra_repr(self) -> str:
        return _shown(self.options)


class LinearCrossEntropyLoss(HoldsPoints):
    """A linear layer and the cross entropy of its outputs, which never exist as a whole; its points are x and logits.

    As `torch.nn.LinearCrossEntropyLoss` with class indices, state dict included. To share the weight of an embedding,
    assign it: `loss.linear.weight = embedding.weight`.

    Args:
        in_features: H.
        num_classes: V.
        bias: whether the layer has one.
        weight: (V,), a constant weight for each class, or None. It is a buffer.
        ignore_index, reduction, label_smoothing, z_loss, softcap, chunk: as of `ro.linear_cross_entropy`.
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
    weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
        self.chunk = chunk
        check_options(type(self).__name__, *self.options)
        check_chunk(type(self).__name__, chunk)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        layer = self.linear.weight, target, self.linear.bias, self.weight
        return self.call(self.point("x", x), *layer, *self.options, self.chunk, op=self.inside)

    def extra_repr(self) -> str:
        return ", ".join([text for text in (_shown(self.options), self.chunk and f"chunk={self.chunk}") if text])


def _shown(options: Options) -> str:
    """The options that are not the defaults."""
    defaults = Options(-100, "mean", 0.0, 0.0, None)
    pairs = zip(Options._fields, options, defaults, strict=True)
    return ", ".join(f"{name}={value!r}" for name, value, default in pairs if value != default)
