"""What attention is asked for: buffers, chosen keys, several requests at once, and all of it under dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from tests.attention_cases import CASES, CAUSAL, SMALL, drawn, eager, loss_of, truth


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", ["dense", "transposed"])
def test_into_a_buffer(accumulate: bool, layout: str, path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    b, h, n, _ = CAUSAL.q
    buffers = [torch.full((b, n, h, n), 2.0, device=path.device).transpose(1, 2) for _ in range(2)]
    if layout == "dense":
        buffers = [buffer.contiguous() for buffer in buffers]
    kept = ro.Retained(s=ro.Into(buffers[0], accumulate=accumulate), p=ro.Into(buffers[1], accumulate=accumulate))
    loss_of(ro.attention(q, k, v, is_causal=True, retain=kept)).backward()
    true = truth(CAUSAL, torch.float32, path.device)
    for point, buffer in zip(("s", "p"), buffers, strict=True):
        torch.testing.assert_close(buffer, (true[point]["grad"] + 2 * accumulate).float(), atol=1e-5, rtol=1e-5)
        assert kept[point].grad is buffer


def test_chosen_keys_of_p_take_no_pass_over_whole_rows(monkeypatch: pytest.MonkeyPatch, path: Any) -> None:
    """Its gradient is do v^T, without p."""
    from retainops.ops import _asked

    passes, made = [], _asked._with_row_numbers
    monkeypatch.setattr(_asked, "_with_row_numbers", lambda *args: passes.append(1) or made(*args))
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    true = truth(CAUSAL, torch.float32, path.device)
    for name, count in (("p", 0), ("s", 1)):
        kept = ro.Retained(**{name: ro.Part(keys=[3, 0])})
        loss_of(ro.attention(q, k, v, is_causal=True, retain=kept)).backward()
        torch.testing.assert_close(kept[name].grad, true[name]["grad"][..., [3, 0]].float(), atol=1e-5, rtol=1e-5)
        assert len(passes) == count


def test_nested_requests_are_each_answered(path: Any) -> None:
    from retainops.ops.attention import attention_of

    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    requests = [
        ro.Retained("s", "o"),
        ro.Retained(s=ro.Part(heads=0), p=ro.Relevance("legrad")),
        ro.Retained(p=ro.Stats("l2", over="keys"), o=ro.Stats("l2")),
    ]
    alone = [ro.Retained("s", "o"), ro.Retained(s=ro.Part(heads=0), p=ro.Relevance("legrad"))]
    alone.append(ro.Retained(p=ro.Stats("l2", over="keys"), o=ro.Stats("l2")))
    loss_of(attention_of((q, k, v, None, 0.0, True, None, False, None, None), requests)).backward()
    for request, by_itself in zip(requests, alone, strict=True):
        loss_of(ro.attention(q, k, v, is_causal=True, retain=by_itself)).backward()
        for name, x in by_itself.state().items():
            assert torch.equal(request.state()[name], x), name


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("create_graph", [False, True])
def test_every_request_is_answered_once(create_graph: bool, path: Any) -> None:
    """The output's too, and where backward goes by the definition."""
    from retainops.ops.attention import attention_of

    q, k, v, _ = CAUSAL.tensors(torch.float64, path.device)
    true, buffer = truth(CAUSAL, torch.float64, path.device), torch.zeros_like(q)
    first = ro.Retained("p", s=ro.Stats("l2"), o=ro.Stats("sum"))
    requests = [first, ro.Retained("s", p=ro.Part(heads=1)), ro.Retained(o=ro.Into(buffer, accumulate=True))]
    o = attention_of((q, k, v, None, 0.0, True, None, False, None, None), requests)
    loss_of(o).backward(create_graph=create_graph)
    torch.testing.assert_close(first.o.sum, true["o"]["grad"].sum())
    torch.testing.assert_close(buffer.detach(), true["o"]["grad"])
    torch.testing.assert_close(first.p.grad.detach(), true["p"]["grad"])
    torch.testing.assert_close(first.s.l2, true["s"]["grad"].norm())
    torch.testing.assert_close(requests[1].s.grad.detach(), true["s"]["grad"])
    torch.testing.assert_close(requests[1].p.grad.detach(), true["p"]["grad"][:, 1:2])
    for x, name in ((q, "q"), (k, "k"), (v, "v")):
        torch.testing.assert_close(x.grad.detach(), true[name]["grad"])
        x.grad = None


def test_batched_gradients_of_several_requests(path: Any) -> None:
    from retainops.ops.attention import attention_of

    q, k, v, _ = SMALL.tensors(torch.float64, path.device)
    requests = [ro.Retained("p"), ro.Retained("s")]
    o = attention_of((q, k, v, None, 0.0, False, None, False, None, None), requests)
    directions = torch.stack([drawn(*o.shape, seed=i).detach() for i in range(3)]).to(path.device)
    wanted = [requests[0].p.tensor, requests[1].s.tensor]
    found = torch.autograd.grad(o, wanted, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for x, y in zip(found, torch.autograd.grad(o, wanted, direction, retain_graph=True), strict=True):
            torch.testing.assert_close(x[i], y)


class TestDropout:
    """Retained scores and probabilities go by the definition. p is before dropout; its gradient has the factors."""

    def test_its_gradients(self, path: Any) -> None:
        q, k, v, _ = CAUSAL.tensors(torch.float64, path.device)
        kept = ro.Retained("s", "p", "o")
        torch.manual_seed(7)
        loss_of(ro.attention(q, k, v, dropout_p=0.4, is_causal=True, retain=kept)).backward()
        points = eager(CAUSAL, *(t.detach().requires_grad_() for t in (q, k, v)), None)
        torch.manual_seed(7)
        loss_of(F.dropout(points["p"], 0.4) @ v.detach()).backward()
        torch.testing.assert_close(kept.p.grad, points["p"].grad)
        torch.testing.assert_close(kept.s.grad, points["s"].grad)
        if path.device == "cpu":  # where PyTorch's function draws the same numbers
            torch.manual_seed(7)
            theirs = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4, is_causal=True)
            torch.manual_seed(7)
            torch.testing.assert_close(ro.attention(q, k, v, None, 0.4, True, retain=ro.Retained("p")), theirs)
        assert (kept.p.grad == 0).double().mean() > 0.2

    def test_other_forms(self) -> None:
        q, k, v, _ = CAUSAL.tensors(torch.float64)
        found = []
        for kept in (ro.Retained("s", "p"), ro.Retained(s=ro.Part(heads=1, keys=[0, 3]), p=ro.Relevance("chefer"))):
            torch.manual_seed(7)
            loss_of(ro.attention(q, k, v, dropout_p=0.4, retain=kept)).backward()
            found.append(kept)
        whole, forms = found
        torch.testing.assert_close(forms.s.grad, whole.s.grad[:, 1:, :, [0, 3]])
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        torch.testing.assert_close(forms.p.chefer, (p * whole.p.grad).relu().mean(1).detach())

    def test_the_output_alone_is_pytorchs_function(self, path: Any) -> None:
        q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
        outputs = []
        for kept in (None, ro.Retained("o")):
            torch.manual_seed(7)
            outputs.append(ro.attention(q, k, v, dropout_p=0.4, retain=kept))
        assert torch.equal(*outputs)

    def test_on_the_kernels_alone_it_is_an_error(self, kernels: Any) -> None:
        q, k, v, _ = CAUSAL.tensors(torch.float32, kernels.device)
        with pytest.raises(RuntimeError, match='attention: the backend is "triton".*dropout_p is not 0'):
            ro.attention(q, k, v, dropout_p=0.4, retain=ro.Retained("p"))


def test_copies_of_a_slot_have_its_relevance() -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32)
    kept = ro.Retained(p=ro.Relevance("chefer"), s=ro.Part(heads=0))
    loss_of(ro.attention(q, k, v, retain=kept)).backward()
    other = copy.deepcopy(kept)
    assert torch.equal(other.p.chefer, kept.p.chefer)
    assert set(kept.state()) == {"p.chefer", "s.grad"}
    assert "Relevance(chefer)" in repr(kept)
    assert "Part(heads=0)" in repr(kept)


def test_a_point_of_ones_own_can_be_asked_for_all_of_it() -> None:
    case = CASES["plain"]
    q, k, v, _ = case.tensors(torch.float64)
    true = truth(case, torch.float64)
    for want in (ro.Part(heads=1, queries=[3, 0]), ro.Relevance("chefer", "legrad"), ro.Stats("l2", over="heads")):
        kept = ro.Retained(p=want)
        p = ro.point((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), "p", retain=kept)
        loss_of(p @ v).backward()
        of_op = ro.Retained(p=want)
        loss_of(ro.attention(q, k, v, retain=of_op)).backward()
        for name, x in of_op.state().items():
            torch.testing.assert_close(kept.state()[name], x)
    assert true["p"]["grad"].shape == (2, 3, 37, 37)
