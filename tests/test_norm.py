"""rms_norm, layer_norm and both of a sum: definitions, widths, dtypes, rows that are special, layouts, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.norm import (
    ADD_LAYER_NORM,
    ADD_RMS_NORM,
    LAYER_NORM,
    RMS_NORM,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    rms_norm,
)
from retainops.registry import Op
from retainops.testing import check_op
from tests.conftest import Path
from tests.norm_cases import (
    compare,
    cut_rows,
    differentiate,
    drawn,
    in_rows_and_chunks,
    inputs_of,
    joined,
    over_ops,
    several,
    with_eps,
)
from tests.oracle import DTYPES, all_points, assert_near, clones, eager, leaves, random_like

# The definitions, in the words of PyTorch and of Hugging Face.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definitions_are_pytorchs(path: Path, dtype: torch.dtype) -> None:
    x, w, b = (drawn(*s, dtype=dtype, device=path.device, seed=i) for i, s in enumerate([(3, 5, 40), (40,), (40,)]))
    assert_near(layer_norm(x, w, b, 1e-3), F.layer_norm(x, (40,), w, b, 1e-3), 2)
    assert_near(layer_norm(x), F.layer_norm(x, (40,)), 2)
    assert_near(rms_norm(x, w, 1e-3), F.rms_norm(x, (40,), w, 1e-3), 2)
    assert_near(rms_norm(x, eps=1e-3), F.rms_norm(x, (40,), None, 1e-3), 2)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_definitions_are_hugging_faces(path: Path, weight_dtype: torch.dtype) -> None:
    x = drawn(6, 40, dtype=torch.bfloat16, device=path.device)
    w = drawn(40, dtype=weight_dtype, device=path.device, seed=4)

    def llama(x: torch.Tensor) -> torch.Tensor:
        held = x.to(torch.float32)
        held = held * torch.rsqrt(held.pow(2).mean(-1, keepdim=True) + 1e-6)
        return w * held.to(x.dtype)

    def gemma(x: torch.Tensor) -> torch.Tensor:
        held = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (held * (1.0 + w.float())).type_as(x)

    for ours, theirs in (
        (rms_norm(x, w, round_first=True), llama(x)),
        (rms_norm(x, w, offset=1.0), gemma(x)),
    ):
        assert_near(ours, theirs)
        dy = random_like(ours)
        for a, b in zip(*(torch.autograd.grad(y, (x, w), dy) for y in (ours, theirs)), strict=True):
            assert_near(a, b, 2)


def test_rounding_first_is_not_rounding_last(path: Path) -> None:
    """And the sum of a narrow and a wide tensor is rounded to what it is stored as, not to x's dtype."""
    x, w = drawn(6, 40, dtype=torch.bfloat16, device=path.device), drawn(40, device=path.device, seed=4)
    first, last = (rms_norm(x, w, round_first=r) for r in (True, False))
    assert (first.dtype, last.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(first.bfloat16(), last)
    y, summed = add_rms_norm(x, drawn(6, 40, device=path.device, seed=5), w, round_first=True)
    assert y.dtype == summed.dtype == torch.float32
    assert_near(y, rms_norm(summed, w))


def test_the_point_y_is_what_weight_multiplies(path: Path) -> None:
    x = drawn(6, 40, dtype=torch.bfloat16, device=path.device)
    w = drawn(40, dtype=torch.bfloat16, device=path.device, seed=4)
    for round_first, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        kept = ro.Retained(xhat=ro.Stats("act_grad", grad=True), y=ro.Stats("act_grad", grad=True))
        y = rms_norm(x, w, round_first=round_first, retain=kept)
        dy = random_like(y)
        y.backward(dy)
        assert kept.y.grad.dtype == dtype
        assert_near(kept.y.grad, (dy.float() * w.float()).to(dtype), 2)
        held = x.detach().float()
        value = held * torch.rsqrt(held.square().mean(-1, keepdim=True) + 1e-6)
        g = kept.xhat.grad.float()
        for name, v in (("xhat", value), ("y", value.to(dtype).float())):
            torch.testing.assert_close(kept[name].act_grad, (g * v).sum(), rtol=3e-3, atol=3e-2)


# Widths, dtypes and accuracy.


@over_ops
@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 1000, 6000, 8191, 16384])
def test_widths(op: Op, width: int, kernels: Path) -> None:
    inputs = inputs_of(op, 3, width, device=kernels.device)
    compare(op, *(with_eps(op, inputs, 0.5) if width < 3 else inputs), scale=4)  # in one or two, all cancels


@pytest.mark.parametrize(
    ("op", "rows", "width"),
    [(ADD_LAYER_NORM, 2, 65536), (ADD_RMS_NORM, 1, 262144)],
    ids=["add_layer_norm-65536", "add_rms_norm-262144"],
)
def test_rows_wider_than_registers(op: Op, rows: int, width: int, kernels: Path) -> None:
    x, *rest = inputs_of(op, rows, width, device=kernels.device)
    with torch.no_grad():  # chunks that differ in everything
        x += torch.arange(width, device=kernels.device) // 5000 * 3.0
        x *= 1 + torch.arange(width, device=kernels.device) % 30000 / 3000
    compare(op, x, *rest, scale=16)


@over_ops
@pytest.mark.parametrize(
    ("dtype", "cut"),
    [*((dtype, "whole rows") for dtype in DTYPES), (torch.bfloat16, "chunks"), (torch.float32, "chunks")],
    ids=str,
)
def test_error_is_no_larger_than_eagers(
    op: Op, dtype: torch.dtype, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(cut, monkeypatch)
    ours, theirs = joined(op)
    report = check_op(ours, *inputs_of(op, 20, 90, dtype=dtype, device=kernels.device), reference=theirs)
    assert report.ok, report


@pytest.mark.parametrize(("op", "dtype"), [(LAYER_NORM, torch.float64), (ADD_RMS_NORM, torch.bfloat16)])
def test_error_of_wide_rows(op: Op, dtype: torch.dtype, kernels: Path) -> None:
    ours, theirs = joined(op)
    report = check_op(ours, *inputs_of(op, 2, 20000, dtype=dtype, device=kernels.device), reference=theirs)
    assert report.ok, report


@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False), (1.0, True)])
def test_error_of_both_cast_orders(offset: float, round_first: bool, kernels: Path) -> None:
    x = drawn(40, 90, dtype=torch.bfloat16, device=kernels.device)
    w = drawn(90, dtype=torch.bfloat16, device=kernels.device)
    report = check_op(rms_norm, x, w, 1e-6, offset, round_first, reference=RMS_NORM.reference)
    assert report.ok, report


def test_a_mean_far_above_the_deviation(kernels: Path) -> None:
    """The sum of squares is taken around the mean: x^2 - mean^2 would have nothing left."""
    x = (drawn(4, 300, device=kernels.device).detach() + 3e4).requires_grad_()
    w, b = drawn(300, device=kernels.device, seed=4), drawn(300, device=kernels.device, seed=5)
    report = check_op(layer_norm, x, w, b, 1e-5)
    assert report.ok, report


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, kernels: Path) -> None:
    """The output is of x's dtype, a gradient of its input's; what they are worth is what x's dtype holds them in."""
    x = drawn(6, 65, dtype=dtype, device=kernels.device)
    w, b = (drawn(65, dtype=weight_dtype, device=kernels.device, seed=s) for s in (4, 5))
    held = torch.promote_types(dtype, torch.float32)
    for op, given in ((LAYER_NORM, (x, w, b, 1e-5)), (RMS_NORM, (x, w, 1e-6, 0.0, False))):
        theirs = clones(given)
        y, want = op.call(*given), eager(op, theirs)[0]
        assert_near(y, want, 4)
        dy = random_like(y)
        ours = torch.autograd.grad(y, leaves(given), dy)
        assert [g.dtype for g in ours] == [t.dtype for t in leaves(given)]
        for a, b in zip(ours, torch.autograd.grad(want, leaves(theirs), dy), strict=True):
            narrow = a.dtype if a.dtype.itemsize < held.itemsize else held
            assert_near(a.to(narrow), b.to(narrow), 8)


@pytest.mark.parametrize(("has_weight", "has_bias"), [(False, False), (True, False), (False, True)])
@in_rows_and_chunks
def test_without_weights(
    has_weight: bool, has_bias: bool, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(cut, monkeypatch)

    def weight(wanted: bool) -> torch.Tensor | None:
        return drawn(65, device=kernels.device, seed=4) if wanted else None

    compare(LAYER_NORM, drawn(3, 65, device=kernels.device), weight(has_weight), weight(has_bias), 1e-5, scale=4)
    compare(RMS_NORM, drawn(3, 65, device=kernels.device), weight(has_weight), 1e-5, 1.0, False, scale=4)


@over_ops
@in_rows_and_chunks
def test_programs_that_walk_several_tiles(op: Op, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU of two multiprocessors; the last tile is ragged."""
    cut_rows(cut, monkeypatch)
    monkeypatch.setattr("retainops.ops._rows._multiprocessors", lambda device: 2)
    monkeypatch.setattr("retainops.ops._rows.ROOM", 1)
    compare(op, *inputs_of(op, 700 if cut == "whole rows" else 45, 24, device=kernels.device), scale=4)


# Rows that are special.


@over_ops
@in_rows_and_chunks
def test_special_rows(op: Op, cut: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(cut, monkeypatch)
    x, *rest = inputs_of(op, 8, 65, device=path.device)
    inf, nan = torch.inf, torch.nan
    with torch.no_grad():
        for row, value in enumerate([-inf, nan, 2.0, 0.0]):
            x[row] = value
        x[4, 7], x[5, -1], x[6] = inf, nan, 1e30
    theirs, kept = clones([x, *rest]), all_points(op)
    outputs = several(op.call(x, *rest, retain=kept))
    want, values = eager(op, theirs)
    for y, w in zip(outputs, several(want), strict=True):
        assert torch.equal(y.isnan(), w.isnan())
        for row in (2, 3, 7):
            torch.testing.assert_close(y[row], w[row], rtol=1e-3, atol=1e-3)
    dys = [random_like(y, seed) for seed, y in enumerate(outputs)]
    for dy in dys:
        dy[7, 3] = 1e20
    differentiate(want, differentiate(outputs, dys))
    for a, b in zip(leaves([x, *rest]), leaves(theirs), strict=True):
        assert torch.equal(a.grad.isnan(), b.grad.isnan())
    for name, slot in kept.items():
        assert torch.equal(slot.grad.isnan(), values[name].grad.isnan())


@pytest.mark.parametrize("op", [LAYER_NORM, ADD_LAYER_NORM], ids=lambda op: op.name)
@pytest.mark.parametrize("columns", [65, 768, 1000, 1024, 40_000])
def test_of_rows_of_equal_values_nothing_is_left(op: Op, columns: int, path: Path) -> None:
    """Their mean is a rounded sum's, and a small eps makes its error large. Beside them, rows that vary a little."""
    x = torch.tensor([12345.678, 12.3, -0.1, 1e-30, 1e30], device=path.device)[:, None].repeat(1, columns)
    vary = 100 + 1e-3 * torch.randn(2, columns, generator=torch.Generator().manual_seed(0)).to(path.device)
    x, w = torch.cat([x, vary]).requires_grad_(), torch.ones(columns, device=path.device, requires_grad=True)
    rest = (w, None, 1e-5)
    if op is LAYER_NORM:
        y = op.call(x, *rest)
    else:
        y, _summed = op.call(x, torch.zeros_like(x), *rest)
    exact = F.layer_norm(x.double(), (columns,), w.double())
    torch.testing.assert_close(y[:5].double(), exact[:5], rtol=0, atol=1e-5)
    half_an_ulp = 2.0**-18 / 1e-5**0.5  # of a mean of 100, in float32, times rstd
    torch.testing.assert_close(y[5:].double(), exact[5:], rtol=1e-3, atol=1.2 * half_an_ulp)
    for got in torch.autograd.grad(y[:5].sum(), (x, w)):
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=2e-4)


@pytest.mark.parametrize("columns", [64, 1000])
def test_a_row_of_equal_values_changes_no_bit_of_its_neighbours(columns: int, kernels: Path) -> None:
    x = drawn(8, columns, device=kernels.device).detach()
    equal = x.clone()
    equal[3] = 7.3
    others = torch.arange(8, device=kernels.device) != 3
    y, beside = layer_norm(x), layer_norm(equal)
    assert torch.equal(y[others], beside[others])
    assert beside[3].abs().max() < 1e-5


@over_ops
def test_no_rows(op: Op, path: Path) -> None:
    for shape in ((0, 5), (2, 0, 5)):
        ours, kept = inputs_of(op, *shape, device=path.device), all_points(op)
        outputs = several(op.call(*ours, retain=kept))
        differentiate(outputs)
        assert [y.shape for y in outputs] == [torch.Size(shape)] * len(outputs)
        assert [x.grad.shape for x in leaves(ours)] == [x.shape for x in leaves(ours)]
        assert all(not x.grad.any() for x in leaves(ours))
        assert all(slot.grad.shape == shape for slot in kept.values())


@over_ops
def test_one_row_of_one_dim(op: Op, kernels: Path) -> None:
    compare(op, *inputs_of(op, 40, device=kernels.device), scale=4)


# Bad input.

X, W = torch.ones(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rms_norm([1.0]), TypeError, "rms_norm: x is list; expected a torch.Tensor"),
        (lambda: rms_norm(X, 2.0), TypeError, "rms_norm: weight is float; expected a torch.Tensor"),
        (lambda: rms_norm(X, W, None), TypeError, "rms_norm: eps is NoneType; expected a number, such as 1e-6"),
        (lambda: rms_norm(X, W, 1e-6, "1"), TypeError, "rms_norm: offset is str; expected a number"),
        (lambda: rms_norm(X.long()), TypeError, r"x is torch.int64; expected a floating-point dtype: .*\.to\("),
        (lambda: layer_norm(X, W, W, 0.0), ValueError, "layer_norm: eps is 0.0; expected a number above 0"),
        (lambda: layer_norm(X, W, W, -1e-5), ValueError, "layer_norm: eps is -1e-05; expected a number above 0"),
        (lambda: layer_norm(X, W, W, float("nan")), ValueError, "layer_norm: eps is nan; expected a number above 0"),
        (lambda: layer_norm(torch.ones(())), RuntimeError, r"x has shape \(\); expected \(..., n\) with n above 0"),
        (lambda: layer_norm(torch.ones(3, 0)), RuntimeError, r"x has shape \(3, 0\).*there is no row"),
        (lambda: layer_norm(X, torch.ones(3)), RuntimeError, r"weight has shape \(3,\); expected \(4,\)"),
        (lambda: layer_norm(X, W, X), RuntimeError, r"bias has shape \(3, 4\); expected \(4,\), since x has \(3, 4\)"),
        (lambda: layer_norm(X, W.to("meta")), RuntimeError, r"weight is on meta and x on cpu; move one of them"),
        (
            lambda: add_rms_norm(X, X.t()),
            RuntimeError,
            r"add_rms_norm: x of shape \(3, 4\) and residual of shape \(4, 3\)",
        ),
        (
            lambda: add_rms_norm(W, X, X),
            RuntimeError,
            r"weight has shape \(3, 4\); expected \(4,\), since x has \(3, 4\)",
        ),
        (lambda: add_layer_norm(X, None), TypeError, "add_layer_norm: residual is NoneType; expected a torch.Tensor"),
        (lambda: rms_norm(X, W, retain=ro.Retained("c")), KeyError, "unknown point 'c'; its points are: xhat, y"),
        (lambda: rms_norm(X, W, retain=ro.Retained("y")), RuntimeError, "rms_norm: can't retain_grad on point 'y'"),
    ],
    ids=range(18),
)
def test_errors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
