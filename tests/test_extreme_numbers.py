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
        with ro.backend("reference"):  # otherwise the product is float32's on every path
            assert torch.equal(ro.rms_norm(x.float(), w), ro.rms_norm(x.float(), w.float()))
    small = (w * 2**-9).bfloat16()
    y = ro.rms_norm(x, small, offset=1.0, round_first=True)
    assert torch.equal(y, (ro.rms_norm(x, None, round_first=True).float() * (small.float() + 1)).bfloat16())


@pytest.mark.parametrize("below", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_first_block_far_below(path: Path, below: float) -> None:
    """Classes that are masked, and weigh nothing, fill the first block of smoothed losses."""
    n, masked = 4, 24
    x, w, bias = drawn(n, 8), drawn(96, 8, seed=1), torch.zeros(96, dtype=torch.float64)
    bias[:masked] = below
    target = torch.tensor([40, 50, 60, 70])
    weight = torch.ones(96, dtype=torch.float64)
    weight[:masked] = 0.0
    given = {"reduction": "none", "label_smoothing": 0.1}

    def step(call: Callable, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
        leaf = x.to(device, dtype).requires_grad_()
        loss = call(leaf, *(t.to(device, dtype) for t in (w, bias, weight)), target.to(device))
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    def eager(x: Tensor, w: Tensor, bias: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, bias), target, weight, **given)

    def ours(x: Tensor, w: Tensor, bias: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return ro.linear_cross_entropy(x, w, target, bias, weight, chunk=1, **given)  # 24 columns a block

    exact = step(eager, torch.float64, "cpu")
    for found, want in zip(step(ours, torch.float32, path.device), exact, strict=True):
        torch.testing.assert_close(found.double().cpu(), want, rtol=2e-6, atol=2e-6, equal_nan=True)


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
    q, v, do = drawn(1, 2, 24, 32) * size, drawn(1, 2, 48, 32, seed=1), drawn(1, 2, 48, 32, seed=2)
    q = q.repeat(1, 1, 2, 1)  # each key twice: so lse is no score, however large they are

    def relevance(dtype: torch.dtype) -> Tensor:
        k, w, dy = (t.float().to(dtype) for t in (q, v, do))
        p = torch.softmax((k @ k.mT) * 32**-0.5, -1)
        return (p * (dy @ w.mT)).clamp_min(0).mean(1)

    exact, eager = relevance(torch.float64), relevance(torch.float32)
    kept = ro.Retained(p=ro.Relevance("chefer"))
    q, v, do = (t.float().to(path.device) for t in (q, v, do))
    ro.attention(*(t.clone().requires_grad_() for t in (q, q, v)), retain=kept).backward(do)
    assert off(kept.p.chefer, exact) <= max(2 * off(eager, exact), 4 * torch.finfo(torch.float32).eps)
