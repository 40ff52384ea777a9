"""What the tests of softmax and log_softmax share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retainops.ops import _softmax
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX
from retainops.registry import Op
from tests.oracle import all_points, assert_near, clones, eager, leaves, random_like

OPS = [SOFTMAX, LOG_SOFTMAX]
EAGER = {"softmax": torch.softmax, "log_softmax": torch.log_softmax}
over_ops = pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
in_rows_and_chunks = pytest.mark.parametrize("cut", ["whole rows", "chunks"])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()


def boolean(*shape: int, device: str = "cpu", seed: int = 5) -> torch.Tensor:
    """A mask that leaves something of each row, its first element."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask.to(device)


def cut_rows(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of up to a few dozen columns as one tile, or in chunks of 16, as rows are that are wider than registers."""
    if cut == "chunks":
        for name in ("ROWS", "FORWARD_OF_WIDE", "WIDE", "WIDEST"):
            monkeypatch.setattr(_softmax, name, _softmax.ROWS._replace(widest=16, chunk=16))


def compare(op: Op, *ours: Any, scale: float = 1.0, dy: torch.Tensor | None = None) -> None:
    """Output, gradients and retained gradients are eager's."""
    theirs, kept = clones(ours), all_points(op)
    y = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    assert_near(y, want, scale)
    assert y.stride() == want.stride()
    dy = random_like(y) if dy is None else dy
    y.backward(dy)
    want.backward(dy)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 2 * scale)
        a.grad = None
    for name, slot in kept.items():
        assert_near(slot.grad, values[name].grad, 2 * scale)
