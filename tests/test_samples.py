"""per_sample_norms: from statistics of rows to norms of samples."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.conftest import Path


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 2, 4, 8), (3, 8)], ids=str)
def test_norms_of_samples_are_those_of_the_full_gradient(path: Path, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=generator).to(path.device).requires_grad_() for _ in "ab")
    rows, whole = ro.Retained(c=ro.Stats("l2", over="rows")), ro.Retained("c")
    for kept in (rows, whole):
        ro.mul_sin(a, b, retain=kept).square().sum().backward()
    expected = whole.c.grad.flatten(1).norm(dim=1)
    torch.testing.assert_close(ro.per_sample_norms(rows.c), expected)
    torch.testing.assert_close(ro.per_sample_norms(rows), {"c": expected})


def test_points_that_no_gradient_came_to_are_left_out() -> None:
    model = nn.Sequential(ro.nn.LayerNorm(4), nn.Linear(4, 8), ro.nn.LayerNorm(8))
    with ro.retain(model, "*", ro.Stats("l2", over="rows")) as kept:
        model(torch.randn(3, 4)).square().sum().backward()
    assert list(ro.per_sample_norms(kept)) == ["2.xhat"]
    kept.reset()
    with pytest.raises(RuntimeError, match=r"no gradient has come to point '0.xhat'; call backward\(\) first"):
        ro.per_sample_norms(kept)


def test_queries_are_rows() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    kept, rows = (ro.Retained(p=ro.Stats("l2", over=over)) for over in ("queries", "rows"))
    for each in (kept, rows):
        ro.attention(x, x, x, retain=each).square().sum().backward()
    assert torch.equal(ro.per_sample_norms(kept.p), ro.per_sample_norms(rows.p))


def used(kept: ro.Retained, *shape: int, backward: bool = True) -> ro.Retained:
    y = ro.mul_sin(torch.ones(shape, requires_grad=True), 2.0, retain=kept)
    if backward:
        y.sum().backward()
    return kept


@pytest.mark.parametrize(
    ("kept", "error", "words"),
    [
        (torch.ones(3), TypeError, "kept is Tensor; expected a Slot such as kept.c, or a Retained"),
        (used(ro.Retained("c"), 2, 3), ValueError, "'c' was asked for its gradient; expected Stats"),
        (used(ro.Retained(c=ro.Stats("l2")), 2, 3), ValueError, "'c' was asked for Stats(l2); expected Stats"),
        (used(ro.Retained(c=ro.Stats("sum", over="rows")), 2, 3), ValueError, "was asked for Stats(sum, over='rows')"),
        (used(ro.Retained(c=ro.Stats("l2", over="rows")), 2, 3, backward=False), RuntimeError, "call backward() first"),
        (used(ro.Retained(c=ro.Stats("l2", over="rows")), 3), ValueError, "'c' is one row; expected (samples, ..., n)"),
    ],
)
def test_errors(kept: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        ro.per_sample_norms(kept)
