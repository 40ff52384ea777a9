"""Who has the gradient where x is at a bound of clamp: what eager PyTorch does up to 2.13, and from 2.14 on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.elementwise import clamp
from tests.conftest import Path

HERE = clamp.TIES_ARE_SHARED
NAN = float("nan")
X = [0.0, 1.0, 1.5, 2.0, 3.0, NAN]
TENSORS: dict[str, Callable] = {
    "low": lambda x, low, high: torch.clamp(x, low) + 0 * high,
    "high": lambda x, low, high: torch.clamp(x, max=high) + 0 * low,
    "both": lambda x, low, high: torch.clamp(x, low, high),
}
NUMBERS: dict[str, Callable] = {
    "low": lambda x: torch.clamp_min(x, 1.0),
    "high": lambda x: torch.clamp_max(x, 2.0),
    "both": lambda x: torch.clamp(x, 1.0, 2.0),
}
# Of X, and of a low bound of 1 and a high one of 2 at each of its places: read off torch 2.13 and 2.15.
TO_X = {
    "low": [[0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6],
    "high": [[1, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 0]],
    "both": [[0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
}
SHARED = {
    "low": [[0, 0.5, 1, 1, 1, 1], [1, 0.5, 0, 0, 0, 1], [0] * 6],
    "high": [[1, 1, 1, 0.5, 0, 1], [0] * 6, [0, 0, 0, 0.5, 1, 1]],
    "both": [[0, 0.5, 1, 0.5, 0, 1], [1, 0.5, 0, 0, 0, 0], [0, 0, 0, 0.5, 1, 0]],
}
LEFT_OUT = {"low": [0, 0, 1, 1, 1, 0], "high": [1, 1, 1, 0, 0, 0], "both": [0, 0, 1, 0, 0, 0]}

either = pytest.mark.parametrize("shared", [False, True], ids=["up to 2.13", "from 2.14"])


def gradients(f: Callable, *columns: list[float], device: str) -> list[list[float]]:
    inputs = [torch.tensor(column, device=device, requires_grad=True) for column in columns]
    dy = torch.ones(len(X), device=device)
    return [grad.tolist() for grad in torch.autograd.grad(f(*inputs), inputs, dy)]


def checks(f: Callable, *columns: list[float], want: list[list[float]], device: str, shared: bool) -> None:
    assert gradients(ro.fuse_pointwise(f), *columns, device=device) == want
    if shared == HERE:
        assert gradients(f, *columns, device=device) == want


@either
@pytest.mark.parametrize("name", TENSORS)
def test_bounds_that_are_tensors(kernels: Path, name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clamp, "TIES_ARE_SHARED", shared)
    want = (SHARED if shared else TO_X)[name]
    checks(TENSORS[name], X, [1.0] * 6, [2.0] * 6, want=want, device=kernels.device, shared=shared)


@either
@pytest.mark.parametrize("name", NUMBERS)
def test_bounds_that_are_numbers(kernels: Path, name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clamp, "TIES_ARE_SHARED", shared)
    want = LEFT_OUT[name] if shared else TO_X[name][0]
    checks(NUMBERS[name], X, want=[want], device=kernels.device, shared=shared)


def test_a_number_that_is_an_argument(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is one the kernels, which would share the tie with it, do not know."""
    monkeypatch.setattr(clamp, "TIES_ARE_SHARED", True)
    f, beside = (ro.fuse_pointwise(g) for g in (lambda x, low: x.clamp(low), lambda x, low: x.clamp(low, 2.0)))
    x = torch.ones(3, device=kernels.device)
    assert "a bound of clamp is a number" in ro.explain(f, x, 1.0)
    assert "takes the Triton kernels" in ro.explain(f, x, x)
    assert "takes the Triton kernels" in ro.explain(beside, x, 1.0)
