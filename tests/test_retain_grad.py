"""Conformance to `Tensor.retain_grad()`: for each of its properties, what a slot does. docs/retain_grad.md explains.

Counterparts of PyTorch's own tests (test/test_autograd.py) are named in the comments. Those about in-place changes of
the retained tensor (test_retain_grad_inplace, test_retains_grad_inplace_multiple_outputs,
test_retain_grad_inplace_over_view, CustomAutogradTest.HooksInplaceWithRetainsGrad) have none: a fused op's interior is
never handed out, so nobody can change it in place.
"""

from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near, sample


@pytest.fixture
def ab(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rand = random_leaves(path.device)
    return rand(3, 40), rand(3, 40)


# The example that circulates with wrong figures: a=1, b=2, c=a*b, d=sin(c).


@pytest.mark.parametrize("when", ["before the computation", "after it"])
def test_popular_example_in_eager(when: str) -> None:
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    if when == "before the computation":
        a.retain_grad()  # a is a leaf: this does nothing, wherever it stands
    c = a * b
    d = torch.sin(c)
    c.retain_grad()
    if when == "after it":
        a.retain_grad()
    d.backward()
    assert [a.grad.item(), b.grad.item(), c.grad.item()] == pytest.approx([-0.8323, -0.4161, -0.4161], abs=5e-5)
    assert not a.retains_grad


def test_popular_example_fused(path: Path) -> None:
    a = torch.tensor(1.0, requires_grad=True, device=path.device)
    b = torch.tensor(2.0, requires_grad=True, device=path.device)
    kept = ro.Retained("c")
    ro.mul_sin(a, b, retain=kept).backward()
    assert a.grad.item() == pytest.approx(2 * math.cos(2))
    assert b.grad.item() == pytest.approx(math.cos(2))
    assert kept.c.grad.item() == pytest.approx(math.cos(2))


# test_retain_grad, AutogradAPITests.RetainGrad


def test_accumulates_like_a_leaf(path: Path, ab: tuple) -> None:
    kept = ro.Retained("c")
    ro.mul_sin(*ab, retain=kept).sum().backward()
    first = kept.c.grad
    value = first.clone()
    ro.mul_sin(*ab, retain=kept).sum().backward()
    torch.testing.assert_close(kept.c.grad, 2 * value)
    kept.reset()
    assert kept.c.grad is None
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert torch.equal(kept.c.grad, value)


def test_two_uses_in_one_graph_add_up(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    (ro.mul_sin(a, b, retain=kept) + 2 * ro.mul_sin(b, a, retain=kept)).sum().backward()
    assert_near(kept.c.grad, 3 * torch.cos(a * b).detach(), 2)


def test_grad_is_contiguous_of_the_interiors_dtype_and_shares_no_memory(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b = rand(40, 3, dtype=torch.bfloat16), rand(3, 40, dtype=torch.float16)
    kept = ro.Retained("c")
    y = ro.mul_sin(a.t(), b, retain=kept)  # bfloat16 x float16 is float32
    y.sum().backward()
    grad = kept.c.grad
    assert grad.dtype == torch.float32 == kept.c.dtype
    assert grad.shape == kept.c.shape == (3, 40)
    assert grad.is_contiguous()
    grad.fill_(7)  # the caller's to change
    assert a.grad.max() < 7
    assert y.max() < 7


def test_a_slot_costs_no_memory_before_backward(path: Path, ab: tuple) -> None:
    kept = ro.Retained("c")
    ro.mul_sin(*ab, retain=kept)
    assert kept.c.tensor.untyped_storage().nbytes() == kept.c.tensor.element_size()
    assert kept.c.tensor.is_leaf


# The error, and its being checked before anything happens.


@contextlib.contextmanager
def grad_in_inference_mode() -> Iterator[None]:
    """Still no graph is made."""
    with torch.inference_mode(), torch.enable_grad():
        yield


@pytest.mark.parametrize("why", ["no input requires grad", "no_grad", "inference_mode", "grad in inference_mode"])
def test_error_where_no_gradient_arrives(path: Path, ab: tuple, why: str) -> None:
    a, b = (x.detach() for x in ab) if why == "no input requires grad" else ab
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    mode = {**modes, "grad in inference_mode": grad_in_inference_mode}.get(why, torch.enable_grad)
    kept = ro.Retained("c")
    with mode(), pytest.raises(RuntimeError, match="can't retain_grad on Tensor that has requires_grad=False"):
        ro.mul_sin(a, b, retain=kept)
    with mode(), pytest.raises(RuntimeError, match="can't retain_grad on Tensor that has requires_grad=False"):
        ro.point(a, "c", retain=kept)  # which may require grad itself: no graph would be made here all the same
    assert kept.c.shape is None


# test_retain_grad_cycle


def test_no_reference_cycle(path: Path, ab: tuple) -> None:
    gc.disable()
    try:
        kept = ro.Retained("c")
        y = ro.mul_sin(*ab, retain=kept)
        y.sum().backward()
        output, slot, leaf = weakref.ref(y), weakref.ref(kept.c), weakref.ref(kept.c.tensor)
        del y, kept
        assert (output(), slot(), leaf()) == (None, None, None)
    finally:
        gc.enable()


# test_retains_grad_can_always_observe_tensor_prehook, test_prehook_ordering, test_hook_edge_case_when_called_with_grad


def test_hooks_on_a_slot_see_the_gradient_and_change_only_what_is_retained(path: Path, ab: tuple) -> None:
    a, b = ab
    kept, seen = ro.Retained("c"), []
    y = ro.mul_sin(a, b, retain=kept)
    kept.c.tensor.register_hook(lambda g: seen.append(g.clone()))
    kept.c.tensor.register_hook(lambda g: 2 * g)
    y.sum().backward()
    assert_near(seen[0], torch.cos(a * b).detach())
    torch.testing.assert_close(kept.c.grad, 2 * seen[0])  # retained after every hook
    assert_near(a.grad, (torch.cos(a * b) * b).detach())  # what flows on is not the hook's to change


def test_hooks_survive_a_reset(path: Path, ab: tuple) -> None:
    kept, calls = ro.Retained("c"), []
    y = ro.mul_sin(*ab, retain=kept)
    kept.c.tensor.register_hook(lambda g: calls.append(1))
    y.sum().backward()
    kept.reset()
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert len(calls) == 2


def test_autograd_grad_lists_the_slot(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    y = ro.mul_sin(a, b, retain=kept)
    da, dc = torch.autograd.grad(y.sum(), [a, kept.c.tensor])
    assert_near(dc, torch.cos(a * b).detach())
    assert_near(da, (torch.cos(a * b) * b).detach())
    assert kept.c.grad is None  # as documented: only backward() fills a slot


# test_backward_with_nonleaf_inputs


def test_backward_with_inputs_fills_only_those(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    ro.mul_sin(a, b, retain=kept).sum().backward(inputs=[b, kept.c.tensor])
    assert a.grad is None
    assert_near(kept.c.grad, torch.cos(a * b).detach())
    kept.reset()
    ro.mul_sin(a, b, retain=kept).sum().backward(inputs=[a])
    assert kept.c.grad is None


def test_off_the_path_of_the_loss_stays_none(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    ro.mul_sin(a, b, retain=kept)
    (a * b).sum().backward()
    assert kept.c.grad is None


# test_tensor_grad_warnings: warnings are errors in this suite.


def test_reading_grad_warns_of_nothing(path: Path, ab: tuple) -> None:
    kept = ro.Retained("c")
    y = ro.mul_sin(*ab, retain=kept)
    assert kept.c.grad is None
    y.sum().backward()
    assert kept.c.grad is not None
    assert kept.c.tensor.grad is kept.c.grad


def test_create_graph(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    y = ro.mul_sin(a, b, retain=kept)
    (dc,) = torch.autograd.grad(y.sum(), kept.c.tensor, create_graph=True)
    (da,) = torch.autograd.grad(dc.sum(), a)
    assert_near(da, (-torch.sin(a * b) * b).detach(), 2)


# Checkpointing: the recomputed forward uses the same slot.


def test_non_reentrant_checkpoint(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    checkpoint(lambda a, b: ro.mul_sin(a, b, retain=kept), a, b, use_reentrant=False).sum().backward()
    assert_near(kept.c.grad, torch.cos(a * b).detach())
    assert_near(a.grad, (torch.cos(a * b) * b).detach())


def test_a_checkpoint_of_statistics_that_need_the_value(path: Path, ab: tuple) -> None:
    """What was saved may be unpacked once."""
    a, b = ab
    kept = ro.Retained(c=ro.Stats("act_grad"))

    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ro.point(ro.mul_sin(a, b, retain=kept), "d", retain=kept_d)

    kept_d = ro.Retained(d=ro.Stats("act_grad"))
    checkpoint(f, a, b, use_reentrant=False).sum().backward()
    c = (a * b).detach()
    torch.testing.assert_close(kept.c.act_grad, (c * c.cos()).sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kept_d.d.act_grad, c.sin().sum(), rtol=1e-4, atol=1e-3)


def test_reentrant_checkpoint_raises_as_retain_grad_does(path: Path, ab: tuple) -> None:
    def eager(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = a * b
        c.retain_grad()
        return torch.sin(c)

    def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ro.mul_sin(a, b, retain=ro.Retained("c"))

    for f in (eager, ours):  # the first forward of a reentrant checkpoint runs under no_grad
        with pytest.raises(RuntimeError, match="can't retain_grad"):
            checkpoint(f, *ab, use_reentrant=True)


def test_saved_tensor_hooks(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = ro.mul_sin(a, b, retain=kept)
    y.sum().backward()
    assert_near(kept.c.grad, torch.cos(a * b).detach())


def test_scaled_losses_scale_what_is_retained(path: Path, ab: tuple) -> None:
    """With torch.amp.GradScaler the loss is scaled, and so are retained gradients, as with retain_grad."""
    a, b = ab
    scaler = torch.amp.GradScaler(path.device, init_scale=8.0)
    kept = ro.Retained("c")
    scaler.scale(ro.mul_sin(a, b, retain=kept).sum()).backward()
    assert_near(kept.c.grad / scaler.get_scale(), torch.cos(a * b).detach())


def test_torch_func_raises_as_retain_grad_does(path: Path, ab: tuple) -> None:
    a, b = ab

    def eager(a: torch.Tensor) -> torch.Tensor:
        c = a * b
        c.retain_grad()
        return torch.sin(c).sum()

    for f in (eager, lambda a: ro.mul_sin(a, b, retain=ro.Retained("c")).sum()):
        with pytest.raises(RuntimeError):
            torch.func.grad(f)(a)


def test_a_second_backward_past_a_slot(path: Path) -> None:
    """Softmax keeps its result for backward; a slot gets what an identity behind that result would."""
    x = torch.tensor([[0.3, -0.5, 1.0, 0.2]], dtype=torch.float64, device=path.device)
    kept = ro.Retained("p")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    p = torch.softmax(theirs, -1)
    behind = p.view_as(p)
    behind.retain_grad()
    for y, inp in ((ro.softmax(ours, retain=kept), ours), (behind, theirs)):
        (dx,) = torch.autograd.grad((y**3).sum(), inp, create_graph=True)
        behind.grad = None
        dx.square().sum().backward()
    assert_near(ours.grad, theirs.grad)
    assert_near(kept.p.grad.detach(), behind.grad.detach())


@pytest.mark.parametrize("name", ["mul_sin", "rms_norm", "linear_cross_entropy"])
def test_the_first_call_of_a_layout_saves_nothing_but_its_own(path: Path, name: str) -> None:
    """What is found out about it once, on tensors that mean nothing, is no affair of hooks on saved tensors."""
    from retainops.ops import _plan
    from retainops.registry import find

    def packed(t: torch.Tensor) -> torch.Tensor:
        assert not t.is_meta
        return t

    for around in (torch.autograd.graph.saved_tensors_hooks(packed, packed), torch.autograd.graph.save_on_cpu()):
        _plan._plan.cache_clear()
        with around:
            inputs = sample(name, path.device)
            find(name).call(*inputs).sum().backward()
    _plan._plan.cache_clear()
    checkpoint(find(name).call, *sample(name, path.device), use_reentrant=False).sum().backward()


def test_the_default_dtype_may_change(path: Path) -> None:
    @ro.fuse_pointwise
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 1.0, 2.0) * x

    x = torch.ones(3, dtype=torch.bfloat16, device=path.device)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            assert f(x).dtype == (torch.where(x > 0, 1.0, 2.0) * x).dtype == dtype
    finally:
        torch.set_default_dtype(before)
