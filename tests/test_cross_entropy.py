"""What is special to cross_entropy: torch.nn.functional.cross_entropy's options, rows of any width, points."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.cross_entropy import cross_entropy
from tests.conftest import Path
from tests.cross_entropy_cases import drawn, targets, with_gradient
from tests.oracle import assert_near

WIDTHS = [1, 63, 65, 1000, 2048, 2049, 8191]


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_torchs_cross_entropy(path: Path, weighted: bool, smoothing: float) -> None:
    x, t = drawn(6, 9, device=path.device), targets(9, 6, device=path.device)
    weight = drawn(9, device=path.device).abs() if weighted else None
    t[1] = ignored = int(t[3])  # a class like any other: ignored all the same
    for reduction, index in itertools.product(("mean", "sum", "none"), (-100, ignored)):
        options = {"reduction": reduction, "ignore_index": index, "label_smoothing": smoothing}
        ours = with_gradient(cross_entropy, x, t, weight, **options)
        theirs = with_gradient(F.cross_entropy, x, t, weight, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_classes_are_the_last_dim(path: Path) -> None:
    x, t = drawn(2, 3, 4, 5, device=path.device), targets(5, 2, 3, 4, device=path.device)
    ours = with_gradient(cross_entropy, x, t, reduction="none")
    theirs = with_gradient(F.cross_entropy, x.movedim(-1, 1), t, reduction="none")
    torch.testing.assert_close(ours, (theirs[0], theirs[1].movedim(1, -1)))
    torch.testing.assert_close(cross_entropy(x[0, 0, 0], t[0, 0, 0]), F.cross_entropy(x[0, 0, 0], t[0, 0, 0]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_z_loss_and_softcap(path: Path, reduction: str) -> None:
    x, t, cap = drawn(5, 7, device=path.device), targets(7, 5, device=path.device), 2.5
    t[2] = -100

    def expected(x: torch.Tensor) -> torch.Tensor:
        z = cap * torch.tanh(x / cap)
        loss = F.cross_entropy(z, t, reduction="none") + 0.1 * torch.where(t >= 0, torch.logsumexp(z, -1) ** 2, 0)
        return loss if reduction == "none" else loss.sum() / (t >= 0).sum()

    ours = with_gradient(cross_entropy, x, t, reduction=reduction, z_loss=0.1, softcap=cap)
    torch.testing.assert_close(ours, with_gradient(expected, x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_no_larger_than_eagers(kernels: Path, dtype: torch.dtype, n: int) -> None:
    x, t = drawn(2, n, dtype=dtype, device=kernels.device), targets(n, 2, device=kernels.device)
    for options in ({"reduction": "mean"}, {"reduction": "none", "label_smoothing": 0.1}):
        exact = with_gradient(F.cross_entropy, x.double(), t, **options)
        ours = with_gradient(cross_entropy, x, t, **options)
        eager = with_gradient(F.cross_entropy, x, t, **options)
        for got, theirs, want in zip(ours, eager, exact, strict=True):
            one_ulp = torch.finfo(dtype).eps * want.abs().max()
            assert (got - want).abs().max() <= (theirs - want).abs().max() + one_ulp


def test_the_widest_rows(kernels: Path) -> None:
    n = 262144
    x, t = drawn(1, n, dtype=torch.float32, device=kernels.device), targets(n, 1, device=kernels.device)
    exact = with_gradient(F.cross_entropy, x.double(), t, label_smoothing=0.1)
    ours = with_gradient(cross_entropy, x, t, label_smoothing=0.1)
    for got, want in zip(ours, exact, strict=True):
        assert (got - want).abs().max() <= 2e-7 * want.abs().max()


ROWS = {
    "all -inf": lambda x: torch.full_like(x, -float("inf")),
    "all nan": lambda x: torch.full_like(x, float("nan")),
    "equal": lambda x: torch.full_like(x, 7.5),
    "one nan": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) == 3, float("nan"), x),
    "one inf": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) == 3, float("inf"), x),
    "some -inf": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) % 3 == 1, -float("inf"), x),
    "largest": lambda x: torch.where(x > 0, 3e38, -3e38),
    "subnormal": lambda x: x * 1e-44,
}


@pytest.mark.parametrize("n", [70, 5000], ids=["one tile", "two tiles"])
@pytest.mark.parametrize("row", ROWS)
def test_peculiar_rows_are_as_in_eager(path: Path, row: str, n: int) -> None:
    x = ROWS[row](drawn(2, n, dtype=torch.float32, device=path.device))
    t = torch.tensor([0, 1], device=path.device)  # of "some -inf" the second target is
    for options in ({"reduction": "none"}, {"reduction": "none", "ignore_index": 1, "label_smoothing": 0.2}):
        ours, theirs = (with_gradient(f, x, t, **options) for f in (cross_entropy, F.cross_entropy))
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_points_of_peculiar_rows_are_those_of_the_reference(kernels: Path, row: str) -> None:
    """Where a row has no probabilities, no number stands for their gradients."""
    x = ROWS[row](drawn(2, 70, dtype=torch.float32, device=kernels.device))
    t = torch.tensor([0, 1], device=kernels.device)
    found = []
    for backend in ("triton", "reference"):
        kept = ro.Retained(p=ro.Stats("nonfinite", grad=True), logits=ro.Stats("nonfinite", grad=True))
        with ro.backend(backend):
            cross_entropy(x.clone().requires_grad_(), t, reduction="none", retain=kept).sum().backward()
        found.append((kept.p.grad, kept.logits.grad, kept.p.nonfinite, kept.logits.nonfinite))
    torch.testing.assert_close(found[0], found[1], equal_nan=True, rtol=1e-5, atol=1e-6)


def test_exact_where_a_class_has_nearly_all_probability(path: Path) -> None:
    """The log-sum-exp of such a row, rounded, says nothing of the loss: 3000 + 1e-9."""
    x = torch.tensor([[3000.0, 2980.0, 2979.5], [-3000.0, -3019.0, -3018.5]], device=path.device)
    t = torch.tensor([0, 0], device=path.device)
    exact = with_gradient(F.cross_entropy, x.double(), t, reduction="none")
    for got, want in zip(with_gradient(cross_entropy, x, t, reduction="none"), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=6e-8)  # 1 - p is a difference: half an ulp of 1
    smoothed = with_gradient(cross_entropy, x, t, reduction="none", label_smoothing=1.0)
    exact = with_gradient(F.cross_entropy, x.double(), t, reduction="none", label_smoothing=1.0)
    torch.testing.assert_close(smoothed[0].double(), exact[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=["rows", "classes"])
def test_strides_beyond_two_to_the_31st(strides: tuple[int, int]) -> None:
    """Address space, not memory: only what the kernel touches is ever backed by pages."""
    pytest.importorskip("triton")
    from retainops.testing import simulated_gpu

    x = torch.empty(4 * 2**30 + 8, dtype=torch.float16).as_strided((4, 4), strides)
    with torch.no_grad():
        x.copy_(drawn(4, 4))
    t = torch.tensor([0, 1, 2, 3])
    with simulated_gpu(compiles=False, check=False):
        ours = with_gradient(cross_entropy, x, t, reduction="none")
    expected = with_gradient(F.cross_entropy, x.double(), t, reduction="none")
    for got, want in zip(ours, expected, strict=True):
        assert_near(got, want.half(), 1)


# Points.


def test_p_is_what_people_write(path: Path) -> None:
    x, t = drawn(4, 6, device=path.device).requires_grad_(), targets(6, 4, device=path.device)
    kept = ro.Retained("logits", "p")
    cross_entropy(x, t, retain=kept).backward()
    z = x.detach().clone().requires_grad_()
    p = torch.softmax(z, -1)
    p.retain_grad()
    (-torch.log(p.gather(-1, t[:, None]))).mean().backward()
    torch.testing.assert_close(kept.p.grad, p.grad)
    torch.testing.assert_close(kept.logits.grad, z.grad)


def test_p_that_underflows(path: Path) -> None:
    """By the chain rule through p, dlogits would be 0 * inf."""
    x = torch.tensor([[200.0, 0.0, -200.0]], device=path.device, requires_grad=True)
    kept = ro.Retained("p")
    y = cross_entropy(x, torch.tensor([2], device=path.device), retain=kept)
    y.backward()
    assert y.item() == 400.0
    assert x.grad.tolist() == [[1.0, 0.0, -1.0]]
    assert kept.p.grad.tolist() == [[0.0, 0.0, -1 / torch.finfo(torch.float32).tiny]]


@pytest.mark.parametrize("cap", [None, 4.0])
def test_logits_are_what_enters_the_softmax(path: Path, cap: float | None) -> None:
    x, t = drawn(4, 6, dtype=torch.bfloat16, device=path.device).requires_grad_(), targets(6, 4, device=path.device)
    kept = ro.Retained("logits", "p")
    cross_entropy(x, t, softcap=cap, retain=kept).backward()
    assert (kept.logits.dtype, kept.p.dtype) == (torch.bfloat16, torch.float32)
    if cap is None:
        assert torch.equal(kept.logits.grad, x.grad)
    else:
        slope = 1 - torch.tanh(x.detach().float() / cap) ** 2
        torch.testing.assert_close(kept.logits.grad * slope, x.grad.float(), rtol=0.02, atol=1e-3)
