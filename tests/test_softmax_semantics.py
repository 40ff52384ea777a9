"""softmax and log_softmax: what autograd, statistics and the compiler may expect of them.

`tests/test_semantics.py` holds the elementwise ops to the same.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX, softmax
from retainops.registry import Op
from retainops.testing.driver import Launch
from tests.conftest import Path
from tests.oracle import DTYPES, all_points, assert_near, clones, eager, random_like
from tests.softmax_cases import EAGER, boolean, cut_rows, drawn, in_rows_and_chunks, over_ops

# Bits.


@over_ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retention_changes_no_bit(op: Op, dtype: torch.dtype, kernels: Path) -> None:
    x, mask = drawn(7, 150, dtype=dtype, device=kernels.device), drawn(150, dtype=dtype, device=kernels.device, seed=4)
    runs = []
    few = ro.Retained(scaled=ro.Stats("l2", "act_grad", over="rows"))
    for kept in (None, all_points(op), few, *(ro.Retained(p.name) for p in op.points), None):
        y = op.call(x, 0.5, mask, True, retain=kept)
        runs.append((y, *torch.autograd.grad(y, (x, mask), random_like(y))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("width", [40, 6000, 20000])
def test_retention_changes_no_order_of_summation(width: int, layout: str) -> None:
    """Rows are cut into the same tiles. The simulated GPU sums in one order, so bits do not show it there."""
    from retainops.testing import simulated_gpu

    x = drawn(3, 5, 2, width).detach()
    x = (x.permute(2, 0, 1, 3) if layout == "permuted" else x).requires_grad_()
    tiles = set()
    for want in (None, {"p": ro.Stats("l2", over="rows", grad=True)}, {"scaled": ro.Stats("act_grad", grad=True)}):
        launches: list[Launch] = []
        with simulated_gpu(engine=launches.append, compiles=False):
            y = softmax(x, 0.5, causal=True, retain=ro.Retained(**want) if want else None)
            torch.autograd.grad(y, x, torch.ones_like(y))
        given = dict(zip(launches[-1].fn.arg_names, launches[-1].args, strict=True))
        tiles.add((given["BLOCK_M"], given["BLOCK_N"], given["CHUNKED"]))
    assert len(tiles) == 1


# What autograd may do with them.


@over_ops
def test_nothing_is_written_to_and_a_second_backward_is_right(op: Op, path: Path) -> None:
    x, mask = drawn(7, 150, device=path.device), drawn(150, device=path.device, seed=4)
    kept = all_points(op)
    y = op.call(x, 0.5, mask, False, retain=kept)
    dy = random_like(y)
    given = (x, mask, y, dy)
    before = [(t.detach().clone(), t._version) for t in given]
    y.backward(dy, retain_graph=True)
    first = {n: s.grad.clone() for n, s in kept.items()}
    dx, dmask = x.grad.clone(), mask.grad.clone()
    y.backward(dy)
    for t, (value, version) in zip(given, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
    assert torch.equal(x.grad, 2 * dx)
    assert torch.equal(mask.grad, 2 * dmask)
    assert all(torch.equal(s.grad, 2 * first[n]) for n, s in kept.items())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


@over_ops
@pytest.mark.parametrize("order", ["z + op(x)", "op(x) + z"])
def test_sums_with_the_output_in_both_orders(op: Op, order: str, path: Path) -> None:
    ours = [drawn(7, 150, device=path.device), 0.5, None, False]
    theirs, z, seen = clones(ours), torch.ones(1, device=path.device), []

    def loss(y: torch.Tensor) -> torch.Tensor:
        y.register_hook(seen.append)
        total = z + y if order == "z + op(x)" else y + z
        return (total * total).sum() + y.sum()

    kept = all_points(op)
    loss(op.call(*ours, retain=kept)).backward()
    want, values = eager(op, theirs)
    loss(want).backward()
    assert_near(ours[0].grad, theirs[0].grad, 4)
    for name, value in values.items():
        assert_near(kept[name].grad, value.grad, 4)
    assert_near(seen[0], seen[1], 4)  # what a hook captured was not written over afterwards


@over_ops
@pytest.mark.parametrize("first", ["cross_entropy", "op"])
def test_beside_a_cross_entropy_of_the_same_logits(op: Op, first: str, path: Path) -> None:
    """A cross entropy that wrote its gradient over the logits would spoil what the other op reads, or has read."""
    target = torch.arange(7, device=path.device)

    def gradient(cross_entropy: Callable, call: Callable) -> torch.Tensor:
        x = drawn(7, 50, device=path.device)
        logits = x * 1
        if first == "op":
            y, loss = call(logits), cross_entropy(logits, target)
        else:
            loss, y = cross_entropy(logits, target), call(logits)
        (loss + y.square().mean()).backward()
        return x.grad

    theirs = gradient(F.cross_entropy, functools.partial(EAGER[op.name], dim=-1))
    assert_near(gradient(ro.cross_entropy, op.call), theirs, 4)


@over_ops
def test_in_place_changes(op: Op, path: Path) -> None:
    """x may be changed, for backward reads the output alone; the output may not, and PyTorch says so."""
    x = drawn(7, 150, device=path.device)
    y = op.call(x, 0.5)
    want = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    x.detach().add_(1)
    assert torch.equal(*torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True), *want)
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified.* inplace"):
        y.sum().backward()


@over_ops
def test_backward_keeps_the_output_alone(op: Op, kernels: Path) -> None:
    x = drawn(7, 150, device=kernels.device)
    for kept in (None, ro.Retained(scaled=ro.Stats("l2"))):
        y = op.call(x, 0.5, retain=kept)
        held = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
        assert held == {y.data_ptr()}


@over_ops
def test_gradients_that_nobody_needs(op: Op, kernels: Path) -> None:
    x, mask = drawn(7, 40, device=kernels.device), drawn(7, 40, device=kernels.device, seed=4)
    dx, dmask = torch.autograd.grad(op.call(x, 0.5, mask).sum(0)[3], (x, mask))
    assert torch.equal(*torch.autograd.grad(op.call(x, 0.5, mask.detach()).sum(0)[3], x), dx)
    assert torch.equal(*torch.autograd.grad(op.call(x.detach(), 0.5, mask).sum(0)[3], mask), dmask)
    assert not op.call(x.detach(), 0.5, mask.detach()).requires_grad


@over_ops
def test_autocast_is_as_for_the_eager_expression(op: Op, path: Path) -> None:
    x, eye = drawn(7, 30, device=path.device), torch.eye(30, device=path.device)
    with torch.autocast(path.device, torch.bfloat16):
        y, want = op.call(x @ eye, 0.5), EAGER[op.name]((x @ eye) * 0.5, -1)
    assert y.dtype == want.dtype
    assert_near(y, want, 4)
    dy = random_like(y)
    for a, b in zip(*(torch.autograd.grad(z, x, dy) for z in (y, want)), strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


# Derivatives of derivatives.


def visible(op: Op, *inputs: Any) -> torch.Tensor:
    """The op with 0 where its output is -inf, which has no numerical derivative."""
    return op.call(*inputs).nan_to_num(neginf=0.0)


@over_ops
@pytest.mark.parametrize("masked", ["no", "boolean and causal", "added"])
def test_first_and_second_derivatives_in_float64(op: Op, masked: str, path: Path) -> None:
    x = drawn(3, 4, dtype=torch.float64, device=path.device)
    mask = {"no": None, "boolean and causal": boolean(3, 4, device=path.device)}.get(masked, drawn(4, dtype=x.dtype))
    mask = mask if mask is None else mask.detach().to(path.device).requires_grad_(mask.is_floating_point())

    def f(x: torch.Tensor, *mask_: torch.Tensor) -> torch.Tensor:
        return visible(op, x, 0.7, *(mask_ or (mask,)), masked == "boolean and causal")

    inputs = (x, mask) if masked == "added" else (x,)
    assert torch.autograd.gradcheck(f, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which is what is tested
@pytest.mark.parametrize(
    ("op", "points"),
    [(op, points) for op in (SOFTMAX, LOG_SOFTMAX) for points in ((), ("scaled",))]
    + [(SOFTMAX, points) for points in (("p",), ("scaled", "p"))],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_create_graph_at_every_point(op: Op, points: tuple, path: Path) -> None:
    """What flows back from a gradient of a gradient, and what of it reaches the points: that of a zero added there."""
    x, mask = (drawn(*shape, dtype=torch.float64, device=path.device, seed=len(shape)) for shape in ((3, 40), (40,)))
    kept = ro.Retained(*points) if points else None
    y = op.call(x, 0.2, mask, True, retain=kept)
    dy = random_like(y).requires_grad_()
    y.backward(dy, create_graph=True)
    x2, mask2, dy2 = clones([x, mask, dy])
    zeros = {p.name: torch.zeros_like(y).requires_grad_() for p in op.points}
    want = op.reference(x2, 0.2, mask2, True, lambda name, value: value + zeros[name])
    want.backward(dy2, create_graph=True)
    pairs = [(x, x2), (mask, mask2), *((kept[p], zeros[p]) for p in points)]
    for ours, theirs in pairs:
        assert ours.grad.requires_grad
        torch.testing.assert_close(ours.grad, theirs.grad)
    for side in (0, 1):
        sum((pair[side].grad ** 2).sum() for pair in pairs).backward()
    for ours, theirs in [*pairs, (dy, dy2)]:
        torch.testing.assert_close(ours.grad, theirs.grad)
        ours_leaf = ours if isinstance(ours, torch.Tensor) else ours.tensor
        ours_leaf.grad = theirs.grad = None  # they refer to the graph, and it to them


# Statistics and buffers.


@over_ops
@in_rows_and_chunks
@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_statistics_are_those_of_the_gradient(
    op: Op, over: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(cut, monkeypatch)
    names = ["l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad"] + ["hist"] * (over == "tensor")
    x = drawn(5, 6, 40, device=kernels.device)
    full, dy = all_points(op), random_like(x)
    op.call(x, 0.5, retain=full).backward(dy)
    _, values = eager(op, [x, 0.5, None, False])
    small = ro.Retained(**{p.name: ro.Stats(*names, over=over, grad=True) for p in op.points})
    for _ in range(2):
        small.reset()
        op.call(x, 0.5, retain=small).backward(dy)
    for p in op.points:
        ours, g = small[p.name], full[p.name].grad
        assert torch.equal(ours.grad, g)
        want = ro.Retained(c=ro.Stats(*names, over=over))
        ro.point((values[p.name].detach() + 0).requires_grad_(), "c", retain=want).backward(g)
        for name in names:
            theirs = getattr(want.c, name)
            top = (g * values[p.name]).detach().abs() if name == "act_grad" else g.abs()
            bound = 1e-6 * float(top.sum()) + 1e-6  # sums cancel
            torch.testing.assert_close(getattr(ours, name).to(theirs.dtype), theirs, rtol=1e-5, atol=bound)


@over_ops
def test_points_behind_a_mask_are_eagers(op: Op, kernels: Path) -> None:
    """The value of scaled is -inf there. Its gradient is 0 in softmax, and dy in log_softmax."""
    x, mask = drawn(4, 20, device=kernels.device), boolean(4, 20, device=kernels.device)
    kept = ro.Retained(scaled=ro.Stats("l2", "act_grad", grad=True))
    dy = random_like(x)
    op.call(x, 0.5, mask, retain=kept).backward(dy)
    _, values = eager(op, [x, 0.5, mask, False])
    assert torch.equal(kept.scaled.grad[~mask], torch.zeros_like(dy[~mask]) if op is SOFTMAX else dy[~mask])
    assert kept.scaled.l2.isfinite()
    assert not kept.scaled.act_grad.isfinite()
    assert_near(kept.scaled.act_grad, (values["scaled"].detach() * kept.scaled.grad).sum())


@over_ops
def test_a_buffer_and_adding_into_it(op: Op, kernels: Path) -> None:
    x = drawn(7, 150, device=kernels.device)
    plain, dy = all_points(op), random_like(x)
    op.call(x, 0.5, retain=plain).backward(dy)
    for point in op.points:
        buffer = torch.full((7, 150), 2.0, device=kernels.device)
        op.call(x, 0.5, retain=ro.Retained(**{point.name: ro.Into(buffer, accumulate=True)})).backward(dy)
        assert torch.equal(buffer, plain[point.name].grad + 2)


# Compiled.


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


@over_ops
def test_compiled_with_retention(op: Op, compiler: None) -> None:
    mask = boolean(6, 1, 40)

    def f(x: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        return op.call(x, 0.5, mask, True, retain=kept)

    ours, theirs = drawn(6, 5, 40), drawn(6, 5, 40)
    kept, want = all_points(op), all_points(op)
    y, z = torch.compile(f, fullgraph=True, backend="aot_eager")(ours, kept), f(theirs, want)
    dy = random_like(y)
    y.backward(dy)
    z.backward(dy)
    assert_near(y, z)
    assert_near(ours.grad, theirs.grad, 4)
    for name in kept:
        assert_near(kept[name].grad, want[name].grad, 4)


@pytest.mark.parametrize("n", [16400, 32784])
def test_no_bit_depends_on_what_is_asked_for_in_wide_rows_with_an_added_mask(n: int) -> None:
    """Only values of s take the mask in backward: it must not cut the rows otherwise."""
    pytest.importorskip("triton")
    from retainops.testing import simulated_gpu

    torch.manual_seed(0)
    x, mask, dy = (torch.randn(2, n) for _ in "xmd")
    found = []
    with simulated_gpu(compiles=False), ro.backend("triton"):
        for kept in (None, ro.Retained("scaled"), ro.Retained(scaled=ro.Stats("act_grad"))):
            leaf = x.clone().requires_grad_()
            ro.softmax(leaf, mask=mask, retain=kept).backward(dy)
            found.append(leaf.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
