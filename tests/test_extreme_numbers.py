"""Numbers at the edges: very large and small ones, large ones that cancel, weights of 0, infinite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from tests.conftest import Path

Tensor = torch.Tensor


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(found: Tensor, exact: Tensor) -> float:
    """The largest error, as a share of the largest element."""
    return float((found.double().cpu() - exact).abs().max() / exact.abs().max())


NORMS: dict[str, tuple[Callable, Callable]] = {
    "rms_norm": (
        lambda x, w, eps: ro.rms_norm(x, w, eps=eps),
        lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps),
    ),
    "layer_norm": (
        lambda x, w, eps: ro.layer_norm(x, w, eps=eps),
        lambda x, w, eps: F.layer_norm(x, x.shape[-1:], w, None, eps),
    ),
    "group_norm": (
        lambda x, w, eps: ro.group_norm(x, 4, w, eps=eps),
        lambda x, w, eps: F.group_norm(x, 4, w, None, eps),
    ),
}


@pytest.mark.parametrize(
    ("size", "eps", "dtype"),
    [
        (1e14, 1e-5, torch.float32),
        (1e16, 1e-5, torch.bfloat16),
        (1e-14, 1e-30, torch.float32),
        (0, 1e-26, torch.float32),
    ],
    ids=["large", "large, bfloat16", "small", "zero"],
)
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_any_size(path: Path, name: str, size: float, eps: float, dtype: torch.dtype) -> None:
    """A derivative of rsqrt has its cube, which overflows, or underflows, long before the gradient does."""
    ours, eager = NORMS[name]
    x, w, dy = (
        (drawn(6, 16, 5) * size).to(dtype),
        drawn(5 if name != "group_norm" else 16, seed=1).to(dtype),
        drawn(6, 16, 5, seed=2),
    )
    exact = x.double().requires_grad_()
    (want,) = torch.autograd.grad(eager(exact, w.double(), eps), exact, dy.to(dtype).double())
    x, w, dy = (t.to(path.device) for t in (x, w, dy))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ours(x, w, eps), x, dy)
    assert off(dx, want) < 4 * torch.finfo(dtype).eps


def test_a_wide_weight_after_rounding(path: Path) -> None:
    """round_first with a weight of float64: the product is float64's. No weight is rounded, nor 1 plus a small one."""
    x, w = drawn(4, 33).bfloat16().to(path.device), drawn(33, seed=1).to(path.device)
    with ro.backend("auto"):
        y = ro.rms_norm(x, w, round_first=True)
        assert torch.equal(y, ro.rms_norm(x, None, round_first=True).double() * w)
    small = (w * 2**-9).bfloat16()
    y = ro.rms_norm(x, small, offset=1.0, round_first=True)
    assert torch.equal(y, (ro.rms_norm(x, None, round_first=True).float() * (small.float() + 1)).bfloat16())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("shift", [0, 1000, 30000])
def test_what_is_large_in_all_logits(path: Path, shift: int, chunk: int | None, weighted: bool) -> None:
    """Smoothed losses are of differences of logits; logits are whole numbers here, which products give exactly."""
    n, classes = 16, 3000
    bias = (drawn(classes) * 3).round() + shift
    x, w = torch.eye(n, 8), (drawn(classes, 8, seed=1) * 4).round()
    target = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(2))
    class_weight = drawn(classes, seed=3).abs().round() if weighted else None
    options = {"reduction": "none", "label_smoothing": 0.5}
    want = F.cross_entropy(F.linear(x.double(), w, bias), target, class_weight, **options)
    x, w, bias = (t.float().to(path.device) for t in (x, w, bias))
    class_weight = None if class_weight is None else class_weight.float().to(path.device)
    loss = ro.linear_cross_entropy(x, w, target.to(path.device), bias, class_weight, chunk=chunk, **options)
    assert off(loss, want) < 1e-6


@pytest.mark.parametrize("first", [0.0, -math.inf])
def test_a_first_block_of_nothing(path: Path, first: float) -> None:
    """Rows of which some blocks, or all, are -inf."""
    bias = drawn(300)
    bias[:200] += first
    rows = torch.stack([bias, torch.full((300,), first)]).double()
    x, w, target = torch.eye(2), rows.t().float(), torch.tensor([250, 3])
    given = {"reduction": "none", "label_smoothing": 0.1}
    want = F.cross_entropy(rows, target, **given)
    bias = torch.zeros(300)
    masked = torch.where(w.isinf(), 0.0, w)
    # 0 * inf is NaN: what is infinite comes by the bias, in rows of their own.
    for i in (0, 1):
        own = torch.where(w[:, i].isinf(), -math.inf, 0.0) + bias
        args = (x[i : i + 1], masked, target[i : i + 1], own)
        loss = ro.linear_cross_entropy(*(t.to(path.device) for t in args), chunk=1, **given)
        torch.testing.assert_close(loss.cpu(), want[i : i + 1].float(), equal_nan=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{"z_loss": 0.01}, {"label_smoothing": 0.1}, {}], ids=str)
def test_a_mean_of_classes_that_weigh_nothing(path: Path, options: dict, compiled: bool, fresh_compiler: None) -> None:
    """0 / 0 of the likelihoods, whatever is added to it."""
    z, target = drawn(3, 4).float().to(path.device), torch.tensor([0, 0, 2], device=path.device)
    weight, eye = torch.tensor([0.0, 1, 0, 1], device=path.device), torch.eye(4, device=path.device)

    def means(z: Tensor) -> list[Tensor]:
        one = ro.cross_entropy(z, target, weight, **options)
        return [one, ro.linear_cross_entropy(z, eye, target, None, weight, **options)]

    found = (torch.compile(means, backend="aot_eager") if compiled else means)(z)
    assert all(loss.isnan() for loss in found)


def test_an_infinite_gradient_of_the_loss(kernels: Path) -> None:
    """What is asked changes no other gradient."""
    for kept in (None, ro.Retained("logits"), ro.Retained("p", logits=ro.Stats("l2"))):
        x = torch.tensor([[0.0, 1.0, 2.0]], device=kernels.device, requires_grad=True)
        loss = ro.cross_entropy(x, torch.tensor([2], device=kernels.device), reduction="none", retain=kept)
        loss.backward(torch.full_like(loss, math.inf))
        assert x.grad.tolist()[0][:2] == [math.inf, math.inf]
        assert x.grad[0, 2].isnan()


@pytest.mark.parametrize("size", [1.0, 8.0, 60.0])
def test_large_scores_of_attention(path: Path, size: float) -> None:
    """In float32 exp(s - lse) is off by as much as lse is rounded by: here lse is up to 40000."""
    q, v, do = drawn(1, 2, 48, 32) * size, drawn(1, 2, 48, 32, seed=1), drawn(1, 2, 48, 32, seed=2)

    def relevance(dtype: torch.dtype) -> Tensor:
        k, w, dy = (t.float().to(dtype) for t in (q, v, do))
        p = torch.softmax((k @ k.mT) * 32**-0.5, -1)
        return (p * (dy @ w.mT)).clamp_min(0).mean(1)

    exact, eager = relevance(torch.float64), relevance(torch.float32)
    kept = ro.Retained(p=ro.Relevance("chefer"))
    q, v, do = (t.float().to(path.device) for t in (q, v, do))
    ro.attention(*(t.clone().requires_grad_() for t in (q, q, v)), retain=kept).backward(do)
    assert off(kept.p.chefer, exact) <= max(2 * off(eager, exact), 4 * torch.finfo(torch.float32).eps)
