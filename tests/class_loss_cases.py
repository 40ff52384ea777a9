"""What the tests of cross_entropy and linear_cross_entropy share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops.cross_entropy import CROSS_ENTROPY
from retainops.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from retainops.registry import Op
from tests.oracle import assert_near, leaves

OPS = {"cross_entropy": CROSS_ENTROPY, "linear_cross_entropy": LINEAR_CROSS_ENTROPY}
TARGET = {"cross_entropy": 1, "linear_cross_entropy": 2}
"""Which of its inputs is the target."""
CLASSES, WIDTH, CHUNK = 67, 5, 4  # blocks of 44 and 23 classes

over_losses = pytest.mark.parametrize("name", OPS)
over_reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


def inputs_of(
    name: str, device: str, dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (2, 3), reduction: str = "none"
) -> list[Any]:
    """Inputs with every option at work, one row ignored. Of linear_cross_entropy the blocks are ragged."""
    g = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    target = torch.randint(0, CLASSES, rows, generator=g)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    weight, options = drawn(CLASSES).abs(), (-100, reduction, 0.1, 1e-2, 8.0)
    if name == "cross_entropy":
        return [(3 * drawn(*rows, CLASSES)).requires_grad_(), target.to(device), weight, *options]
    x, w, bias = (t.requires_grad_() for t in (drawn(*rows, WIDTH), drawn(CLASSES, WIDTH), drawn(CLASSES)))
    return [x, w, target.to(device), bias, weight, *options, CHUNK]


def compare(op: Op, ours: list, theirs: list, kept: ro.Retained, values: dict, scale: float = 4) -> None:
    """All gradients, and all retained ones."""
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, scale)
    for point in kept:
        a, b = kept[point].grad, values[point].grad
        assert a.is_contiguous()
        assert_near(a, b, scale * torch.finfo(ours[0].dtype).eps / torch.finfo(b.dtype).eps)  # p is in float32
