"""What is special to cross_entropy: torch.nn.functional.cross_entropy's options, targets, rows of any width, points."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.cross_entropy import cross_entropy
from tests.conftest import GPU, Path
from tests.oracle import assert_near
from tests.triton_version import IS_OLDEST

WIDTHS = [1, 63, 65, 1000, 2048, 2049, 8191]


def drawn(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 3.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return (scale * x).to(device, dtype)


def targets(classes: int, *shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(classes)).to(device)


def with_gradient(loss: Any, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """A loss, and the gradient of the first input."""
    x = inputs[0].detach().requires_grad_()
    y = loss(x, *inputs[1:], **options)
    (dx,) = torch.autograd.grad(y, x, torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    return y.detach(), dx


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


# Targets.


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_targets_of_any_integer_dtype(path: Path, dtype: torch.dtype) -> None:
    x, t = drawn(4, 6, device=path.device), targets(6, 4, device=path.device)
    expected = with_gradient(F.cross_entropy, x, t, ignore_index=2)
    torch.testing.assert_close(with_gradient(cross_entropy, x, t.to(dtype), ignore_index=2), expected)


@pytest.mark.parametrize("index", [2**62, -(2**63), 2**24 + 1])
def test_ignore_index_is_any_integer(path: Path, index: int) -> None:
    x, t = drawn(4, 6, device=path.device), targets(6, 4, device=path.device)
    t[1] = index
    expected = with_gradient(F.cross_entropy, x, torch.where(t == index, -100, t))
    torch.testing.assert_close(with_gradient(cross_entropy, x, t, ignore_index=index), expected)


OUT_OF_RANGE = [6, -1, -99, 2**31, 2**40, -(2**62)]


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
def test_targets_out_of_range_are_an_error_on_the_host(wrong: int) -> None:
    x, t = drawn(4, 6), targets(6, 4)
    t[1] = wrong
    with pytest.raises(IndexError, match=rf"cross_entropy: Target {wrong} is out of bounds: 1 of 4 .* 6 classes"):
        cross_entropy(x, t)


@pytest.mark.parametrize("wrong", OUT_OF_RANGE)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "smoothed"])
def test_targets_out_of_range_are_nan_on_a_gpu(kernels: Path, wrong: int, options: dict) -> None:
    """Nobody waits for the GPU to look; and nothing is read out of bounds, which the simulated GPU would report."""
    x, t = drawn(4, 6, device=kernels.device), targets(6, 4, device=kernels.device)
    right = with_gradient(cross_entropy, x, t, reduction="none", **options)
    weight = torch.ones(6, device=kernels.device)
    t[1] = wrong
    for w in (None, weight):
        y, dx = with_gradient(cross_entropy, x, t, w, reduction="none", **options)
        assert y[1].isnan()
        assert dx[1].isnan().all()
        others = torch.tensor([0, 2, 3], device=kernels.device)
        assert torch.equal(y[others], right[0][others])
        assert torch.equal(dx[others], right[1][others])
        assert cross_entropy(x, t, w, **options).isnan()


def test_targets_are_checked_on_a_gpu_where_asked(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = drawn(4, 6, device=kernels.device), targets(6, 4, device=kernels.device)
    t[1] = 9
    monkeypatch.setenv("RETAINOPS_CHECK_TARGETS", "1")
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        cross_entropy(x, t)
    assert cross_entropy(x, t, ignore_index=9).isfinite()


# What it costs.


@pytest.mark.skipif(GPU, reason="counts the launches of the simulated GPU")
def test_one_kernel_each_way() -> None:
    from retainops.testing import simulated_gpu

    x, t = drawn(4, 6).requires_grad_(), targets(6, 4)
    with simulated_gpu(compiles=False) as launches:
        cross_entropy(x, t, label_smoothing=0.1, retain=ro.Retained("logits", "p")).backward()
    assert [launch.name.split("_")[2] for launch in launches] == ["fwd", "mean", "bwd"]


OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
SPILLS = [
    *(("sm_90", torch.bfloat16, n) for n in (1, 100, 256, 50257)),
    *(("sm_90", torch.float64, n) for n in (256, 500)),
    ("sm_80", torch.float32, 131072),
    ("sm_100", torch.float32, 2048),
    ("sm_120", torch.bfloat16, 100),
]
KNOWN = (
    {
        ("sm_80", torch.float64, 256): 4,
        ("sm_90", torch.bfloat16, 100): 4,
        ("sm_90", torch.float32, 100): 4,
        ("sm_120", torch.float64, 256): 4,
    }
    if IS_OLDEST
    else {("sm_80", torch.bfloat16, 100): 4, ("sm_120", torch.bfloat16, 17): 16, ("sm_120", torch.bfloat16, 100): 12}
)
"""Bytes that are known to spill: a few registers a thread, where ptxas stops at 80 or 96 of them.

The oldest Triton writes other PTX, whose spills are others: one register, where ptxas stops at 64, 72 or 128.
"""
KNOWN_WITH_ALL = (
    {
        ("sm_90", torch.bfloat16, 64): 8,
        ("sm_90", torch.bfloat16, 100): 12,
        ("sm_90", torch.float32, 100): 12,
        ("sm_90", torch.float32, 2048): 8,
        ("sm_90", torch.float32, 4096): 8,
        ("sm_90", torch.float64, 50257): 4,
    }
    if IS_OLDEST
    else {}
)
"""The same with all options and nearly all statistics at once: up to three registers, of 96, 128, 168 or 255."""
EVERY = itertools.product(
    ["sm_80", "sm_90", "sm_100", "sm_120"],
    [torch.bfloat16, torch.float32, torch.float64],
    [1, 2, 17, 64, 100, 256, 500, 1000, 2048, 4096, 50257],
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A kernel is compiled for each power of two, and for widths that divide by 16 or not: all with --every-target."""
    if "target" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-target")
        metafunc.parametrize(("target", "dtype", "n"), list(EVERY) if every else SPILLS, ids=str)


def test_no_spills(target: str, dtype: torch.dtype, n: int) -> None:
    """With all options and nearly all statistics at once, too, on sm_90; elsewhere a few registers do."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    rows = max(4096 // n, 8)  # more than a tile's
    x, t = torch.empty(rows, n, dtype=dtype, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
    kept = ro.Retained("p", logits=ro.Stats("l2", "sum", "amax", "act_grad", over="rows", grad=True))
    weight = torch.ones(n, dtype=dtype)
    known = KNOWN.get((target, dtype, n), 0)
    with_all = KNOWN_WITH_ALL.get((target, dtype, n), 0) if target == "sm_90" else 32
    for most, call in (
        (known, lambda: cross_entropy(x, t)),
        (known, lambda: cross_entropy(x, t, retain=ro.Retained("logits", "p"))),
        (with_all, lambda: cross_entropy(x, t, weight, retain=kept, **OPTIONS)),
    ):
        for report in static_report(lambda call=call: call().backward(), target):
            assert report.spill_stores <= most, str(report)


@pytest.mark.parametrize("n", [1024, 8192, 65536], ids=["one tile a row", "several", "several, of several warps"])
def test_one_read_of_the_logits_each_way_and_one_write(n: int) -> None:
    """Of a tile, 128 bits at a time. What is narrower is of rows: a few numbers each."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    x, t = torch.empty(512, n, dtype=torch.bfloat16, requires_grad=True), torch.zeros(512, dtype=torch.int64)

    def wide_accesses(retain: ro.Retained | None) -> list[tuple[int, int]]:
        forward, _mean, backward = static_report(lambda: cross_entropy(x, t, retain=retain).backward())
        return [(report.whole_tile["LDG.128"], report.whole_tile["STG.128"]) for report in (forward, backward)]

    forward, backward = (32 if n <= 8192 else 16) * 2 // 16, 16 * 2 // 16  # elements a thread, of two bytes
    assert wide_accesses(None) == [(forward, 0), (backward, backward)]
    points = backward + 2 * backward  # p is in float32
    assert wide_accesses(ro.Retained("logits", "p")) == [(forward, 0), (backward, backward + points)]


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


# Refusals.

X, T = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = [
    (([1.0], T), {}, TypeError, "logits is list; expected a torch.Tensor"),
    ((X.long(), T), {}, TypeError, r"logits is torch.int64; expected a floating-point dtype, as of logits.float\(\)"),
    ((torch.zeros(()), T[0]), {}, RuntimeError, r"logits has shape \(\); expected \(..., V\)"),
    ((X[:, :0], T), {}, RuntimeError, r"logits has shape \(3, 0\); expected \(..., V\), V classes, V above 0"),
    ((X, 1), {}, TypeError, "target is int; expected a torch.Tensor of class indices"),
    ((X, T.float()), {}, TypeError, r"target is torch.float32; expected class indices.*class probabilities"),
    ((X, T.bool()), {}, TypeError, "target is torch.bool; expected class indices"),
    ((X, T[:2]), {}, RuntimeError, r"target has shape \(2,\); expected \(3,\), since logits has shape \(3, 4\)"),
    ((X[None], T[None, :, None]), {}, RuntimeError, r"target has shape \(1, 3, 1\).*classes are the last dim"),
    ((X, T.to("meta")), {}, RuntimeError, r"target is on meta; expected cpu: move it with .to\(device\)"),
    ((X, T), {"weight": [1.0]}, TypeError, "weight is list; expected a torch.Tensor"),
    ((X, T), {"weight": T}, TypeError, "weight is torch.int64; expected a floating-point dtype"),
    (
        (X, T),
        {"weight": X[0, :3]},
        RuntimeError,
        r"weight has shape \(3,\); expected \(4,\), since there are 4 classes",
    ),
    ((X, T), {"weight": X[0].clone().requires_grad_()}, RuntimeError, r"not differentiable .* pass weight.detach\(\)"),
    ((X, T), {"ignore_index": 1.5}, TypeError, "ignore_index is float; expected an integer, such as -100"),
    ((X, T), {"ignore_index": True}, TypeError, "ignore_index is bool"),
    (
        (X, T),
        {"ignore_index": 2**63},
        ValueError,
        "ignore_index is 9223372036854775808; expected .* int64",
    ),
    ((X, T), {"reduction": "average"}, ValueError, "reduction is 'average'; expected one of none, mean, sum"),
    ((X, T), {"label_smoothing": 1.1}, ValueError, "label_smoothing is 1.1; expected a number between 0 and 1"),
    ((X, T), {"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
    ((X, T), {"label_smoothing": "0.1"}, TypeError, "label_smoothing is str; expected a number between 0 and 1"),
    ((X, T), {"label_smoothing": float("nan")}, ValueError, "label_smoothing is nan"),
    ((X, T), {"z_loss": -1e-4}, ValueError, "z_loss is -0.0001; expected a number of 0 or above"),
    ((X, T), {"softcap": 0.0}, ValueError, "softcap is 0.0; expected a number above 0, such as 30.0, or None"),
    ((X, T), {"softcap": -30}, ValueError, "softcap is -30; expected a number above 0"),
    ((X, T), {"softcap": torch.ones(())}, TypeError, "softcap is Tensor; expected a number above 0"),
    ((X, T), {"retain": "p"}, TypeError, "retain is str; expected retainops.Retained"),
    ((X, T), {"retain": ro.Retained("q")}, KeyError, "unknown point 'q'; its points are: logits, p"),
    ((X, T), {"retain": ro.Retained("p")}, RuntimeError, "can't retain_grad on point 'p'"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_say_what_was_expected(inputs: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"cross_entropy: {says}"):
        cross_entropy(*inputs, **options)
