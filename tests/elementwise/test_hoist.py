"""Arithmetic on numbers alone is Python's, whatever path the call takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from tests.conftest import Path

CASES: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "what cancels in float32": (lambda x, beta: x / (1 - beta**3), (0.99999,)),
    "what overflows in float32": (lambda x, s: x * (s * s / s), (1e25,)),
    "an integer beyond float32": (lambda x, n: x * (n - 16777216), (16777217,)),
    "a plan that would divide by zero": (lambda x, n: x * (n / (n - 1)), (3,)),
    "a plan that would be complex": (lambda x, s: (x + s) * (s - 1) ** 0.5, (3.0,)),
    "several": (lambda x, s, t: (x * (s + t) - 1 / s) * (s + t) / t, (0.1, 0.7)),
    "a bound": (lambda x, s, t: torch.clamp(x, s - t, s + t), (0.5, 0.1)),
    "compared": (lambda x, s, t: torch.where(x > s + t, x, 2 * x), (0.1, 0.2)),
    "a number that is compared besides": (lambda x, s, t: torch.where(x > t, x, s * t), (0.5, 0.25)),
    "a condition": (lambda x, s: x * (s > 1) + x * 2, (1 + 1e-9,)),
}


def found(f: Callable, dtype: torch.dtype, device: str, *numbers: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor([0.3, 0.6, -1.0], dtype=dtype, device=device, requires_grad=True)
    y = f(x, *numbers)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("a bound", torch.float16), ("compared", torch.float16)],
    ids=str,
)
def test_arithmetic_on_numbers_alone(kernels: Path, name: str, dtype: torch.dtype) -> None:
    fn, numbers = CASES[name]
    fused, x = ro.fuse_pointwise(fn), torch.ones(3, dtype=dtype, device=kernels.device)
    assert "takes the Triton kernels" in ro.explain(fused, x, *numbers)
    for ours, theirs in zip(*(found(f, dtype, kernels.device, *numbers) for f in (fused, fn)), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=eps)


def test_an_error_of_the_arithmetic_is_pythons(path: Path) -> None:
    f = ro.fuse_pointwise(lambda x, s: x * (1 / s))
    with pytest.raises(ZeroDivisionError):
        f(torch.ones(3, device=path.device), 0.0)


def test_points_beside_numbers(path: Path) -> None:
    @ro.fuse_pointwise
    def f(x, s, t=2.0):
        k = s / (s - 1)
        c = torch.sin(x) * k
        return c * k * t

    x = torch.tensor([0.5, -1.0], device=path.device, requires_grad=True)
    kept = ro.Retained(c=ro.Stats("act_grad", grad=True))
    f(x, 3, retain=kept).sum().backward()
    torch.testing.assert_close(kept.c.grad, torch.full_like(x, 3.0))
    torch.testing.assert_close(kept.c.act_grad, (torch.sin(x) * 4.5).sum().detach())
    torch.testing.assert_close(x.grad, 4.5 * torch.cos(x.detach()))
    with pytest.raises(RuntimeError, match="can't retain_grad on point 'k'"):
        f(x, 3, retain=ro.Retained("k"))
    kept = ro.Retained("k", "c")
    s = torch.tensor(3.0, device=path.device, requires_grad=True)
    f(x, s, retain=kept).sum().backward()
    torch.testing.assert_close(kept.k.grad, (torch.sin(x) * 6).sum().detach())


def test_the_record_of_such_a_call(kernels: Path) -> None:
    f, x = ro.fuse_pointwise(lambda x, n: x * (n / (n - 1))), torch.ones(3, device=kernels.device)
    forward, _, _ = f.op.traffic(x, 3)
    assert forward == 2 * x.numel() * x.element_size()


def test_explain_takes_defaults(kernels: Path) -> None:
    f, x = ro.fuse_pointwise(lambda a, b, s=3, *, t=1.0: a * b * (t / s)), torch.ones(3, device=kernels.device)
    assert "takes the Triton kernels" in ro.explain(f, x, 2.0)
    for given in ((x,), (x,) * 5):
        with pytest.raises(TypeError, match=f"{len(given)} inputs were given; expected a, b, s, t"):
            ro.explain(f, *given)
