"""attention where autograd, autocast, checkpointing or the caller do something out of the ordinary."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import retainops as ro
from tests.attention_cases import CASES, CAUSAL, SMALL, drawn, loss_of, run_eager, truth

Tensor = torch.Tensor


@pytest.mark.parametrize(
    ("keywords", "masked"),
    [
        ({}, False),
        ({"is_causal": True}, False),
        ({}, True),
        ({"softcap": 1.5}, False),
        ({"softcap": 2.0, "window": 1}, True),
    ],
    ids=str,
)
def test_second_derivatives(keywords: dict[str, Any], masked: bool) -> None:
    """Of the output by its inputs, and of what is retained. (PyTorch's own kernel has none.)"""
    q, k, v = (drawn(1, 2, 3, 2, seed=i) for i in range(3))
    mask = drawn(3, 3, seed=3) if masked else None
    direction = drawn(1, 2, 3, 2, seed=4)

    def outputs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return ro.attention(q, k, v, mask, **keywords, retain=ro.Retained("s", "p"))

    def retained(q: Tensor, k: Tensor, v: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        kept = ro.Retained("s", "p")
        o = ro.attention(q, k, v, mask, **keywords, retain=kept)
        leaves = [kept.s.tensor, kept.p.tensor]
        return torch.autograd.grad((o * o * direction).sum(), leaves, create_graph=True)

    assert torch.autograd.gradcheck(outputs, (q, k, v, mask), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (q, k, v, mask), fast_mode=True)
    assert torch.autograd.gradcheck(retained, (q, k, v, direction), fast_mode=True)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("name", ["causal", "dead rows"])
def test_under_create_graph_the_gradients_are_the_same_and_differentiable(name: str, path: Any) -> None:
    case = CASES[name]
    q, k, v, mask = case.tensors(torch.float64, path.device)
    kept = ro.Retained("s", p=ro.Relevance("chefer"))
    o = ro.attention(q, k, v, mask, is_causal=case.causal, retain=kept)
    loss_of(o).backward(create_graph=True)
    true = truth(case, torch.float64, path.device)
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        torch.testing.assert_close(x.grad.detach(), true[name]["grad"])
    torch.testing.assert_close(kept.s.grad.detach(), true["s"]["grad"])
    chefer = (true["p"]["value"] * true["p"]["grad"]).relu().mean(1)
    torch.testing.assert_close(kept.p.chefer, chefer)
    assert kept.s.grad.requires_grad
    assert not kept.p.chefer.requires_grad
    for x in (q, k, v):
        x.grad = None  # a graph that leads back to itself would leak


def test_a_slot_alone_is_differentiated(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float64, path.device)
    kept = ro.Retained("p", "o")
    loss = loss_of(ro.attention(q, k, v, is_causal=True, retain=kept))
    (grad,) = torch.autograd.grad(loss, kept.p.tensor, retain_graph=True)
    true = truth(CAUSAL, torch.float64, path.device)
    torch.testing.assert_close(grad, true["p"]["grad"])
    (grad,) = torch.autograd.grad(loss, kept.o.tensor, create_graph=True)
    torch.testing.assert_close(grad.detach(), true["o"]["grad"])
    assert kept.p.grad is None


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_twice_adds_up(create_graph: bool, path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float64, path.device)
    kept = ro.Retained(s=ro.Stats("sum", "amax", "l2", over="keys"), p=ro.Relevance("legrad"))
    whole = ro.Retained("s", p=ro.Part(heads=1))
    for request in (kept, whole):
        loss = loss_of(ro.attention(q, k, v, is_causal=True, retain=request))
        loss.backward(retain_graph=True)
        loss.backward(create_graph=create_graph)
        loss_of(ro.attention(q, k, v, is_causal=True, retain=request)).backward()  # a second use
    true = truth(CAUSAL, torch.float64, path.device)
    ds, dp = true["s"]["grad"], true["p"]["grad"]
    torch.testing.assert_close(whole.s.grad.detach(), 3 * ds)
    torch.testing.assert_close(whole.p.grad.detach(), 3 * dp[:, 1:2])
    torch.testing.assert_close(kept.s.amax, ds.abs().amax(-2))
    torch.testing.assert_close(kept.s.l2, (3 * ds.square().sum(-2)).sqrt())
    torch.testing.assert_close(kept.p.legrad, 3 * dp.relu().mean((1, 2)))
    kept.reset()
    assert kept.p.legrad is None
    for x in (q, k, v):
        x.grad = None


def test_no_gradient_leaves_where_none_arrives(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    kept = ro.Retained("s", "p")
    o = ro.attention(q, k, v, retain=kept)

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> None:
            return None

    Stop.apply(o).backward()
    assert q.grad is None
    assert kept.s.grad is None
    assert kept.p.grad is None


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_inputs_are_cast_as_pytorch_does(softcap: float | None, masked: bool, path: Any) -> None:
    q, k, v, mask = CASES["added" if masked else "causal"].tensors(torch.float32, path.device)
    kept = ro.Retained("s", "p")
    with torch.autocast(path.device, dtype=torch.bfloat16):
        o = ro.attention(q, k, v, mask, softcap=softcap, retain=kept)
        if softcap is None:
            assert torch.equal(o, F.scaled_dot_product_attention(q, k, v, mask))
    loss_of(o).backward()
    narrow = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    other = ro.Retained("s", "p")
    again = ro.attention(*narrow, None if mask is None else mask.bfloat16(), softcap=softcap, retain=other)
    loss_of(again).backward()
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, again)
    for point in ("s", "p"):
        assert kept[point].grad.dtype == torch.bfloat16
        assert torch.equal(kept[point].grad, other[point].grad)
    for x, y in zip((q, k, v), narrow, strict=True):
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_second_derivatives_remember_autocast(softcap: float | None) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32)
    kept = ro.Retained("p")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = ro.attention(q, k, v, softcap=softcap, retain=kept)
    (grad,) = torch.autograd.grad(loss_of(o), kept.p.tensor, create_graph=True)
    assert grad.dtype == torch.bfloat16
    assert torch.autograd.grad(grad.float().sum(), v)[0].dtype == torch.float32


@pytest.mark.parametrize("keywords", [{"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_checkpointing_answers_once(keywords: dict[str, Any], path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    calls = []

    def block(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        calls.append(1)
        return ro.attention(q * 1.5, k, v, **keywords, retain=kept)

    plain, under = ro.Retained("s", p=ro.Relevance("chefer")), ro.Retained("s", p=ro.Relevance("chefer"))
    loss_of(block(q, k, v, plain)).backward()
    expected, q.grad = q.grad, None
    calls.clear()
    loss_of(checkpoint(block, q, k, v, under, use_reentrant=False)).backward()
    assert len(calls) == 2  # forward, and once more in backward
    assert torch.equal(q.grad, expected)
    # The kernel's own lse is not looked at under hooks: another one, of the same value.
    torch.testing.assert_close(under.s.grad, plain.s.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(under.p.chefer, plain.p.chefer, atol=1e-5, rtol=1e-5)


def test_saved_tensors_may_lie_elsewhere(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    kept = ro.Retained("p")
    with torch.autograd.graph.save_on_cpu():
        o = ro.attention(q, k, v, is_causal=True, retain=kept)
    loss_of(o).backward()
    torch.testing.assert_close(kept.p.grad, truth(CAUSAL, torch.float32)["p"]["grad"].float(), atol=1e-5, rtol=1e-5)


def test_an_input_changed_in_place_is_pytorchs_error(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    k2 = k * 1
    o = ro.attention(q, k2, v, retain=ro.Retained("p"))
    k2.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(o).backward()


def test_backward_twice_without_its_graph_is_pytorchs_error(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    loss = loss_of(ro.attention(q, k, v, retain=ro.Retained("p")))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_batched_gradients(path: Any) -> None:
    q, k, v, _ = SMALL.tensors(torch.float64, path.device)
    kept = ro.Retained("p")
    o = ro.attention(q, k, v, retain=kept)
    directions = torch.stack([drawn(*o.shape, seed=i).detach() for i in range(3)]).to(path.device)
    found = torch.autograd.grad(o, [v, kept.p.tensor], directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        each = torch.autograd.grad(o, [v, kept.p.tensor], direction, retain_graph=True)
        for x, y in zip(found, each, strict=True):
            torch.testing.assert_close(x[i], y)


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"dropout_p": 1e-30}], ids=str)
def test_values_alone_require_grad(keywords: dict[str, Any]) -> None:
    """What is asked of the scores is answered, by the definition too."""
    q, k, v, _ = SMALL.tensors(torch.float64)
    wanted = ro.Retained("s", "p")
    loss_of(ro.attention(q, k, v, **keywords, retain=wanted)).backward()
    for create_graph in (False, True):
        kept = ro.Retained("s", "p")
        loss_of(ro.attention(q.detach(), k.detach(), v, **keywords, retain=kept)).backward(create_graph=create_graph)
        for name, slot in kept.items():
            torch.testing.assert_close(slot.grad.detach(), wanted[name].grad)
    v.grad = None  # a graph that leads back to itself would leak


def test_transforms_and_forward_mode() -> None:
    """Softcap and window through the definition; the rest is PyTorch's own affair."""
    q, k, v, _ = SMALL.tensors(torch.float64)
    q, k, v = (t.detach() for t in (q, k, v))

    def capped(q: Tensor) -> Tensor:
        return ro.attention(q, k, v, softcap=2.0, window=1)

    jacobian = torch.func.jacrev(capped)(q)
    torch.testing.assert_close(torch.func.jacfwd(capped)(q), jacobian)
    kept = ro.Retained("p")
    with pytest.raises(RuntimeError, match=re.escape("attention: retain= inside a torch.func transform")):
        torch.func.grad(lambda q: ro.attention(q, k, v, retain=kept).sum())(q)


def test_eager_itself_is_what_the_tests_say() -> None:
    """The tests' own definition, by PyTorch's function."""
    for case in (CAUSAL, CASES["dead rows"], CASES["grouped"]):
        q, k, v, mask = case.tensors(torch.float64)
        theirs = F.scaled_dot_product_attention(q, k, v, mask, is_causal=case.causal, enable_gqa=case.gqa)
        torch.testing.assert_close(run_eager(case, torch.float64, torch.float64)["o"]["value"], theirs.detach())


def test_tracing_fake_and_meta_tensors_see_pytorchs_own_operations() -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t.detach()).requires_grad_() for t in (q, k, v)]
        for keywords in ({"is_causal": True}, {"softcap": 2.0, "window": 3}):
            kept = ro.Retained("s", p=ro.Part(heads=0))
            ro.attention(*fakes, **keywords, retain=kept).sum().backward()
            assert kept.s.grad.shape == (2, 2, 33, 33)
            assert kept.p.grad.shape == (2, 1, 33, 33)
    for keywords in ({}, {"softcap": 2.0}):
        kept = ro.Retained("p")
        ro.attention(
            *(t.detach().to("meta").requires_grad_() for t in (q, k, v)), **keywords, retain=kept
        ).sum().backward()
        assert kept.p.grad.shape == (2, 2, 33, 33)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda q: ro.attention(q, k, v, softcap=2.0, window=3))(q)
    torch.testing.assert_close(traced(q), ro.attention(q, k, v, softcap=2.0, window=3))
