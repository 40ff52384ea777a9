"""add_rms_norm and add_layer_norm: two inputs that become one sum, and two outputs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import retainops as ro
from retainops.ops import _norm
from retainops.ops.norm import layer_norm, rms_norm
from retainops.points import unretained
from retainops.registry import Op
from tests.conftest import Path
from tests.norm_cases import SUMS, compare, differentiate, drawn, inputs_of, launched, over_sums
from tests.oracle import all_points, assert_near, clones, eager, leaves


@over_sums
@pytest.mark.parametrize("used", [0, 1])
def test_either_output_alone(op: Op, used: int, path: Path) -> None:
    ours, kept = inputs_of(op, 5, 30, device=path.device), all_points(op)
    theirs = clones(ours)
    y = op.call(*ours, retain=kept)[used]
    want, values = eager(op, theirs)
    want[used].backward(differentiate(y)[0])
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert_near(a.grad, b.grad, 4)
    for name, slot in kept.items():
        assert (slot.grad is None) == (values[name].grad is None), name
        if slot.grad is not None:
            assert_near(slot.grad, values[name].grad, 4)


@over_sums
def test_statistics_and_a_buffer_of_the_sum_alone(op: Op, path: Path) -> None:
    """Where the norm is not differentiated."""
    ours, buffer = inputs_of(op, 5, 30, device=path.device), torch.ones(5, 30, device=path.device)
    for want in (ro.Stats("l2", "act_grad"), ro.Into(buffer, accumulate=True)):
        kept = ro.Retained(summed=want)
        _, summed = op.call(*ours, retain=kept)
        (dy,) = differentiate(summed)
        if isinstance(want, ro.Stats):
            torch.testing.assert_close(kept.summed.l2, dy.norm())
            torch.testing.assert_close(kept.summed.act_grad, (dy * summed).sum())
        else:
            torch.testing.assert_close(buffer, 1 + dy)


@over_sums
def test_what_comes_to_the_sum_in_a_second_backward_comes_once(op: Op, kernels: Path) -> None:
    """A penalty on the gradient of one output, and a loss of the other one."""
    found = []
    for backend in ("triton", "reference"):
        ours, kept = inputs_of(op, 3, 5, dtype=torch.float64, device=kernels.device), ro.Retained("summed", "xhat")
        with ro.backend(backend):
            y, summed = op.call(*ours, retain=kept)
        (dx,) = torch.autograd.grad(y.square().sum(), ours[0], create_graph=True)
        (dx.square().sum() + summed.sin().sum()).backward()
        found.append([t.grad for t in (*leaves(ours), *kept.values())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@over_sums
def test_second_derivatives_of_the_weight_alone(op: Op, path: Path) -> None:
    """Of a sum of constants: nothing comes back to it."""
    x, residual, weight, *rest = inputs_of(op, 3, 5, dtype=torch.float64, device=path.device)
    inputs = x.detach(), residual.detach(), weight, *(t.detach() if isinstance(t, torch.Tensor) else t for t in rest)
    factor = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(path.device)
    factor.requires_grad_()
    found = []
    for y in (op.call(*inputs)[0], op.reference(*inputs, unretained)[0]):
        (dw,) = torch.autograd.grad((y * factor).sum(), weight, create_graph=True)
        found.append([dw, *torch.autograd.grad(dw.sin().sum(), [weight, factor], allow_unused=True)])
        assert not torch.autograd.grad(y.sum(), weight, create_graph=True)[0].requires_grad
    torch.testing.assert_close(*found)


@over_sums
def test_a_tensor_and_itself(op: Op, path: Path) -> None:
    x, _, *rest = inputs_of(op, 5, 30, device=path.device)
    theirs = clones([x, *rest])
    dys = differentiate(op.call(x, x, *rest))
    differentiate(op.reference(theirs[0], *theirs, unretained), dys)
    assert_near(x.grad, theirs[0].grad, 4)


@over_sums
def test_the_two_gradients_are_two_tensors(op: Op, path: Path) -> None:
    x, residual, *rest = inputs_of(op, 5, 30, device=path.device)
    differentiate(op.call(x, residual, *rest))
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()
    x.grad.zero_()
    assert residual.grad.all()


@over_sums
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_sums_of_two_dtypes(op: Op, dtypes: tuple, path: Path) -> None:
    x, residual, *rest = inputs_of(op, 5, 65, device=path.device)
    ours = [x.detach().to(dtypes[0]).requires_grad_(), residual.detach().to(dtypes[1]).requires_grad_(), *rest]
    theirs = clones(ours)
    outputs, want = op.call(*ours), op.reference(*theirs, unretained)
    assert [y.dtype for y in outputs] == [torch.float32] * 2
    differentiate(want, differentiate(outputs))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 4)


@over_sums
def test_the_norm_is_that_of_the_rounded_sum(op: Op, kernels: Path) -> None:
    x, residual, *rest = inputs_of(op, 5, 65, device=kernels.device, dtype=torch.bfloat16)
    y, summed = op.call(x, residual, *rest)
    norm = layer_norm if op is SUMS[1] else rms_norm
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, norm(summed, *rest))


@over_sums
@pytest.mark.parametrize("shapes", [((30,), (5, 30)), ((5, 1), (1, 30)), ((5, 30), ())], ids=str)
def test_sums_that_broadcast(op: Op, shapes: tuple, kernels: Path) -> None:
    _, _, *rest = inputs_of(op, 5, 30, device=kernels.device)
    ours = [*(drawn(*shape, device=kernels.device, seed=i) for i, shape in enumerate(shapes)), *rest]
    theirs, kept = clones(ours), all_points(op)
    assert "x and residual are of different shapes" in ro.explain(op.call, *ours)
    with ro.backend("auto"):
        outputs = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    differentiate(want, differentiate(outputs))
    for a, b in zip([*leaves(ours), *kept.values()], [*leaves(theirs), *values.values()], strict=True):
        assert_near(a.grad, b.grad, 4)


@over_sums
def test_only_the_sum_is_kept_for_backward(op: Op, kernels: Path) -> None:
    """Neither part of it, nor the norm; also where the gradient of the sum is asked for."""
    for kept in (None, all_points(op)):
        x, residual, *rest = inputs_of(op, 5, 30, device=kernels.device)
        x, residual = x * 1, residual * 1
        y, summed = op.call(x, residual, *rest, retain=kept)
        loss = y.sum() + summed.sum()
        memory = [weakref.ref(t.untyped_storage()) for t in (x, residual, y)]
        saved = weakref.ref(summed.untyped_storage())
        del x, residual, y, summed
        gc.collect()
        assert [ref() for ref in memory] == [None] * 3
        assert saved() is not None
        loss.backward()


@over_sums
def test_more_shares_of_a_weights_gradient_than_are_added_at_once(
    op: Op, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of rows by the thousand, here of a few: a row a program."""
    monkeypatch.setattr(_norm, "BACKWARD", _norm.BACKWARD._replace(elements=16))
    compare(op, *inputs_of(op, 300, 16, device=kernels.device))
    inputs = inputs_of(op, 300, 16, device="cpu")
    launches = launched(lambda: differentiate(op.call(*inputs)))
    (adding,) = (args for name, _, args in launches if name == "sum_shares_kernel")
    assert adding["SHAPE"][0] > adding["BLOCK_M"]
