"""attention of inputs out of the ordinary: leading dims, groups, empty heads, numbers that are not finite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from tests.attention_cases import CASES, Case, drawn, eager, loss_of

Tensor = torch.Tensor


CAUSAL = CASES["causal"]


SMALL = Case((1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3))


def test_a_buffer_of_five_dims(path: Any) -> None:
    q, k, v = (drawn(2, 3, 2, 5, 4, seed=i).detach().to(path.device).requires_grad_() for i in range(3))
    buffer = torch.ones(3, 2, 2, 5, 5, dtype=torch.float64, device=path.device).transpose(0, 1)
    kept = ro.Retained(p=ro.Into(buffer, accumulate=True), s=ro.Stats("sum", over="keys"))
    loss_of(ro.attention(q, k, v, retain=kept)).backward()
    points = eager(SMALL, q, k, v, None)
    loss_of(points["o"]).backward()
    torch.testing.assert_close(buffer, points["p"].grad + 1)
    torch.testing.assert_close(kept.s.sum, points["s"].grad.sum(-2))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((5, 4), (6, 4), (6, 3)),
        ((2, 5, 4), (2, 6, 4), (2, 6, 4)),
        ((2, 3, 2, 5, 4), (2, 3, 2, 6, 4), (2, 3, 2, 6, 4)),
        ((2, 1, 5, 4), (1, 3, 6, 4), (3, 6, 4)),
        ((3, 5, 4), (2, 3, 6, 4), (1, 1, 6, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("softcap", [None, 1.0])
def test_any_leading_dims(q: Any, k: Any, v: Any, softcap: float | None, path: Any) -> None:
    """As PyTorch's function: they broadcast."""
    given = [drawn(*shape, seed=i).detach().to(path.device).requires_grad_() for i, shape in enumerate((q, k, v))]
    before = torch.broadcast_shapes(q[:-2], k[:-2], v[:-2])
    for wants in (
        {"s": None, "p": None, "o": None},
        {"p": ro.Stats("sum", over="queries"), "s": ro.Part(queries=[2, 0])},
    ):
        kept = ro.Retained(*(n for n, w in wants.items() if w is None), **{n: w for n, w in wants.items() if w})
        o = ro.attention(*given, softcap=softcap, retain=kept)
        for x in given:
            x.grad = None
        loss_of(o).backward()
        case = Case((), (), (), softcap=softcap)
        points = eager(case, *(t.expand(*before, *t.shape[-2:]) for t in given), None)
        theirs = torch.autograd.grad(loss_of(points["o"]), [*given, points["s"], points["p"]])
        for x, grad in zip(given, theirs, strict=False):
            torch.testing.assert_close(x.grad, grad)
        ds, dp = theirs[3:]
        if "o" in wants:
            torch.testing.assert_close(kept.s.grad, ds)
            torch.testing.assert_close(kept.p.grad, dp)
        else:
            torch.testing.assert_close(kept.s.grad, ds[..., [2, 0], :])
            torch.testing.assert_close(kept.p.sum, dp.sum(-1))


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"dropout_p": 1e-30}], ids=str)
def test_values_alone_have_a_batch(keywords: dict[str, Any]) -> None:
    """Points have all leading dims by the definition too, which second derivatives and dropout take."""
    q, k, v = (drawn(*shape, seed=i) for i, shape in enumerate(((1, 2, 5, 4), (2, 6, 4), (3, 2, 6, 4))))
    points = eager(Case((), (), (), softcap=keywords.get("softcap")), q.expand(3, 2, 5, 4), k, v, None)
    loss_of(points["o"]).backward()
    for create_graph in (False, True):
        kept = ro.Retained("s", p=ro.Stats("amax"))
        loss_of(ro.attention(q, k, v, **keywords, retain=kept)).backward(create_graph=create_graph)
        torch.testing.assert_close(kept.s.grad.detach(), points["s"].grad)
        torch.testing.assert_close(kept.p.amax, points["p"].grad.abs().max())
    for x in (q, k, v):
        x.grad = None  # a graph that leads back to itself would leak


def test_keys_and_values_of_different_groups(path: Any) -> None:
    q, k, v = (
        drawn(*shape).detach().to(path.device).requires_grad_() for shape in ((1, 8, 5, 4), (1, 4, 5, 4), (1, 2, 5, 4))
    )
    for softcap in (None, 2.0):
        kept = ro.Retained("s", p=ro.Part(heads=[7, 2]))
        loss_of(ro.attention(q, k, v, enable_gqa=True, softcap=softcap, retain=kept)).backward()
        wide = [t.detach().repeat_interleave(8 // t.shape[1], 1).requires_grad_() for t in (q, k, v)]
        points = eager(Case((), (), (), softcap=softcap), *wide, None)
        loss_of(points["o"]).backward()
        torch.testing.assert_close(kept.s.grad, points["s"].grad)
        torch.testing.assert_close(kept.p.grad, points["p"].grad[:, [7, 2]])


@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0}, {"dropout_p": 1e-30}], ids=str)
def test_heads_of_no_columns(keywords: dict[str, Any], path: Any) -> None:
    """Every key counts the same, as in PyTorch's function."""
    q, k, v = (drawn(1, 2, 5, d, seed=d).detach().to(path.device).requires_grad_() for d in (0, 0, 3))
    kept = ro.Retained("p")
    o = ro.attention(q, k, v, **keywords, retain=kept)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(q, k, v))
    loss_of(o).backward()
    points = eager(Case((), (), (), scale=1.0), *(t.detach().requires_grad_() for t in (q, k, v)), None)
    loss_of(points["o"]).backward()
    torch.testing.assert_close(kept.p.grad, points["p"].grad)


def test_a_gradient_of_one_stored_element(path: Any) -> None:
    q, k, v, _ = CAUSAL.tensors(torch.float32, path.device)
    kept = ro.Retained("p", s=ro.Stats("abs_sum"))
    ro.attention(q, k, v, is_causal=True, retain=kept).sum().backward()
    points = eager(CAUSAL, *(t.detach().requires_grad_() for t in (q, k, v)), None)
    points["o"].sum().backward()
    torch.testing.assert_close(kept.p.grad, points["p"].grad, atol=1e-5, rtol=1e-5)


def test_nan_and_infinity_go_where_eager_has_them(path: Any) -> None:
    q, k, v, _ = CASES["plain"].tensors(torch.float32, path.device)
    with torch.no_grad():
        q[0, 1, 3, 2], v[1, 0, 5, 1], k[1, 2, 4, 0] = torch.nan, torch.inf, torch.nan
    kept = ro.Retained("s", "p")
    loss_of(ro.attention(q, k, v, retain=kept)).backward()
    points = eager(CASES["plain"], *(t.detach().requires_grad_() for t in (q, k, v)), None)
    loss_of(points["o"]).backward()
    for name in ("s", "p"):
        assert torch.equal(kept[name].grad.isfinite(), points[name].grad.isfinite()), name


@pytest.mark.parametrize("added", [torch.finfo(torch.bfloat16).min, -1e9, -1e4, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_added_to_every_key_of_a_row(dtype: torch.dtype, added: float, path: Any) -> None:
    """As of padded queries: the probabilities are what is left of the scores beside it, and never 0 or nan."""
    q, k, v = (drawn(1, 2, 20, 16, dtype=dtype, seed=i).detach().to(path.device).requires_grad_() for i in range(3))
    mask = torch.zeros(20, 20, dtype=dtype, device=path.device)
    mask[:3] = added
    # In float32, which scores are made in: bfloat16 has no room for them beside such a number.
    points = eager(SMALL, *(t.detach().float().requires_grad_() for t in (q, k, v)), mask.float())
    loss_of(points["o"]).backward()
    ds, chefer = points["s"].grad, (points["p"] * points["p"].grad).relu().mean(1).detach()
    whole, part = ro.Retained("s", p=ro.Relevance("chefer")), ro.Retained(s=ro.Part(keys=slice(0, 20)))
    for kept in (whole, part):
        loss_of(ro.attention(q, k, v, mask, retain=kept)).backward()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    for s in (whole.s.grad, part.s.grad):
        torch.testing.assert_close(s.float(), ds, **near)
    torch.testing.assert_close(whole.p.chefer, chefer, **near)


def test_what_a_kernel_says_of_a_row_without_a_sum() -> None:
    """PyTorch's say inf both of a row that sees no key and of one that is nan; the output tells them apart."""
    from retainops.ops._attention import _normal

    o = torch.ones(1, 1, 3, 2)
    o[0, 0, 0], o[0, 0, 1] = 0.0, torch.nan
    for inf in (torch.inf, -torch.inf):
        lse = _normal(torch.tensor([[[inf, inf, 0.5]]]), o)
        assert torch.equal(lse.isnan(), torch.tensor([[[False, True, False]]]))
        assert torch.equal(lse.nan_to_num(), torch.tensor([[[0.0, 0.0, 0.5]]]))


@pytest.mark.parametrize("retain", [None, ro.Retained("p")], ids=["plain", "asked"])
def test_heads_of_two_sizes(retain: ro.Retained | None, path: Any) -> None:
    q, k = (torch.ones(1, 2, 5, size, device=path.device, requires_grad=True) for size in (8, 6))
    says = "attention: q of shape (1, 2, 5, 8) and k of shape (1, 2, 5, 6) have heads of different sizes"
    with pytest.raises(RuntimeError, match=re.escape(says)):
        ro.attention(q, k, q, retain=retain)
    assert ro.attention(q, q, k, retain=retain).shape == (1, 2, 5, 6)
