"""rope: what autograd, statistics and the compiler may expect of it.

`tests/test_semantics.py` holds the elementwise ops to the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops.rope import ROPE, rope
from tests.conftest import Path
from tests.oracle import DTYPES, all_points, assert_near, clones, eager
from tests.rope_cases import compare, drawn, gradients, inputs, tables

# Bits.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retention_changes_no_bit(dtype: torch.dtype, path: Path) -> None:
    given = inputs(path.device, dtype)
    few = ro.Retained(q_rot=ro.Stats("l2", "act_grad", over="rows"), k_rot=ro.Stats("amax"))
    runs = []
    for kept in (None, all_points(ROPE), few, ro.Retained("k_rot"), None):
        ys = rope(*given, retain=kept)
        runs.append([*ys, *torch.autograd.grad(ys, given[:2], gradients(ys))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# What autograd may do with it.


def test_nothing_is_written_to_and_a_second_backward_is_right(path: Path) -> None:
    q, k, cos, sin, *flags = inputs(path.device)
    kept = all_points(ROPE)
    ys = rope(q, k, cos, sin, *flags, retain=kept)
    dys = gradients(ys)
    given = (q, k, cos, sin, *ys, *dys)
    before = [(t.detach().clone(), t._version) for t in given]
    torch.autograd.backward(ys, dys, retain_graph=True)
    first = [q.grad.clone(), k.grad.clone(), *(s.grad.clone() for s in kept.values())]
    torch.autograd.backward(ys, dys)
    for t, (value, version) in zip(given, before, strict=True):
        assert torch.equal(t, value)
        assert t._version == version
    for ours, once in zip((q.grad, k.grad, *(s.grad for s in kept.values())), first, strict=True):
        assert torch.equal(ours, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(ys, dys)


@pytest.mark.parametrize("order", ["z + op(x)", "op(x) + z"])
def test_sums_with_the_outputs_in_both_orders(order: str, path: Path) -> None:
    ours = inputs(path.device)
    theirs, z = clones(ours), torch.ones(1, device=path.device)
    seen: list[torch.Tensor] = []

    def loss(ys: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for y in ys:
            y.register_hook(seen.append)
        total = sum((((z + y) if order == "z + op(x)" else (y + z)) ** 2).sum() for y in ys)
        return total + sum(y.sum() for y in ys)

    kept = all_points(ROPE)
    loss(rope(*ours, retain=kept)).backward()
    want, values = eager(ROPE, theirs)
    loss(want).backward()
    for x, t in zip(ours[:2], theirs[:2], strict=True):
        assert_near(x.grad, t.grad, 4)
    for name, value in values.items():
        assert_near(kept[name].grad, value.grad, 4)
    assert sorted(g.shape[1] for g in seen) == [2, 2, 4, 4]
    for heads in (2, 4):  # what a hook captured was not written over afterwards
        assert_near(*(g for g in seen if g.shape[1] == heads), 4)


def test_what_slots_hold_is_their_own(path: Path) -> None:
    """A point's gradient is the output's, whose memory is somebody else's."""
    given, kept = inputs(path.device), all_points(ROPE)
    ys = rope(*given, retain=kept)
    dys = gradients(ys)
    torch.autograd.backward(ys, dys)
    for slot, dy in zip(kept.values(), dys, strict=True):
        assert torch.equal(slot.grad, dy)
        slot.grad.zero_()
        assert dy.any()


@pytest.mark.parametrize("which", [0, 1], ids=["q_rot", "k_rot"])
def test_a_loss_of_one_output(which: int, path: Path) -> None:
    given, kept = inputs(path.device), all_points(ROPE)
    rope(*given, retain=kept)[which].sum().backward()
    names = list(kept)
    assert torch.equal(kept[names[which]].grad, torch.ones_like(given[which]))
    assert kept[names[1 - which]].grad is None
    assert given[which].grad is not None
    assert given[1 - which].grad is None


@pytest.mark.parametrize("frozen", [0, 1], ids=["q", "k"])
def test_an_input_that_needs_no_gradient(frozen: int, path: Path) -> None:
    given = inputs(path.device)
    given[frozen] = given[frozen].detach()
    ys = rope(*given, retain=ro.Retained(("k_rot", "q_rot")[frozen]))
    assert [y.requires_grad for y in ys] == [x.requires_grad for x in given[:2]]
    ys[1 - frozen].sum().backward()
    theirs = clones(given)
    eager(ROPE, theirs)[0][1 - frozen].sum().backward()
    assert_near(given[1 - frozen].grad, theirs[1 - frozen].grad)
    assert not any(y.requires_grad for y in rope(*(x.detach() if isinstance(x, torch.Tensor) else x for x in given)))


def test_in_place_changes(path: Path) -> None:
    """q, k and the outputs may be changed, for backward reads the tables alone; these may not, and PyTorch says so."""
    q, k, cos, sin, *flags = inputs(path.device)
    ys = rope(q, k, cos, sin, *flags)
    dys = gradients(ys)
    want = torch.autograd.grad(ys, (q, k), dys, retain_graph=True)
    for t in (q, k, *ys):
        t.detach().add_(1)
    for ours, theirs in zip(torch.autograd.grad(ys, (q, k), dys, retain_graph=True), want, strict=True):
        assert torch.equal(ours, theirs)
    cos.mul_(2)
    with pytest.raises(RuntimeError, match="modified.* inplace"):
        torch.autograd.backward(ys, dys)


def test_backward_keeps_the_tables_alone(kernels: Path) -> None:
    q, k, cos, sin, *flags = inputs(kernels.device)
    ys = rope(q, k, cos, sin, *flags, retain=ro.Retained(q_rot=ro.Stats("l2")))
    held = {t.data_ptr() for t in ys[0].grad_fn.saved_tensors if t is not None}
    assert held == {cos.data_ptr(), sin.data_ptr()}


def test_gradients_of_one_element(path: Path) -> None:
    """`sum().backward()` gives one element with strides of 0."""
    ours = inputs(path.device)
    compare(*ours, dys=[torch.ones((), device=path.device).expand(x.shape) for x in ours[:2]])


@pytest.mark.parametrize("interleaved", [False, True])
def test_first_and_second_derivatives_in_float64(interleaved: bool, path: Path) -> None:
    q, k = (drawn(1, heads, 2, 5, dtype=torch.float64, device=path.device).requires_grad_() for heads in (2, 1))
    others = (*tables(2, 4, dtype=torch.float64, device=path.device), interleaved)

    def f(*x: torch.Tensor) -> Any:
        return rope(*x, *others)

    assert torch.autograd.gradcheck(f, (q, k), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (q, k))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which is what is tested
@pytest.mark.parametrize("retained", [(), ("q_rot", "k_rot")], ids=str)
def test_create_graph_gives_a_differentiable_gradient(retained: tuple, path: Path) -> None:
    """Of what is linear: its gradient depends on that of the outputs alone."""
    ours, theirs = inputs(path.device), inputs(path.device)
    kept = ro.Retained(*retained) if retained else None
    ys, (want, values) = rope(*ours, retain=kept), eager(ROPE, theirs)
    dys, others = ([dy.requires_grad_() for dy in gradients(ys)] for _ in "ab")
    torch.autograd.backward(ys, dys, create_graph=True)
    torch.autograd.backward(want, others, create_graph=True)
    pairs = [*zip(ours[:2], theirs[:2], strict=True), *((kept[name].tensor, values[name]) for name in retained)]
    for side in (0, 1):
        assert all(pair[side].grad.requires_grad for pair in pairs)
        sum((pair[side].grad ** 2).sum() for pair in pairs).backward()
    for mine, other in [*pairs, *zip(dys, others, strict=True)]:
        assert_near(mine.grad, other.grad, 4)
        mine.grad = other.grad = None  # they refer to the graph, and it to them
    for value in values.values():
        value.grad = None


def test_autocast_is_as_for_the_eager_expression(path: Path) -> None:
    q, k, cos, sin, *flags = inputs(path.device)
    eye = torch.eye(q.shape[-1], device=path.device)
    with torch.autocast(path.device, torch.bfloat16):
        ys, want = rope(q @ eye, k @ eye, cos, sin, *flags), eager(ROPE, [q @ eye, k @ eye, cos, sin, *flags])[0]
    for y, w in zip(ys, want, strict=True):
        assert y.dtype == w.dtype == torch.bfloat16
        assert_near(y, w)


# Statistics and buffers.


@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_statistics_are_those_of_the_gradient(over: str, kernels: Path) -> None:
    names = ["l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad"] + ["hist"] * (over == "tensor")
    given = inputs(kernels.device)
    kept = ro.Retained(**{p.name: ro.Stats(*names, over=over, grad=True) for p in ROPE.points})
    ys = rope(*given, retain=kept)
    dys = gradients(ys)
    torch.autograd.backward(ys, dys)
    for slot, y, dy in zip(kept.values(), ys, dys, strict=True):
        assert torch.equal(slot.grad, dy)
        want = ro.Retained(c=ro.Stats(*names, over=over))
        ro.point(y.detach().requires_grad_(), "c", retain=want).backward(dy)
        for name in names:
            theirs = getattr(want.c, name)
            torch.testing.assert_close(getattr(slot, name).to(theirs.dtype), theirs, rtol=1e-5, atol=1e-5)


def test_a_value_is_computed_for_the_point_that_asks_alone(kernels: Path) -> None:
    """act_grad needs the output's value, which backward makes again from q."""
    given = inputs(kernels.device)
    kept = ro.Retained(q_rot=ro.Stats("act_grad"), k_rot=ro.Stats("l2"))
    ys = rope(*given, retain=kept)
    dys = gradients(ys)
    torch.autograd.backward(ys, dys)
    torch.testing.assert_close(kept.q_rot.act_grad, (ys[0].detach() * dys[0]).sum())
    torch.testing.assert_close(kept.k_rot.l2, dys[1].norm())


def test_a_buffer_and_adding_into_it(kernels: Path) -> None:
    given = inputs(kernels.device)
    buffer = torch.full(given[1].shape, 2.0, device=kernels.device)
    ys = rope(*given, retain=ro.Retained("q_rot", k_rot=ro.Into(buffer, accumulate=True)))
    dys = gradients(ys)
    torch.autograd.backward(ys, dys)
    assert torch.equal(buffer, dys[1] + 2)


# Compiled.


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled_with_retention(interleaved: bool, compiler: None) -> None:
    ours = inputs(interleaved=interleaved)
    theirs, kept, want = clones(ours), all_points(ROPE), all_points(ROPE)
    outputs = [torch.compile(rope, fullgraph=True, backend="aot_eager")(*ours, retain=kept), rope(*theirs, retain=want)]
    for ys in outputs:
        torch.autograd.backward(ys, gradients(ys))
    for a, b in zip(*outputs, strict=True):
        assert_near(a, b)
    for a, b in zip((*ours[:2], *kept.values()), (*theirs[:2], *want.values()), strict=True):
        assert_near(a.grad, b.grad, 2)
