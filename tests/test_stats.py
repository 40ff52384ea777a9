"""Statistics: each equals the same reduction of eager's retained gradient in float64, on every path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import retainops as ro
from retainops.registry import find
from retainops.stats import HIST_BINS, STATISTICS
from retainops.testing.check import check_layouts
from tests.conftest import Path, random_leaves
from tests.oracle import DTYPES, OPS, clones, eager, is_float, leaves, random_like, refusal, sample

EVERY = tuple(STATISTICS)
NO_HIST = tuple(name for name in EVERY if name != "hist")


def expected(name: str, over: str, g: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition, in float64."""
    g, value = g.double(), value.double()
    dims = {"tensor": tuple(range(g.dim())), "rows": (-1,), "channels": tuple(range(g.dim() - 1))}[over]
    if name == "hist":
        counts = torch.zeros(HIST_BINS, dtype=torch.int64)
        for x in g.float().abs().reshape(-1).tolist():
            if math.isnan(x) or math.isinf(x):
                counts[255] += 1
            else:
                counts[max(math.frexp(x)[1] - 1 + 127, 0) if x else 0] += 1
        return counts.to(g.device)
    reductions = {
        "l2": lambda: (g * g).sum(dims).sqrt() if dims else g.abs(),
        "sum": lambda: g.sum(dims) if dims else g,
        "abs_sum": lambda: g.abs().sum(dims) if dims else g.abs(),
        "amax": lambda: g.abs().amax(dims) if dims else g.abs(),
        "mean": lambda: g.mean(dims) if dims else g,
        "nonfinite": lambda: (~g.isfinite()).sum(dims) if dims else (~g.isfinite()).long(),
        "act_grad": lambda: (g * value).sum(dims) if dims else g * value,
    }
    return reductions[name]()


def assert_statistics(slot: ro.Slot, names: tuple[str, ...], over: str, g: torch.Tensor, value: torch.Tensor) -> None:
    """Within float32 rounding of a sum: the scale is that of the terms."""
    for name in names:
        got, want = getattr(slot, name), expected(name, over, g, value)
        assert got.shape == want.shape, name
        if name in ("hist", "nonfinite"):
            assert torch.equal(got, want), name
            continue
        finite = torch.nan_to_num(g.double(), 0, 0, 0)
        scale = (
            (finite * torch.nan_to_num(value.double(), 0, 0, 0)).abs().sum()
            if name == "act_grad"
            else finite.abs().sum()
        )
        assert got.dtype == torch.promote_types(g.dtype, torch.float32)
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=8 * torch.finfo(got.dtype).eps,
            atol=torch.finfo(got.dtype).eps * scale.item(),
            equal_nan=True,
        )


SHAPES = {
    "flat": (2100,),
    "ragged rows": (70, 150),
    "wide rows": (3, 1030),
    "three dims": (3, 5, 40),
    "0-dim": (),
    "width 1": (50, 1),
}


def skip_what_others_show(path: Path, name: str) -> None:
    if path.name == "reference" and name not in ("mul_sin", "mish"):
        pytest.skip("on the reference path statistics know nothing of the op: one of one point, one of two are enough")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_every_statistic_of_every_shape(path: Path, name: str, shape: tuple, over: str) -> None:
    skip_what_others_show(path, name)
    if over != "tensor" and not shape:
        return  # refused: test_what_cannot_be_taken
    op, inputs = find(name), sample(name, path.device, shape=shape, seed=3)
    if refused := refusal(op, inputs):  # halves of no dims
        with pytest.raises(refused):
            op.call(*inputs)
        return
    names = EVERY if over == "tensor" else NO_HIST
    theirs = clones(inputs)
    for point in op.points:
        want = {point.name: ro.Stats(*names, over=over)}
        kept = ro.Retained(**want)
        y = op.call(*inputs, retain=kept)
        dy = random_like(y, seed=4)
        assert getattr(kept[point.name], names[0]) is None
        y.backward(dy)
        full = ro.Retained(**{point.name: ro.Stats(*names, over=over, grad=True)})
        op.call(*inputs, retain=full).backward(dy)
        reference, values = eager(op, theirs)
        reference.backward(dy)
        g = full[point.name].grad
        assert_statistics(full[point.name], names, over, g, values[point.name].detach())
        assert kept[point.name].grad is None
        for stat in names:
            assert torch.equal(getattr(kept[point.name], stat), getattr(full[point.name], stat))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "outer", "stepped"])
def test_every_dtype_and_layout(path: Path, name: str, dtype: torch.dtype, layout: str) -> None:
    skip_what_others_show(path, name)
    op = find(name)
    layouts = check_layouts(*sample(name, path.device, dtype, (6, 5), requires_grad=False))
    if layout not in layouts:
        assert layout == "outer"
        assert sum(map(is_float, layouts["contiguous"])) == 1  # there is nothing to broadcast with
        layout = "expanded"
    inputs = [x.requires_grad_() if is_float(x) else x for x in layouts[layout]]
    every = [p.name for p in op.points]
    for over in ("tensor", "rows", "channels"):
        names = EVERY if over == "tensor" else NO_HIST
        names = tuple(n for n in names if n != "hist" or dtype == torch.float32)  # a rounding can change a bin
        kept = ro.Retained(**{point: ro.Stats(*names, over=over) for point in every})
        y = op.call(*inputs, retain=kept)
        dy = random_like(y, seed=4)
        y.backward(dy)
        wide = [x.detach().double().requires_grad_() if is_float(x) else x for x in inputs]
        want, values = eager(op, wide)
        want.backward(dy.double())
        grads = {point: values[point].grad for point in every}
        if path.name == "reference":  # there the gradient is rounded to the dtype before anybody sees it
            narrow, values = eager(op, clones(inputs))
            narrow.backward(dy)
            grads = {point: values[point].grad for point in every}
        for point, n in itertools.product(every, names):
            exact = expected(n, over, grads[point], values[point].detach())
            held = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            got = getattr(kept[point], n)
            torch.testing.assert_close(got.double(), exact.double(), rtol=30 * held, atol=30 * held * 30)


@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(path: Path, over: str, bad: float) -> None:
    rand = random_leaves(path.device)
    a, b, dy = rand(5, 300), rand(5, 300), rand(5, 300, requires_grad=False)
    dy[3, 7] = bad
    names = EVERY if over == "tensor" else NO_HIST
    kept = ro.Retained(c=ro.Stats(*names, over=over, grad=True))
    ro.mul_sin(a, b, retain=kept).backward(dy)
    assert kept.c.grad.isfinite().sum() == 5 * 300 - 1
    assert_statistics(kept.c, names, over, kept.c.grad, (a * b).detach())


def test_what_lies_outside_the_tensor_does_not_count(path: Path) -> None:
    """Broadcast operands are not masked at a ragged edge: an inf there must not leak into a sum."""
    rand = random_leaves(path.device)
    a, b = rand(3, 70), rand(70)
    with torch.no_grad():
        b[5] = math.inf
        a[:, 5] = 0.5
    kept = ro.Retained(c=ro.Stats(*NO_HIST, over="channels"))
    ro.pointwise.mul_sigmoid(a, b, retain=kept).sum().backward()  # beside 0.5 * inf it has the slope 0, of 0 * inf NaN
    assert kept.c.nonfinite.sum() == kept.c.sum[5] == b.grad[5] == 0
    assert kept.c.act_grad.isfinite().sum() == 69


@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_nor_does_the_value_outside_where_gradient_and_operand_are_broadcast(path: Path, over: str) -> None:
    """a + 0 is no 0, and neither is the gradient of a sum."""
    rand = random_leaves(path.device)
    a, b, kept = rand(5, 1), rand(7), ro.Retained(c=ro.Stats(*NO_HIST, over=over, grad=True))
    ro.add_gelu(a, b, retain=kept).sum().backward()
    assert_statistics(kept.c, NO_HIST, over, kept.c.grad, (a + b).detach())


def test_merging_over_uses_and_backward_calls(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b = rand(4, 30), rand(4, 30)
    kept = ro.Retained(c=ro.Stats(*EVERY))
    grads = []
    for scale in (1.0, -3.0):
        y = ro.mul_sin(a, b, retain=kept) * scale
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        grads += [(torch.cos(a * b) * scale).detach()] * 2
    together, values = torch.cat(grads), torch.cat([(a * b).detach()] * 4)
    assert_statistics(kept.c, EVERY[:-1], "tensor", together, values)
    assert kept.c.hist.sum() == together.numel()
    assert kept.c.amax.item() == pytest.approx(3 * torch.cos(a * b).abs().max().item())
    kept.reset()
    assert kept.c.l2 is None
    ro.mul_sin(a, b, retain=kept).sum().backward()
    assert kept.c.amax.item() == pytest.approx(torch.cos(a * b).abs().max().item())


def test_no_elements(path: Path) -> None:
    rand = random_leaves(path.device)
    for over, shape in (("tensor", ()), ("rows", (0,)), ("channels", (5,))):
        kept = ro.Retained(c=ro.Stats(*(EVERY if over == "tensor" else NO_HIST), over=over))
        ro.mul_sin(rand(0, 5), rand(5), retain=kept).sum().backward()
        assert kept.c.l2.shape == shape
        assert kept.c.l2.sum() == kept.c.amax.sum() == kept.c.nonfinite.sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_no_elements_of_a_point_that_is_broadcast(path: Path, dtype: torch.dtype) -> None:
    kept = ro.Retained(scaled=ro.Stats("l2"))
    rand = random_leaves(path.device)
    x, scale, shift = rand(4, dtype=dtype), rand(4, dtype=dtype), rand(0, 4, dtype=dtype)
    ro.scale_shift(x, scale, shift, retain=kept).sum().backward()
    assert kept.scaled.l2 == 0
    assert kept.scaled.l2.dtype == torch.promote_types(dtype, torch.float32)


def test_no_buffer_of_the_points_size(kernels: Path) -> None:
    """Statistics are shares, one a tile: nothing that a kernel writes beside da and db is of c's size."""
    rand = random_leaves(kernels.device)
    a, b = rand(64, 1024), rand(64, 1024)
    for over in ("tensor", "rows", "channels"):
        kept = ro.Retained(c=ro.Stats(*NO_HIST, over=over))
        y = ro.mul_sin(a, b, retain=kept)
        y.sum().backward()
        assert kept.c.grad is None
        assert kept.c.tensor.grad is None
        assert all(getattr(part, "shares", part).numel() <= 1024 for part in kept.c._parts.values())


def test_two_runs_are_bitwise_equal(path: Path) -> None:
    runs = []
    for _ in range(2):
        rand = random_leaves(path.device)
        kept = ro.Retained(c=ro.Stats(*EVERY))
        ro.mul_sin(rand(70, 150), rand(150), retain=kept).sum().backward()
        runs.append([getattr(kept.c, name) for name in EVERY])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_taking_statistics_changes_no_bit_of_a_gradient(path: Path, name: str) -> None:
    op, inputs = find(name), sample(name, path.device)
    for over in ("tensor", "rows", "channels"):
        plain = torch.autograd.grad(op.call(*inputs).sum(), leaves(inputs))
        kept = ro.Retained(**{p.name: ro.Stats("l2", "amax", over=over) for p in op.points})
        with_ = torch.autograd.grad(op.call(*inputs, retain=kept).sum(), leaves(inputs))
        assert all(torch.equal(x, y) for x, y in zip(plain, with_, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ro.Stats(), "nothing asked for; name some of l2, sum"),
        (lambda: ro.Stats("norm"), "unknown statistic 'norm'; expected some of l2, sum"),
        (lambda: ro.Stats("l2", over="columns"), "over is 'columns'; expected one of tensor, rows, channels"),
        (lambda: ro.Stats("hist", over="rows"), '"hist" over rows; it is taken over the whole tensor'),
    ],
)
def test_requests_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"Stats: {message}"):
        make()


def test_a_lazily_negated_gradient() -> None:
    """As that of what becomes the imaginary part of a conjugate."""
    x, kept = torch.ones(3, requires_grad=True), ro.Retained(c=ro.Stats("sum", "hist"))
    negated = torch.full((3,), 1 + 2j).conj().imag
    assert negated.is_neg()
    ro.point(x, "c", retain=kept).backward(negated)
    assert (kept.c.sum.item(), kept.c.hist[128].item()) == (-6.0, 3)


def test_float8() -> None:
    a = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    kept = ro.Retained(c=ro.Stats("sum", "act_grad", grad=True))
    (ro.point(a.to(torch.float8_e4m3fn), "c", retain=kept).float() * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert (kept.c.sum.item(), kept.c.act_grad.item(), kept.first_nonfinite()) == (7.0, -1.0, None)


def test_what_cannot_be_taken(path: Path) -> None:
    a = torch.ones((), device=path.device, requires_grad=True)
    with pytest.raises(ValueError, match=r"mul_sin: Stats\(over='rows'\) of point 'c', which has no dims"):
        ro.mul_sin(a, a, retain=ro.Retained(c=ro.Stats("l2", over="rows")))
    z = torch.ones(3, dtype=torch.complex64, device=path.device, requires_grad=True)
    with pytest.raises(ValueError, match="mul_sin: Stats of point 'c', which is torch.complex64"):
        ro.mul_sin(z, z, retain=ro.Retained(c=ro.Stats("l2")))


def test_attributes_that_were_not_asked_for() -> None:
    kept = ro.Retained("d", c=ro.Stats("l2"))
    with pytest.raises(
        AttributeError, match=r"slot 'c' has no attribute 'amax': its statistics are l2; ask with Stats"
    ):
        kept.c.amax  # noqa: B018
    with pytest.raises(AttributeError, match="'value': a slot holds gradients; for values hook the module"):
        kept.c.value  # noqa: B018
    with pytest.raises(AttributeError, match=r"slot 'd' has no attribute 'l2': it has no statistics; ask with Stats"):
        kept.d.l2  # noqa: B018
    assert "no Stats(l2) yet" in repr(kept)
