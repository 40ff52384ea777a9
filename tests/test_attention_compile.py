"""attention inside torch.compile(fullgraph=True): what is retained is what eager retains, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import retainops as ro
from tests.attention_cases import CASES, Case, loss_of

Tensor = torch.Tensor
WANTS: dict[str, dict[str, Any]] = {
    "gradients": {"s": None, "p": None, "o": None},
    "statistics": {
        "s": ro.Stats("l2", "mean", "nonfinite", "hist", grad=True),
        "p": ro.Stats("sum", "amax", over="keys"),
        "o": ro.Stats("l2", over="heads"),
    },
    "relevance": {"p": ro.Relevance("chefer", "legrad", "attn_grad"), "s": ro.Stats("amax", over="queries")},
    "parts": {"p": ro.Part(heads=-1, queries=[3, 0]), "s": ro.Part(keys=slice(0, 9, 2))},
    "a part and all": {"p": ro.Part(queries=-1), "s": None},
}
FEW = ("causal", "dead rows", "grouped", "softcap, added")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def request(wants: dict[str, Any]) -> ro.Retained:
    return ro.Retained(*(n for n, w in wants.items() if w is None), **{n: w for n, w in wants.items() if w is not None})


def both(case: Case, wants: dict[str, Any], backend: str = "aot_eager", dtype: torch.dtype = torch.float32) -> None:
    """Eager's state and compiled code's are equal."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kept: ro.Retained) -> Tensor:
        return ro.attention(q, k, v, mask, **case.keywords(), retain=kept)

    states = []
    for run in (call, torch.compile(call, fullgraph=True, backend=backend)):
        q, k, v, mask = case.tensors(dtype)
        kept = request(wants)
        o = run(q, k, v, mask, kept)
        loss_of(o).backward()
        states.append({**kept.state(), "o": o.detach(), "q": q.grad, "k": k.grad, "v": v.grad})
    eager, compiled = states
    assert eager.keys() == compiled.keys()
    for name, x in eager.items():
        assert x.dtype == compiled[name].dtype
        if backend == "aot_eager" or name[:2] != "o.":
            assert torch.equal(x, compiled[name]), name
        else:
            torch.testing.assert_close(compiled[name], x)


@pytest.mark.parametrize("what", WANTS)
@pytest.mark.parametrize("name", FEW)
def test_what_is_retained_is_eagers(name: str, what: str) -> None:
    both(CASES[name], WANTS[what])


def test_through_inductor() -> None:
    both(CASES["softcap, causal, grouped"], WANTS["relevance"], "inductor", torch.bfloat16)


@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}], ids=str)
def test_without_a_request(keywords: dict[str, Any]) -> None:
    q, k, v, _ = CASES["causal"].tensors(torch.float32)
    run = torch.compile(
        lambda *qkv: ro.attention(*qkv, is_causal=True, **keywords), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(q, k, v), ro.attention(q, k, v, is_causal=True, **keywords))
    if keywords:  # a function of ours, of which Dynamo takes no tensor twice
        assert torch.equal(run(q, q, q), ro.attention(q, q, q, is_causal=True, **keywords))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_under_autocast(softcap: float | None) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ro.attention(q, k, v, softcap=softcap, retain=kept)

    states = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        q, k, v, _ = CASES["causal"].tensors(torch.float32)
        kept = request(WANTS["a part and all"])
        loss_of(run(q, k, v, kept)).backward()
        states.append({**kept.state(), "q": q.grad, "v": v.grad})
    for name, x in states[0].items():
        if name in ("q", "v"):  # by tiles they are rounded once in eager, and as a bfloat16 tensor's in compiled code
            torch.testing.assert_close(states[1][name], x, atol=1e-2, rtol=1e-2)
        else:
            assert torch.equal(x, states[1][name]), name
    assert states[1]["s.grad"].dtype == torch.bfloat16


def test_two_layers_add_up_in_one_slot() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        return ro.attention(ro.attention(q, k, v, retain=kept), k, v, retain=kept)

    for want in (ro.Relevance("chefer", "legrad"), ro.Stats("amax", over="heads"), ro.Part(heads=0)):
        states = []
        for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            q, k, v, _ = CASES["plain"].tensors(torch.float64)
            kept = ro.Retained(p=want)
            for _ in range(2):
                loss_of(run(q, k, v, kept)).backward()
            states.append(kept.state())
        for name, x in states[0].items():
            torch.testing.assert_close(states[1][name], x)


def test_dtypes_that_eager_code_refuses() -> None:
    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    wide = k.detach().double()  # Dynamo asks for the .grad of what has one
    run = torch.compile(lambda *inputs: ro.attention(*inputs, softcap=2.0), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="q is torch.float32, k torch.float64 and v torch.float32"):
        run(q, wide, v)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attn_mask is torch.int64"):
        run(q, k, v, torch.ones(q.shape[-2], k.shape[-2], dtype=torch.int64))
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # which casts them
        expected = ro.attention(q, k, v, mask, softcap=2.0)
        torch.testing.assert_close(run(q, k, v, mask), expected, atol=1e-2, rtol=1e-2)


def test_shapes_may_change() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        return ro.attention(q, k, v, is_causal=True, retain=kept)

    run = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    wants = {"p": ro.Relevance("chefer"), "s": ro.Part(queries=[-1, 0])}
    for n in (6, 9, 17):
        case = Case((1, 2, n, 8), (1, 2, n, 8), (1, 2, n, 8), causal=True)
        states = []
        for each in (call, run):
            q, k, v, _ = case.tensors(torch.float32)
            kept = request(wants)
            loss_of(each(q, k, v, kept)).backward()
            states.append(kept.state())
        for name, x in states[0].items():
            assert torch.equal(x, states[1][name]), (n, name)


def test_dropout_goes_through_the_definition() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        return ro.attention(q, k, v, dropout_p=0.5, retain=kept)

    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    kept = ro.Retained("p")
    loss_of(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, kept)).backward()
    assert 0.3 < (kept.p.grad == 0).float().mean() < 0.7


@pytest.mark.parametrize(
    "want", [ro.Relevance("chefer", "legrad", "attn_grad"), ro.Part(heads=1), ro.Part(keys=[])], ids=str
)
def test_dropout_and_other_forms(want: Any) -> None:
    """By the definition's own taps; dropout of nothing but a rounding, so that eager has the same."""

    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained, p: float) -> Tensor:
        return ro.attention(q, k, v, dropout_p=p, retain=kept)

    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    kept, eager = ro.Retained(p=want), ro.Retained(p=want)
    loss_of(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, kept, 1e-30)).backward()
    loss_of(call(q, k, v, eager, 0.0)).backward()
    for name, x in eager.state().items():
        torch.testing.assert_close(kept.state()[name], x)


def test_autocast_around_backward_is_none_of_its_business() -> None:
    states = []
    for autocast in (False, True):
        q, k, v, _ = CASES["causal"].tensors(torch.float32)
        kept = ro.Retained("s", p=ro.Relevance("chefer"))
        o = torch.compile(lambda *qkv, kept: ro.attention(*qkv, retain=kept), fullgraph=True, backend="aot_eager")(
            q, k, v, kept=kept
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss_of(o).backward()
        states.append(kept.state())
    for name, x in states[0].items():
        assert torch.equal(states[1][name], x), name


def test_the_softcap_may_change() -> None:
    run = torch.compile(
        lambda *qkv, cap, kept: ro.attention(*qkv, softcap=cap, retain=kept), fullgraph=True, backend="aot_eager"
    )
    for cap in (3.0, 4.0, 5.0):
        q, k, v, _ = CASES["causal"].tensors(torch.float32)
        kept, eager = ro.Retained("s"), ro.Retained("s")
        loss_of(run(q, k, v, cap=cap, kept=kept)).backward()
        loss_of(ro.attention(q, k, v, softcap=cap, retain=eager)).backward()
        torch.testing.assert_close(kept.s.grad, eager.s.grad)


def test_the_backend_is_that_of_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    from retainops.ops import _attention_compiled as ops

    heard, answers = [], ops.answers
    monkeypatch.setattr(ops, "answers", lambda *args: heard.append(args[-1]) or answers(*args))
    q, k, v, _ = CASES["causal"].tensors(torch.float32)
    for backend in ("reference", "auto"):
        torch._dynamo.reset()
        run = torch.compile(lambda *qkv, kept: ro.attention(*qkv, retain=kept), fullgraph=True, backend="aot_eager")
        with ro.backend(backend):
            o = run(q, k, v, kept=ro.Retained("p"))
        loss_of(o).backward()
    assert heard == [False, True]


def test_into_a_buffer() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, kept: ro.Retained) -> Tensor:
        return ro.attention(q, k, v, retain=kept)

    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    buffer, whole = torch.full((2, 3, 37, 37), 7.0), ro.Retained("p")
    loss_of(call(q, k, v, whole)).backward()
    kept = ro.Retained(p=ro.Into(buffer))
    loss_of(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v, kept)).backward()
    assert torch.equal(buffer, whole.p.grad)
    assert kept.p.grad is buffer


def test_no_gradient_is_an_error_of_ours() -> None:
    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    kept = ro.Retained("p")
    run = torch.compile(lambda q, k, v: ro.attention(q, k, v, retain=kept), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="can't retain_grad on point 'p'"):
        run(q.detach(), k.detach(), v.detach())


def test_a_part_out_of_range_is_an_error_of_ours() -> None:
    q, k, v, _ = CASES["plain"].tensors(torch.float32)
    kept = ro.Retained(p=ro.Part(heads=3))
    run = torch.compile(lambda q, k, v: ro.attention(q, k, v, retain=kept), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="3 out of range of its 3 heads"):
        run(q, k, v)


def test_the_operators_are_what_their_fakes_say() -> None:
    """Shapes and dtypes of what the compiler plans for."""
    from retainops.ops import _attention_compiled as ops

    q, k, v, mask = (t.detach() for t in CASES["softcap, added"].tensors(torch.bfloat16))
    do = torch.randn_like(q)
    fixed = (False, None, False, 1.5, [-1, -1])
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.forward, (q, k, v, mask, *fixed), test_utils=utils)
    torch.library.opcheck(ops.backward, (q, k, v, mask, do, *fixed, [True, False, True, True]), test_utils=utils)
    of_s, of_p = "dense sumsq count nonfinite amax", "dense sum act_grad chefer legrad"
    at = [-1, 2, 3, 0, -1]
    for asked in (
        (of_s, "keys", [], of_p, "heads", [], False),
        ("dense", "tensor", at, "hist abs_sum attn_grad", "tensor", [], True),
    ):
        torch.library.opcheck(ops.answer, (q, k, v, mask, do, do, *fixed, *asked), test_utils=utils)
