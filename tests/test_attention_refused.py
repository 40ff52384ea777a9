"""What attention refuses: requests that cannot be answered, wrong arguments, and the words for each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from tests.attention_cases import CASES, drawn

CAUSAL = CASES["causal"]


ERRORS: list[tuple[Callable[..., Any], type[Exception], str]] = [
    (lambda q: ro.Retained("x"), KeyError, "attention: unknown point 'x'; its points are: s, p, o"),
    (
        lambda q: ro.Retained(s=ro.Relevance("chefer")),
        ValueError,
        "point 's' was asked for Relevance(chefer); it is of the",
    ),
    (
        lambda q: ro.Retained(o=ro.Stats("l2", over="keys")),
        ValueError,
        "it has no keys: ask for heads or queries of it",
    ),
    (lambda q: ro.Retained(o=ro.Part(keys=0)), ValueError, "it has no keys: ask for heads or queries of it"),
    (lambda q: ro.Retained(p=ro.Part(heads=[0, 2, -3])), IndexError, "attention: Part(heads=[0, 2, -3]) of point 'p'"),
    (lambda q: ro.Retained(p=ro.Part(queries=33)), IndexError, "33 out of range of its 33 queries; expected -33 to 32"),
    (lambda q: ro.Retained(p=ro.Into(q.detach())), ValueError, "shares memory with an input"),
    (lambda q: {"p": 1}, TypeError, "attention: retain is dict; expected retainops.Retained"),
]


@pytest.mark.parametrize(("made", "kind", "said"), ERRORS, ids=[said for *_, said in ERRORS])
def test_requests_that_cannot_be_answered(made: Any, kind: type[Exception], said: str, path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    with pytest.raises(kind, match=re.escape(said)):
        ro.attention(q, k, v, retain=made(q))


def test_relevance_of_cross_attention_is_legrad_alone(path: Any) -> None:
    q, k, v, _ = CASES["other keys"].tensors(torch.float32, path.device)
    for name in ("chefer", "attn_grad"):
        with pytest.raises(ValueError, match=f"Relevance\\('{name}'\\) of point 'p', of 21 queries and 34 keys"):
            ro.attention(q, k, v, retain=ro.Retained(p=ro.Relevance("legrad", name)))


def test_relevance_and_parts_need_heads() -> None:
    q = drawn(5, 4)
    with pytest.raises(ValueError, match=re.escape("expected (..., heads, queries, keys): unsqueeze a dim")):
        ro.attention(q, q, q, retain=ro.Retained(p=ro.Relevance("legrad")))
    with pytest.raises(ValueError, match=re.escape("Part(heads=...) of point 'p', which has shape (5, 5)")):
        ro.attention(q, q, q, retain=ro.Retained(p=ro.Part(heads=0)))


def test_without_grad_there_is_nothing_to_retain(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    for want in (None, ro.Relevance("chefer"), ro.Part(heads=0)):
        kept = ro.Retained("p") if want is None else ro.Retained(p=want)
        with torch.no_grad(), pytest.raises(RuntimeError, match="can't retain_grad on point 'p'"):
            ro.attention(q, k, v, retain=kept)
        with pytest.raises(RuntimeError, match="can't retain_grad on point 'p'"):
            ro.attention(q.detach(), k.detach(), v.detach(), retain=kept)


@pytest.mark.parametrize(
    ("keywords", "kind", "said"),
    [
        ({"retain": ro.Retained("p"), "nested": True}, RuntimeError, "attention: a nested tensor with retain"),
        ({"attn_mask": [1], "softcap": 2.0}, TypeError, "attention: attn_mask is list; expected a torch.Tensor"),
        ({"softcap": float("nan")}, ValueError, "attention: softcap is nan; expected a number above 0"),
        ({"softcap": float("inf")}, ValueError, "attention: softcap is inf; expected a number above 0"),
        ({"softcap": 0.0}, ValueError, "attention: softcap is 0.0; expected a number above 0"),
        ({"softcap": "x"}, TypeError, "attention: softcap is str; expected a number above 0"),
        ({"window": -1}, ValueError, "attention: window is -1; expected numbers of keys to each side, 0 or above"),
        ({"window": 1.5}, TypeError, "attention: window is 1.5; expected an int, or (left, right)"),
        ({"window": (1, 2, 3)}, TypeError, "attention: window is (1, 2, 3); expected an int, or (left, right)"),
        ({"scale": torch.ones((), requires_grad=True), "window": 2}, TypeError, "'scale' must be float, not Tensor"),
        ({"window": 2, "dropout_p": 1.5}, RuntimeError, "dropout probability has to be between 0 and 1"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(keywords: dict[str, Any], kind: type[Exception], said: str) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32)
    if keywords.pop("nested", False):
        q = torch.nested.nested_tensor(list(q.detach()), layout=torch.jagged)
    with pytest.raises(kind, match=re.escape(said)):
        ro.attention(q, k, v, **keywords)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q: (q, q[:, :1].expand(2, 3, 33, 40), q),
        lambda q: (q, q.half(), q),
        lambda q: (q, q[..., :3], q),
        lambda q: (q, q, q, torch.zeros(3, 3)),
        lambda q: (q, q, q, torch.zeros(33, 33, dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("keywords", [{}, {"window": 3}], ids=str)
def test_what_pytorch_does_not_take_is_its_own_error(wrong: Any, keywords: Any) -> None:
    q = CAUSAL.tensors(torch.float32)[0]
    with pytest.raises(RuntimeError) as theirs:
        F.scaled_dot_product_attention(*(t.detach().to("meta") for t in wrong(q)))
    with pytest.raises(RuntimeError) as mine:
        ro.attention(*wrong(q), **keywords, retain=ro.Retained("p"))
    assert type(mine.value) is type(theirs.value)


def test_other_ops_have_no_heads() -> None:
    x = drawn(3, 4)
    for want in (ro.Part(heads=0), ro.Relevance("legrad"), ro.Stats("l2", over="heads"), ro.Stats("l2", over="keys")):
        with pytest.raises(ValueError, match=r"softmax: point 'p' was asked for .*, which is for points of attention"):
            ro.softmax(x, retain=ro.Retained(p=want))


@pytest.mark.parametrize(
    ("made", "kind", "said"),
    [
        (lambda: ro.Part(), ValueError, "Part: nothing chosen"),
        (lambda: ro.Part(heads=1.5), TypeError, "Part: heads is 1.5; expected an int, a slice, or a sequence of ints"),
        (lambda: ro.Part(keys="01"), TypeError, "Part: keys is '01'; expected an int"),
        (lambda: ro.Part(queries=[True]), TypeError, "Part: queries is [True]; expected an int"),
        (lambda: ro.Relevance(), ValueError, "Relevance: nothing asked for; name some of chefer, legrad, attn_grad"),
        (lambda: ro.Relevance("rollout"), ValueError, "Relevance: unknown relevance 'rollout'"),
        (
            lambda: ro.Relevance("chefer", "l2"),
            ValueError,
            "a statistic of the same point is ro.Stats(...), in a",
        ),
        (lambda: ro.Stats("hist", over="heads"), ValueError, 'Stats: "hist" over heads'),
        (
            lambda: ro.Stats("l2", over="head"),
            ValueError,
            "Stats: over is 'head'; expected one of tensor, rows, ",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wants_that_are_none(made: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        made()


def test_what_was_not_asked_says_how_to_ask() -> None:
    slot = ro.Retained(p=ro.Relevance("chefer")).p
    assert slot.chefer is None
    with pytest.raises(AttributeError, match=re.escape('its relevances are chefer; ask with Relevance("legrad")')):
        _ = slot.legrad
    with pytest.raises(AttributeError, match=re.escape('it has no statistics; ask with Relevance("chefer")')):
        _ = ro.Retained("p").p.chefer
    assert (
        repr(ro.Part(heads=[0, 3], queries=-1, keys=slice(2, None, 2))) == "Part(heads=[0, 3], queries=-1, keys=2::2)"
    )
    with pytest.raises(ValueError, match="first_nonfinite: nothing tells of p"):
        ro.Retained(p=ro.Relevance("chefer")).first_nonfinite()
