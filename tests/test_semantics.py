"""The table "Semantics that every op keeps, on every path", row by row, over the registry."""

from __future__ import annotations

import re
import threading

import pytest
import torch

from retainops.registry import find
from tests.conftest import Path
from tests.oracle import (
    DTYPES,
    OPS,
    all_points,
    assert_near,
    clones,
    eager,
    is_float,
    leaves,
    random_like,
    refusal,
    sample,
)

pytestmark = pytest.mark.parametrize("name", OPS)


@pytest.fixture
def inputs(path: Path, name: str, request: pytest.FixtureRequest) -> list:
    return sample(name, path.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retention_changes_no_bit_of_any_other_gradient(path: Path, name: str, dtype: torch.dtype) -> None:
    op, inputs = find(name), sample(name, path.device, dtype)
    plain = op.call(*inputs)
    dy = random_like(plain)
    without = torch.autograd.grad(plain, leaves(inputs), dy)
    kept = all_points(op)
    retained = op.call(*inputs, retain=kept)
    with_ = torch.autograd.grad(retained, leaves(inputs), dy)
    assert torch.equal(plain, retained)
    for before, after in zip(without, with_, strict=True):
        assert torch.equal(before, after)
        assert before.stride() == after.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gradients_and_points_are_eagers(path: Path, name: str, dtype: torch.dtype) -> None:
    op, ours = find(name), sample(name, path.device, dtype)
    theirs = clones(ours)
    kept = all_points(op)
    y = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    # Against eager in the same dtype; eager rounds c to bf16 where the kernel does not, hence the wide bound there:
    # the sharp comparison, against float64, is `retainops check`.
    scale = 1 if dtype in (torch.float32, torch.float64) else 16
    assert_near(y, want, scale)
    dy = random_like(y)
    y.backward(dy)
    want.backward(dy)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, scale)
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad, scale)
        assert kept[point].grad.is_contiguous()


def test_inputs_are_never_written_to(path: Path, name: str, inputs: list[torch.Tensor]) -> None:
    op = find(name)
    before = [(x.detach().clone(), x._version) for x in leaves(inputs)]
    y = op.call(*inputs, retain=all_points(op))
    dy = random_like(y)
    held = dy.clone(), y.detach().clone()
    y.backward(dy)
    for x, (value, version) in zip(leaves(inputs), before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(dy, held[0])
    assert torch.equal(y, held[1])


def test_second_backward_with_retain_graph_is_right(path: Path, name: str, inputs: list[torch.Tensor]) -> None:
    op, kept = find(name), all_points(find(name))
    y = op.call(*inputs, retain=kept)
    dy = random_like(y)
    y.backward(dy, retain_graph=True)
    first = [x.grad.clone() for x in leaves(inputs)]
    point = {n: s.grad.clone() for n, s in kept.items()}
    y.backward(dy)
    for x, g in zip(leaves(inputs), first, strict=True):
        assert torch.equal(x.grad, 2 * g)
    for n, s in kept.items():
        assert torch.equal(s.grad, 2 * point[n])


@pytest.mark.parametrize("order", ["z + op(x)", "op(x) + z"])
def test_sums_with_the_output_in_both_orders(path: Path, name: str, inputs: list, order: str) -> None:
    op, theirs = find(name), clones(inputs)
    seen: list[torch.Tensor] = []
    z = torch.ones(1, device=path.device)

    def loss(y: torch.Tensor) -> torch.Tensor:
        y.register_hook(seen.append)
        total = z + y if order == "z + op(x)" else y + z
        return (total * total).sum() + y.sum()

    kept = all_points(op)
    loss(op.call(*inputs, retain=kept)).backward()
    want, values = eager(op, theirs)
    loss(want).backward()
    for x, t in zip(leaves(inputs), leaves(theirs), strict=True):
        assert_near(x.grad, t.grad, 4)
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad, 4)
    assert_near(seen[0], seen[1], 4)  # what a hook captured was not written over afterwards


@pytest.mark.parametrize("how", ["sum", "mean over rows", "expand", "transposed"])
def test_gradients_of_any_layout(path: Path, name: str, inputs: list[torch.Tensor], how: str) -> None:
    op, theirs, kept = find(name), clones(inputs), all_points(find(name))

    def loss(y: torch.Tensor) -> torch.Tensor:
        if how == "sum":
            return y.sum()  # backward gets one element with strides of 0
        if how == "mean over rows":
            return (y.mean(0) ** 2).sum()
        if how == "expand":
            return (y.expand(3, *y.shape) * 0.5).sum()
        return (y.t() * torch.arange(y.shape[0], device=y.device, dtype=y.dtype)).sum()

    loss(op.call(*inputs, retain=kept)).backward()
    want, values = eager(op, theirs)
    loss(want).backward()
    for x, t in zip(leaves(inputs), leaves(theirs), strict=True):
        assert_near(x.grad, t.grad, 4)
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad, 4)


def test_zero_dim_tensors_and_gradients(path: Path, name: str) -> None:
    op = find(name)
    ours = sample(name, path.device, shape=())
    theirs, kept = clones(ours), all_points(op)
    if refused := refusal(op, ours):  # halves of no dims
        with pytest.raises(refused):
            op.call(*ours, retain=kept)
        return
    op.call(*ours, retain=kept).backward()
    want, values = eager(op, theirs)
    want.backward()
    for x, t in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(x.grad, t.grad)
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad)


def test_no_elements(path: Path, name: str) -> None:
    op = find(name)
    ours = sample(name, path.device, shape=(0, 5))
    theirs, kept = clones(ours), all_points(op)
    y = op.call(*ours, retain=kept)
    assert y.shape == (0, 5)
    y.sum().backward()
    want, values = eager(op, theirs)
    want.sum().backward()
    for x, t in zip(leaves(ours), leaves(theirs), strict=True):
        assert x.grad.shape == t.grad.shape
    for point, value in values.items():
        assert kept[point].grad.shape == value.grad.shape


def test_first_and_second_derivatives_in_float64(path: Path, name: str) -> None:
    op = find(name)
    ours = sample(name, path.device, torch.float64, (3, 4))
    assert torch.autograd.gradcheck(op.call, ours, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op.call, ours)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which is what is tested
def test_create_graph_gives_a_differentiable_gradient_at_every_point(path: Path, name: str, inputs: list) -> None:
    op, theirs, kept = find(name), clones(inputs), all_points(find(name))
    y = op.call(*inputs, retain=kept)
    dy, dy2 = (random_like(y).requires_grad_() for _ in "ab")  # some gradients depend on dy alone
    y.backward(dy, create_graph=True)
    # A point's second-order part is that of a zero added there. (retain_grad's own is the same, but where autograd
    # happens to save the point as an operation's output and writes that operation's derivative by it, as tanh's.)
    values = {}

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        values[name] = torch.zeros_like(value).requires_grad_()
        return value + values[name]

    want = op.reference(*theirs, point)
    want.backward(dy2, create_graph=True)
    assert all(x.grad.requires_grad for x in leaves(inputs))
    assert all(slot.grad.requires_grad for slot in kept.values())

    # A second backward, through the first one's gradients: it adds its part to every .grad, the points' included.
    for tensors, retained in (
        (leaves(inputs), [s.grad for s in kept.values()]),
        (leaves(theirs), [v.grad for v in values.values()]),
    ):
        total = sum((x.grad**2).sum() for x in tensors) + sum((g**3).sum() for g in retained)
        total.backward()
    assert_near(dy.grad, dy2.grad, 8)
    for x, t in zip(leaves(inputs), leaves(theirs), strict=True):
        assert_near(x.grad, t.grad, 8)
        x.grad = t.grad = None  # they refer to the graph, and it to them
    for point, value in values.items():
        assert_near(kept[point].grad, value.grad, 8)
        value.grad = None
    kept.reset()


def test_backward_twice_without_retain_graph_is_pytorchs_error(path: Path, name: str, inputs: list) -> None:
    y = find(name).call(*inputs, retain=all_points(find(name)))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_in_place_change_of_an_input_is_pytorchs_error_or_changes_nothing(path: Path, name: str, inputs: list) -> None:
    """An error if backward reads the input; an op may need to read less of them than eager does, or more."""
    op = find(name)
    right = clones(inputs)
    op.call(*right).sum().backward()
    for i, x in enumerate(inputs):
        if not is_float(x):
            continue
        given = clones(inputs)
        x = given[i].detach()  # of the same memory, and version
        y = op.call(*given)
        x.add_(1)
        try:
            y.sum().backward()
        except RuntimeError as e:
            assert re.search("modified.* inplace", str(e))  # noqa: PT017 - either outcome is right
            continue
        for ours, want in zip(leaves(given), leaves(right), strict=True):
            assert torch.equal(ours.grad, want.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stand_where_eager_has_them(path: Path, name: str, inputs: list, value: float) -> None:
    op = find(name)
    with torch.no_grad():
        inputs[0][0, 3] = value
        inputs[0][-1, -1] = value
    theirs, kept = clones(inputs), all_points(op)
    y = op.call(*inputs, retain=kept)
    want, values = eager(op, theirs)
    assert_near(y, want)
    dy = random_like(y)
    dy[2, 5] = value
    y.backward(dy)
    want.backward(dy)
    for x, t in zip(leaves(inputs), leaves(theirs), strict=True):
        assert_near(x.grad, t.grad, 4)
    for point, v in values.items():
        assert_near(kept[point].grad, v.grad, 4)


def test_autocast_is_as_for_the_eager_expression(path: Path, name: str, inputs: list) -> None:
    op, theirs = find(name), clones(inputs)
    with torch.autocast(path.device, torch.bfloat16):
        y = op.call(*map(through_matmul, inputs))
        want, _ = eager(op, list(map(through_matmul, theirs)))
    assert y.dtype == want.dtype == torch.bfloat16
    y.sum().backward()
    want.sum().backward()
    for x, t in zip(leaves(inputs), leaves(theirs), strict=True):
        assert x.grad.dtype == t.grad.dtype == torch.float32


def through_matmul(x: object) -> object:
    """Under autocast this gives bf16."""
    return x @ torch.eye(x.shape[-1], device=x.device) if is_float(x) else x


def test_two_runs_are_bitwise_equal(path: Path, name: str, inputs: list) -> None:
    op = find(name)
    runs = []
    for _ in range(2):
        ours, kept = clones(inputs), all_points(op)
        y = op.call(*ours, retain=kept)
        y.backward(random_like(y))
        runs.append([y, *(x.grad for x in leaves(ours)), *(s.grad for s in kept.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_threads_do_not_meet(path: Path, name: str) -> None:
    """A simulated GPU takes their launches in turn."""
    op, wrong = find(name), []

    def work(seed: int) -> None:
        ours = sample(name, path.device, shape=(7, 40))
        theirs, kept = clones(ours), all_points(op)
        for _ in range(10):
            y = op.call(*ours, retain=kept)
            y.backward(torch.full_like(y, float(seed)))
        want, values = eager(op, theirs)
        want.backward(torch.full_like(want, 10.0 * seed))
        for point, value in values.items():
            if not torch.allclose(kept[point].grad, value.grad, rtol=1e-5):
                wrong.append((seed, point))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_gradients_that_nobody_needs_are_not_computed(kernels: Path, name: str) -> None:
    op = find(name)
    for frozen, x in enumerate(sample(name, kernels.device)):
        if not is_float(x):
            continue
        inputs = sample(name, kernels.device)
        inputs[frozen].requires_grad_(False)
        y = op.call(*inputs)
        assert y.requires_grad == bool(leaves(inputs))
        if not y.requires_grad:  # its only input
            continue
        y.sum().backward()
        assert inputs[frozen].grad is None
        theirs = clones(inputs)
        eager(op, theirs)[0].sum().backward()
        for ours, want in zip(leaves(inputs), leaves(theirs), strict=True):
            assert_near(ours.grad, want.grad)
