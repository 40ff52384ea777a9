"""The kernels of attention's scores on the simulated GPU, against float64 eager PyTorch with retain_grad()."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from retainops.ops import _scores_kernels as kernels
from retainops.ops._scores import Wanted
from retainops.ops._scores_launch import Tiles
from retainops.relevance import KINDS
from retainops.stats import parts_of
from retainops.testing import simulated_gpu
from tests.attention_cases import CASES, Case
from tests.attention_oracle import Run, check, check_as_eager, error, largest

Tensor = torch.Tensor
TILES = Tiles(rows=32, columns=16, chunk=16, warps=4, stages=2)
PARTS = "sumsq", "sum", "abs_sum", "act_grad", "amax", "nonfinite", "count"
SIXTEEN_BITS = (
    "causal",
    "grouped, causal, strided",
    "added in each head",
    "heads of 80",
    "softcap, boolean",
    "other values",
)
LARGER = {
    "causal, ragged": Case((1, 2, 70, 40), (1, 2, 70, 40), (1, 2, 70, 40), causal=True),
    "window, causal, more keys": Case((1, 2, 50, 16), (1, 2, 75, 16), (1, 2, 75, 16), window=(9, 2), causal=True),
    "window, grouped, other values": Case(
        (1, 4, 75, 16), (1, 2, 50, 16), (1, 2, 50, 48), window=(5, 20), gqa=True, mask="boolean"
    ),
}
ALL = {**CASES, **LARGER}
FEW = ("causal, ragged", "window, grouped, other values", "added in each head", "dead rows", "softcap, causal, grouped")
"""Among them there is everything that a kernel does."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them, and ragged edges, in small tensors."""
    monkeypatch.setattr(kernels, "tiles_of", lambda scores, kind: TILES)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[list[Any]]:
    with simulated_gpu(compiles=False) as launches:
        yield launches


def runs() -> list[Any]:
    """Every case in float32, and some in 16 bits."""
    names = [name for name in ALL if not name.startswith("no ")]
    found = [(name, torch.float32) for name in names]
    found += [(name, torch.bfloat16) for name in SIXTEEN_BITS] + [(name, torch.float16) for name in SIXTEEN_BITS[:2]]
    return [pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}") for name, dtype in found]


@pytest.mark.parametrize(("name", "dtype"), runs())
def test_gradients(name: str, dtype: torch.dtype) -> None:
    run = Run(ALL[name], dtype)
    s, p = run.empty(), run.empty()
    assert kernels.refuses(run.scores, Wanted(s), Wanted(p)) is None
    assert kernels.answer(run.scores, Wanted(s), Wanted(p)) == ({}, {})
    check_as_eager(p, run.truth["p"], run.eager["p"])
    check("s", s, run.truth["s"], run.eager["s"], size=largest(run.truth["p"] * run.truth["value of p"]))


@pytest.mark.parametrize(
    "name",
    [*LARGER, "causal, fewer queries", "causal, fewer keys", "window to the left, causal", "window past the keys"],
)
def test_tiles_without_a_probability_are_left_out(name: str) -> None:
    """Where only s is asked for: to the same bits."""
    run = Run(ALL[name], torch.float32)
    s, alone, parts = run.empty(), run.empty(), ("sumsq", "abs_sum")
    for over in ("keys",) if name in LARGER else ():
        whole, _ = kernels.answer(run.scores, Wanted(parts=(*parts, "act_grad"), over=over), None)
        some, _ = kernels.answer(run.scores, Wanted(parts=parts, over=over), None)
        assert all(torch.equal(some[part], whole[part]) for part in parts)
    kernels.answer(run.scores, Wanted(s), Wanted(run.empty()))
    kernels.answer(run.scores, Wanted(alone), None)
    assert torch.equal(s, alone)


@pytest.mark.parametrize("programs", [1, 264])
@pytest.mark.parametrize("name", FEW)
def test_relevance(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all heads in one program, and by one head in each."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    run = Run(ALL[name], torch.float32)
    of_s, found = kernels.answer(run.scores, None, Wanted(relevance=tuple(KINDS)))
    assert (of_s, set(found)) == ({}, set(KINDS))
    for kind, x in found.items():
        truth, eager = (KINDS[kind].of(g["p"], g["value of p"]) for g in (run.truth, run.eager))
        assert x.dtype == torch.float32
        check(kind, x, truth, eager)


@pytest.mark.parametrize(
    ("name", "over"),
    [(FEW[0], over) for over in ("tensor", "heads", "rows", "channels")]
    + [(FEW[1], "queries"), (FEW[1], "keys"), ("dead rows", "queries"), ("added in each head", "keys")],
)
def test_statistics(name: str, over: str) -> None:
    """Of both points at once. They are sums, so what cancels in them counts too."""
    run = Run(ALL[name], torch.float32)
    names = (*PARTS, "hist") if over == "tensor" else PARTS
    wanted = [Wanted(run.empty(), parts=names, over=over) for _ in range(2)]
    for point, w, found in zip(("s", "p"), wanted, kernels.answer(run.scores, *wanted), strict=True):
        assert set(found) == set(names)
        truth, eager = (parts_of(names, over, g[point], g[f"value of {point}"]) for g in (run.truth, run.eager))
        sizes = dict(zip(names, truth, strict=True))
        for part, x, y in zip(names, truth, eager, strict=True):
            mine = found[part]
            if part == "hist":  # of what it is rounded to: an element may lie on either side of a power of two
                assert torch.equal(mine, parts_of(("hist",), over, w.tensor, None)[0])
            elif part in ("nonfinite", "count"):
                assert torch.equal(mine, x), part
            else:
                size = largest(sizes["abs_sum"]) if part == "sum" else 0
                if part == "act_grad":
                    product = run.truth[point] * run.truth[f"value of {point}"]
                    size = largest(parts_of(("abs_sum",), over, product, None)[0])
                check(f"{part} of {point}", mine, x, y, size=size)


def test_no_answer_depends_on_what_else_is_asked_for_and_two_runs_are_equal() -> None:
    run = Run(ALL["causal"], torch.bfloat16)
    parts = Wanted(parts=PARTS[:2], over="queries"), Wanted(parts=PARTS[:2], over="keys", relevance=tuple(KINDS))

    def answer(s: Wanted | None, p: Wanted | None) -> dict[str, Tensor]:
        of_s, of_p = kernels.answer(run.scores, s, p)
        tensors = {name: w.tensor for name, w in (("s", s), ("p", p)) if w is not None and w.tensor is not None}
        return tensors | {f"{k} of s": x for k, x in of_s.items()} | {f"{k} of p": x for k, x in of_p.items()}

    everything, again = (
        answer(parts[0]._replace(tensor=run.empty()), parts[1]._replace(tensor=run.empty())) for _ in range(2)
    )
    alone = answer(Wanted(run.empty()), None) | answer(None, Wanted(run.empty()))
    alone |= answer(parts[0], None)
    for name in PARTS[:2]:
        alone |= answer(None, Wanted(parts=(name,), over="keys"))
    for name in KINDS:
        alone |= answer(None, Wanted(relevance=(name,)))
    assert set(alone) == set(everything)
    for name, x in everything.items():
        assert torch.equal(x, again[name]), name
        assert torch.equal(x, alone[name]), name


def test_lse_and_delta_may_be_given_made_or_made_of_tiles() -> None:
    run = Run(ALL["dead rows"], torch.float32)
    values = run.truth["value of s"]
    lse = torch.where(values.isneginf().all(-1), 0.0, values.logsumexp(-1))
    delta = (run.truth["value of p"] * run.truth["p"]).sum(-1)
    made = kernels.with_lse(run.scores)  # of s - top
    torch.testing.assert_close(made.lse.double() + made.top, lse, rtol=0, atol=1e-6)
    given = run.scores._replace(lse=lse.float())
    for scores in (given, given._replace(o=None)):
        torch.testing.assert_close(kernels.delta_of(scores).double(), delta, rtol=0, atol=1e-5)
    strided = delta.float()[..., None].expand(*delta.shape, 2)[..., 0]
    for scores in (given._replace(delta=strided, o=None), run.scores._replace(o=None)):
        s = run.empty()
        kernels.answer(scores, Wanted(s), None)
        check("s", s, run.truth["s"], run.eager["s"])


@pytest.mark.parametrize("name", ["causal, ragged", "window, grouped, other values"])
def test_picked_queries_and_keys(name: str) -> None:
    """lse and delta are those of whole rows; causality and the window go by the places that were picked."""
    run = Run(ALL[name], torch.float32)
    scores, n, m = run.scores, *run.scores.shape[-2:]
    queries, keys = torch.tensor([n - 1, 0, *range(3, 40)]), torch.tensor([*range(20), m - 1, m - 2])
    scores = kernels.with_lse(scores)
    scores = scores._replace(delta=kernels.delta_of(scores), o=None)
    of_queries = {name: getattr(scores, name)[:, :, queries] for name in ("q", "do", "lse", "delta", "top")}
    mask = scores.mask
    for of_keys, at in (({}, slice(None)), ({x: getattr(scores, x)[:, :, keys] for x in ("k", "v")}, keys)):
        of_mask = None if mask is None else mask[queries][:, at]
        k_at = None if at is not keys else keys
        part = scores._replace(**of_queries, **of_keys, mask=of_mask, q_at=queries, k_at=k_at)
        s, p = (torch.full(part.shape, torch.nan) for _ in range(2))
        kernels.answer(part, Wanted(s), None)  # alone: nothing is wanted of keys that a query does not see
        kernels.answer(part, None, Wanted(p))
        for x, point in ((s, "s"), (p, "p")):
            truth, eager = (g[point][:, :, queries][..., at] for g in (run.truth, run.eager))
            check(point, x, truth, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_into_buffers_of_any_layout_and_adding_to_them(dtype: torch.dtype) -> None:
    """A float32 buffer of a bfloat16 point has what the kernel computed, unrounded."""
    run = Run(ALL["causal, ragged"], torch.bfloat16)
    b, h, n, m = run.scores.shape
    s = torch.zeros(n, m, h, b, dtype=dtype).permute(3, 2, 0, 1)
    p = torch.full((b, h, n, m), 2.0, dtype=dtype)
    kernels.answer(run.scores, Wanted(s), Wanted(p, accumulate=True))
    first = s.clone()
    check("s", s, run.truth["s"], run.eager["s"])
    check_as_eager(p, run.truth["p"] + 2, run.eager["p"] + 2)
    kernels.answer(run.scores, Wanted(s, accumulate=True), None)
    assert torch.equal(s, 2 * first)
    if dtype == torch.float32:
        assert error(first.double(), run.truth["s"]) < error(run.eager["s"].double(), run.truth["s"])


def test_a_buffer_that_shares_memory_with_what_is_read() -> None:
    case = Case((1, 1, 40, 40), (1, 1, 40, 40), (1, 1, 40, 40))
    run = Run(case, torch.float32)
    kernels.answer(run.scores, Wanted(run.do), None)
    check("s", run.do, run.truth["s"], run.eager["s"])


def test_the_gradient_of_a_sum() -> None:
    """It has strides of 0."""
    run = Run(ALL["plain"], torch.float32)
    one = torch.ones(()).expand(run.do.shape)
    found, dense = ({}, {})
    for scores, to in ((run.scores._replace(do=one), found), (run.scores._replace(do=one.contiguous()), dense)):
        to["s"], to["p"] = run.empty(), run.empty()
        kernels.answer(scores, Wanted(to["s"]), Wanted(to["p"]))
    assert torch.equal(found["s"], dense["s"])
    assert torch.equal(found["p"], dense["p"])


def test_rows_that_lie_far_apart() -> None:
    """Beyond 32 bits within a tile: of a mask, and so of address space of which little has memory."""
    run = Run(ALL["dead rows"], torch.float32)
    mask = run.scores.mask
    assert mask is not None
    n, m = mask.shape
    far = torch.empty(n * 2**28, dtype=torch.bool).as_strided((n, m), (2**28, 1)).copy_(mask)
    s, p = run.empty(), run.empty()
    kernels.answer(run.scores._replace(mask=far), Wanted(s), Wanted(p))
    check("s", s, run.truth["s"], run.eager["s"])
    check_as_eager(p, run.truth["p"], run.eager["p"])


def test_what_is_refused() -> None:
    run = Run(CASES["plain"], torch.float32)
    scores = run.scores

    def why(**changed: Any) -> str:
        return kernels.refuses(scores._replace(**changed), None, Wanted()) or ""

    assert why() == ""
    assert "float64" in why(**{name: getattr(scores, name).double() for name in ("q", "k", "v", "do")})
    assert "bfloat16" in why(k=scores.k.bfloat16())
    assert "the mask is float64" in why(mask=torch.zeros(37, 37, dtype=torch.float64))
    assert "heads of 1 to 256" in why(q=scores.q.repeat(1, 1, 1, 32), k=scores.k.repeat(1, 1, 1, 32))
    assert "needed" in why(q=scores.q[:, :, :0])
    long = scores.q[:, :, :1].expand(-1, -1, 2**29 + 1, -1)
    assert "536870913 queries and 37 keys; the kernels count to 536870912" in why(q=long, do=long)


def test_infinite_values_stay_with_their_key() -> None:
    """Beyond the last query the gradient of the output is read as 0, and 0 * inf is nan."""
    run = Run(ALL["plain"], torch.float32)
    run.scores.v[0, 1, 3, 2] = torch.inf
    _, found = kernels.answer(run.scores, None, Wanted(parts=("amax", "nonfinite", "abs_sum"), over="keys"))
    nonfinite = torch.zeros(found["nonfinite"].shape, dtype=torch.int64)
    nonfinite[0, 1, 3] = run.scores.shape[-2]
    assert torch.equal(found["nonfinite"], nonfinite)
    for part in ("amax", "abs_sum"):
        assert found[part][0, 1, 3] == torch.inf
        assert torch.equal(~found[part].isfinite(), nonfinite > 0)


@pytest.mark.parametrize("name", LARGER)
@pytest.mark.parametrize("what", ["q", "do"])
def test_a_row_that_is_nan_is_so_where_tiles_are_left_out(what: str, name: str) -> None:
    """In every sum and count, and in relevance. A nan in q is in p; one in the output's gradient is in delta alone."""
    run = Run(ALL[name], torch.float32)
    dead = 5, 43
    for row in dead:
        getattr(run.scores, what).data[0, 1, row] = torch.nan
    parts = ("sumsq", "sum", "abs_sum", "amax", "nonfinite")
    scores = run.scores._replace(lse=kernels.with_lse(run.scores).lse)  # finite where do is nan
    s = run.empty()
    kernels.answer(scores, Wanted(s), None)
    expected = torch.zeros(s.shape, dtype=torch.bool)
    expected[0, 1, list(dead)] = True
    assert torch.equal(s.isnan(), expected)
    for over in ("queries", "keys", "tensor", "heads"):
        of_s, of_p = kernels.answer(scores, Wanted(parts=parts, over=over), None)
        dims = {"queries": (-1,), "keys": (-2,), "tensor": (0, 1, 2, 3), "heads": (-1, -2)}[over]
        assert torch.equal(of_s["nonfinite"], expected.sum(dims)), over
        for part in parts[:-1]:
            assert torch.equal(of_s[part].isnan(), expected.sum(dims) > 0), (over, part)
    if what == "q":
        _, of_p = kernels.answer(
            scores, None, Wanted(parts=("act_grad",), over="keys", relevance=("chefer", "attn_grad"))
        )
        assert torch.equal(of_p["act_grad"].isnan(), expected.any(-2))
        for kind in ("chefer", "attn_grad"):
            assert torch.equal(of_p[kind].isnan(), expected.any(1)), kind


def test_not_a_number_stays_one() -> None:
    """In a row of q: in all of its gradient of s, where tiles are skipped too, in its sums, and in the maximum."""
    run = Run(ALL["causal, ragged"], torch.float32)
    run.scores.q[0, 1, 5] = torch.nan
    s = run.empty()
    of_s, of_p = kernels.answer(
        run.scores, Wanted(s, parts=("amax", "nonfinite"), over="queries"), Wanted(relevance=("chefer",))
    )
    expected = torch.zeros(s.shape, dtype=torch.bool)
    expected[0, 1, 5] = True
    assert torch.equal(s.isnan(), expected)
    assert torch.equal(of_s["amax"].isnan(), expected[..., 0])
    assert of_s["nonfinite"][0, 1, 5] > 0
    assert of_p["chefer"][0, 5, :6].isnan().all()
    assert not of_p["chefer"][0, 6:].isnan().any()
