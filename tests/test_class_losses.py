"""What cross_entropy and linear_cross_entropy keep of the table "Semantics that every op keeps", on every path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import retainops as ro
from retainops.points import unretained
from tests.class_loss_cases import OPS, TARGET, compare, inputs_of, over_losses, over_reductions
from tests.conftest import Path
from tests.oracle import DTYPES, all_points, assert_near, clones, eager, leaves, random_like

pytestmark = over_losses


@pytest.mark.parametrize(("dtype", "reduction"), [*((d, "none") for d in DTYPES), (torch.float32, "mean")], ids=str)
def test_loss_gradients_and_points_are_eagers(path: Path, name: str, dtype: torch.dtype, reduction: str) -> None:
    op, ours = OPS[name], inputs_of(name, path.device, dtype, reduction=reduction)
    theirs, kept = clones(ours), all_points(op)
    scale = 4 if dtype in (torch.float32, torch.float64) else 16  # eager rounds its interiors, too
    y = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    assert_near(y, want, scale)
    dy = random_like(y)
    y.backward(dy)
    want.backward(dy)
    compare(op, ours, theirs, kept, values, scale)


@pytest.mark.parametrize(("dtype", "reduction"), [(torch.bfloat16, "none"), (torch.float32, "mean")], ids=str)
def test_retention_changes_no_bit_of_any_other_gradient(
    path: Path, name: str, dtype: torch.dtype, reduction: str
) -> None:
    op, found = OPS[name], []
    for kept in (None, all_points(op), ro.Retained(logits=ro.Stats("l2", "act_grad", over="rows"))):
        inputs = inputs_of(name, path.device, dtype, reduction=reduction)
        y = op.call(*inputs, retain=kept)
        y.backward(random_like(y))
        found.append([y, *(x.grad for x in leaves(inputs))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert all(a.stride() == b.stride() for a, b in zip(found[0], found[1], strict=True))


def test_inputs_are_never_written_to(path: Path, name: str) -> None:
    op, inputs = OPS[name], inputs_of(name, path.device)
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    before = [(x.detach().clone(), x._version) for x in tensors]
    y = op.call(*inputs, retain=all_points(op))
    dy = random_like(y)
    held = dy.clone(), y.detach().clone()
    y.backward(dy)
    assert all(torch.equal(x, value) and x._version == v for x, (value, v) in zip(tensors, before, strict=True))
    assert torch.equal(dy, held[0])
    assert torch.equal(y, held[1])


@over_reductions
def test_a_second_backward_is_right(path: Path, name: str, reduction: str) -> None:
    op, inputs, kept = OPS[name], inputs_of(name, path.device, reduction=reduction), all_points(OPS[name])
    y = op.call(*inputs, retain=kept)
    y.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves(inputs)], [s.grad.clone() for s in kept.values()]
    y.sum().backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(leaves(inputs), first[0], strict=True))
    assert all(torch.equal(s.grad, 2 * g) for s, g in zip(kept.values(), first[1], strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("order", ["z + op(x)", "op(x) + z"])
def test_sums_with_the_output_in_both_orders(path: Path, name: str, order: str) -> None:
    op, ours, kept, seen = OPS[name], inputs_of(name, path.device), all_points(OPS[name]), []
    theirs, z = clones(ours), torch.ones(1, device=path.device)

    def loss(y: torch.Tensor) -> torch.Tensor:
        y.register_hook(seen.append)
        total = z + y if order == "z + op(x)" else y + z
        return (total * total).sum() + y.sum()

    loss(op.call(*ours, retain=kept)).backward()
    want, values = eager(op, theirs)
    loss(want).backward()
    compare(op, ours, theirs, kept, values)
    assert_near(seen[0], seen[1], 4)  # what a hook captured was not written over afterwards


def test_gradients_captured_by_hooks_stay_as_they_were(path: Path, name: str) -> None:
    op, inputs, kept, seen = OPS[name], inputs_of(name, path.device), all_points(OPS[name]), []
    y = op.call(*inputs, retain=kept)
    for t in (y, *leaves(inputs), *(slot.tensor for slot in kept.values())):
        t.register_hook(lambda g: seen.append((g, g.clone())))
    for again in (True, True, False):
        y.sum().backward(retain_graph=again)
    assert len(seen) == 3 * (1 + len(leaves(inputs)) + len(kept))
    assert all(torch.equal(g, then) for g, then in seen)
    memory = {x.data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
    assert not memory & {g.data_ptr() for g, _ in seen}
    assert not memory & {x.grad.data_ptr() for x in leaves(inputs)}


def test_softmax_of_the_logits_before_and_another_loss_after(path: Path, name: str) -> None:
    """Whose backward reads them, or what it kept of them: a loss that writes over its logits breaks both."""
    op, ours = OPS[name], inputs_of(name, path.device)
    theirs = clones(ours)
    for inputs, loss in ((ours, op.call), (theirs, lambda *i: op.reference(*i, unretained))):
        first = inputs[0] * 1
        p = torch.softmax(first, -1)
        y = loss(first, *inputs[1:])
        z = first.exp()
        (p[..., 0].sum() + y.sum() + z.mean() + loss(first, *inputs[1:]).square().sum()).backward()
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [4, (1 << 16) + 1], ids=["in one program", "more rows"])
def test_a_mean_by_weights_of_0_is_nan(path: Path, name: str, rows: int, smoothing: float) -> None:
    """As in eager PyTorch, which adds the part that is smoothed to 0 / 0."""
    x = torch.ones(rows, 3, device=path.device, requires_grad=True)
    target, weight = torch.zeros(rows, dtype=torch.int64, device=path.device), x.new_tensor([0.0, 1.0, 2.0])
    layer = (torch.eye(3, device=path.device), target, None) if name == "linear_cross_entropy" else (target,)
    ours = OPS[name].call(x, *layer, weight, label_smoothing=smoothing)
    theirs = torch.nn.functional.cross_entropy(x, target, weight, label_smoothing=smoothing)
    assert ours.isnan()
    assert theirs.isnan()
    for loss in (ours, theirs):
        assert torch.autograd.grad(loss, x)[0].isnan().all()


def test_a_mean_by_weights_that_cancel_is_infinite(path: Path, name: str) -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 1.0]], device=path.device)
    target, weight = torch.tensor([0, 1], device=path.device), x.new_tensor([1.0, -1.0])
    layer = (torch.eye(2, device=path.device), target, None) if name == "linear_cross_entropy" else (target,)
    ours = OPS[name].call(x, *layer, weight)
    assert ours.isinf()
    assert ours == torch.nn.functional.cross_entropy(x, target, weight)


@pytest.mark.parametrize("how", ["sum", "mean over rows", "expand", "transposed"])
def test_gradients_of_any_layout(path: Path, name: str, how: str) -> None:
    op, ours, kept = OPS[name], inputs_of(name, path.device), all_points(OPS[name])
    theirs = clones(ours)

    def loss(y: torch.Tensor) -> torch.Tensor:
        if how == "sum":
            return y.sum()
        if how == "mean over rows":
            return (y.mean(0) ** 2).sum()
        if how == "expand":
            return (y.expand(3, *y.shape) * 0.5).sum()
        return (y.t() * torch.arange(y.shape[0], device=y.device, dtype=y.dtype)).sum()

    loss(op.call(*ours, retain=kept)).backward()
    want, values = eager(op, theirs)
    loss(want).backward()
    compare(op, ours, theirs, kept, values)


@over_reductions
@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 0)], ids=str)
def test_one_row_without_dims_and_no_rows(path: Path, name: str, rows: tuple, reduction: str) -> None:
    op, ours, kept = OPS[name], inputs_of(name, path.device, rows=rows, reduction=reduction), all_points(OPS[name])
    theirs = clones(ours)
    y = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    assert_near(y, want)
    if reduction == "mean" and 0 in rows:
        assert y.isnan()
    y.sum().backward()
    want.sum().backward()
    compare(op, ours, theirs, kept, values)


@over_reductions
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numbers_of_numpy(path: Path, name: str, reduction: str, kind: type) -> None:
    given, found = inputs_of(name, path.device, reduction=reduction), []
    first = TARGET[name] + (2 if name == "cross_entropy" else 3)
    index, _, *numbers = given[first : first + 5]
    for of_index, of_number in ((int, lambda x: float(kind(x))), (np.int64, kind)):
        ours = clones(given)
        ours[first : first + 5] = of_index(index), reduction, *map(of_number, numbers)
        y = OPS[name].call(*ours)
        y.sum().backward()
        found.append([y.detach(), *(t.grad for t in leaves(ours))])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@over_reductions
def test_all_rows_ignored(path: Path, name: str, reduction: str) -> None:
    op, ours, kept = OPS[name], inputs_of(name, path.device, reduction=reduction), all_points(OPS[name])
    ours[TARGET[name]].fill_(-100)
    theirs = clones(ours)
    y = op.call(*ours, retain=kept)
    assert y.isnan() if reduction == "mean" else torch.equal(y, torch.zeros_like(y))
    want, values = eager(op, theirs)
    y.sum().backward()
    want.sum().backward()
    compare(op, ours, theirs, kept, values)


@over_reductions
def test_first_and_second_derivatives_in_float64(path: Path, name: str, reduction: str) -> None:
    op, inputs = OPS[name], inputs_of(name, path.device, torch.float64, (2,), reduction)
    few = 4  # classes; and two columns of x
    if name == "cross_entropy":
        logits, target, weight, *others = inputs
        inputs = [logits[:, :few].detach().requires_grad_(), target.clamp(max=few - 1), weight[:few], *others]
    else:
        x, w, target, bias, weight, *others = inputs
        x, w, bias = (t.detach().requires_grad_() for t in (x[:, :2], w[:few, :2], bias[:few]))
        inputs = [x, w, target.clamp(max=few - 1), bias, weight[:few], *others[:-1], 1]
    floats = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]

    def f(*given: torch.Tensor) -> torch.Tensor:
        places = dict(zip(floats, given, strict=True))
        return op.call(*(places.get(i, x) for i, x in enumerate(inputs)))

    given = [inputs[i] for i in floats]
    assert torch.autograd.gradcheck(f, given, check_batched_grad=reduction == "none")
    assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which is what is tested
def test_create_graph_gives_a_differentiable_gradient_at_every_point(path: Path, name: str) -> None:
    op, ours, kept = OPS[name], inputs_of(name, path.device, torch.float64), all_points(OPS[name])
    theirs, values = clones(ours), {}
    y = op.call(*ours, retain=kept)
    dy, dy2 = (random_like(y).requires_grad_() for _ in "ab")
    y.backward(dy, create_graph=True)

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        values[name] = torch.zeros_like(value).requires_grad_()
        return value + values[name]

    op.reference(*theirs, point).backward(dy2, create_graph=True)
    assert all(x.grad.requires_grad for x in (*leaves(ours), *kept.values()))
    for tensors, retained in (
        (leaves(ours), [s.grad for s in kept.values()]),
        (leaves(theirs), [v.grad for v in values.values()]),
    ):
        (sum((x.grad**2).sum() for x in tensors) + sum((g**3).sum() for g in retained)).backward()
    assert_near(dy.grad, dy2.grad, 64)
    compare(op, ours, theirs, kept, values, 64)
    for x in (*leaves(ours), *leaves(theirs), *values.values()):
        x.grad = None  # they refer to the graph, and it to them
    kept.reset()


def test_in_place_change_of_an_input_is_pytorchs_error_or_changes_nothing(path: Path, name: str) -> None:
    op, right = OPS[name], inputs_of(name, path.device)
    op.call(*right).sum().backward()
    inputs = inputs_of(name, path.device)
    y = op.call(*inputs)
    inputs[0].detach().add_(1)
    try:
        y.sum().backward()
    except RuntimeError as e:
        assert "inplace operation" in str(e)  # noqa: PT017 - either outcome is right
        return
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves(inputs), leaves(right), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stand_where_eager_has_them(path: Path, name: str, value: float) -> None:
    op, ours, kept = OPS[name], inputs_of(name, path.device), ro.Retained("logits")
    with torch.no_grad():
        ours[0][0, 0, 3] = value  # a row that counts, and one that is ignored
        ours[0][0, 1, 4] = value
    theirs = clones(ours)
    y = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    assert_near(y, want, 4)
    y.sum().backward()
    want.sum().backward()
    compare(op, ours, theirs, kept, values, 8)


def test_autocast_is_as_for_the_eager_pair(path: Path, name: str) -> None:
    op, ours = OPS[name], inputs_of(name, path.device, reduction="mean")
    theirs = clones(ours)

    def step(inputs: list, loss: Callable[..., torch.Tensor]) -> torch.Tensor:
        with torch.autocast(path.device, torch.bfloat16):
            first = inputs[0] @ torch.eye(inputs[0].shape[-1], device=path.device)  # of bfloat16
            y = loss(first, *inputs[1:])
        y.backward()
        return y

    y, want = step(ours, op.call), step(theirs, lambda *i: op.reference(*i, unretained))
    assert y.dtype == want.dtype == torch.float32
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=0.01 * b.grad.abs().max().item())


def test_two_runs_are_bitwise_equal(path: Path, name: str) -> None:
    op, runs = OPS[name], []
    for _ in range(2):
        ours, kept = inputs_of(name, path.device), all_points(op)
        y = op.call(*ours, retain=kept)
        y.backward(random_like(y))
        runs.append([y, *(x.grad for x in leaves(ours)), *(s.grad for s in kept.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_that_nobody_needs_are_not_computed(path: Path, name: str) -> None:
    op = OPS[name]
    for frozen in leaves(inputs_of(name, path.device)):
        ours = inputs_of(name, path.device)
        same = next(x for x in leaves(ours) if x.shape == frozen.shape)
        same.requires_grad_(False)
        theirs, y = clones(ours), op.call(*ours)
        assert y.requires_grad == bool(leaves(ours))
        if y.requires_grad:
            y.sum().backward()
            eager(op, theirs)[0].sum().backward()
            assert same.grad is None
            for a, b in zip(leaves(ours), leaves(theirs), strict=True):
                assert_near(a.grad, b.grad, 4)
