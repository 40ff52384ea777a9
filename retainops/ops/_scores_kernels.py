"""The contract of `_scores` on Triton: one kernel for each loop order in which something is wanted."""

from __future__ import annotations

import torch
import triton

from retainops.kernels.attention import Heads
from retainops.kernels.attention_points import Point, Sums, by_key_kernel, by_query_kernel
from retainops.kernels.attention_relevance import relevance_kernel
from retainops.kernels.attention_rows import delta_kernel, lse_kernel
from retainops.ops._launch import on_device
from retainops.ops._scores import Scores, Wanted
from retainops.ops._scores_launch import (
    LONGEST,
    ROWS,
    apart,
    arguments,
    constants_of,
    dense_columns,
    heads,
    is_bounded,
    numbers,
    programs_of,
    tiles_of,
)
from retainops.stats import HIST_BINS, count

Tensor = torch.Tensor
Parts = dict[str, Tensor]
DTYPES = torch.float16, torch.bfloat16, torch.float32
DTYPES_OF_PARTS = {"nonfinite": torch.int32, "hist": torch.int32}
"""The others are float32."""
WIDEST = 256
"""Columns of a head; the tests go no further."""
PROGRAMS = 264
"""Fewer than this leave a GPU of 132 multiprocessors partly idle: heads of a tile are then shared out to several."""
NOTHING = Point(Heads(None), None, Sums())
TOGETHER = 8
"""Parts of both points for which there are registers in one kernel; more are computed in two."""


def refuses(scores: Scores, s: Wanted | None, p: Wanted | None) -> str | None:
    """Why the kernels do not take this; None: they do."""
    q, k, v, do = scores.q, scores.k, scores.v, scores.do
    if not q.dtype == k.dtype == v.dtype == do.dtype or q.dtype not in DTYPES:
        found = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, k, v, do))
        return f"q, k, v and the gradient are {found}; the kernels take float16, bfloat16 or float32, one for all"
    if scores.mask is not None and scores.mask.dtype == torch.float64:
        return "the mask is float64"
    if not scores.shape.numel() or not 0 < q.shape[-1] <= WIDEST or not 0 < v.shape[-1] <= WIDEST:
        return f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; heads of 1 to {WIDEST} needed"
    if max(scores.shape[2:]) > LONGEST:
        return f"there are {scores.shape[2]} queries and {scores.shape[3]} keys; the kernels count to {LONGEST}"
    return None


def answer(scores: Scores, s: Wanted | None, p: Wanted | None) -> tuple[Parts, Parts]:
    """As `_scores.answer`, of what is not refused."""
    s, p = s or Wanted(), p or Wanted()
    takes_s = s.tensor is not None or bool(s.parts)
    scores = apart(scores, [w.tensor for w in (s, p) if w.tensor is not None])
    with on_device(scores.q.device):
        if takes_s or p.takes_value:
            scores = with_lse(scores)
        if takes_s:
            scores = scores._replace(delta=delta_of(scores))
        if s.tensor is not None or p.tensor is not None:
            _launch(scores, False, "grad", _written(s), _written(p), dense=p.tensor is not None)
        of_s, of_p = _statistics(scores, s, p)
        return of_s, {**of_p, **_relevance(scores, p)}


def with_lse(scores: Scores) -> Scores:
    """With lse and top, (B, H, Nq), dense, in float32; made if lse is not given.

    exp(s - lse) is off by as much as float32 has of room beside lse: below what 16 bits are rounded to, unless a mask
    is added. Elsewhere lse is that of s - top, and exp((s - top) - lse) is exact to a few units in the last place.
    """
    if scores.lse is not None:
        lse, top = (None if x is None else x.to(torch.float32).contiguous() for x in (scores.lse, scores.top))
        return scores._replace(lse=lse, top=top)
    added = scores.mask is not None and scores.mask.dtype != torch.bool
    top = numbers(scores, scores.q.shape[:-1]) if added or scores.q.dtype == torch.float32 else None
    lse, tiles = numbers(scores, scores.q.shape[:-1]), tiles_of(scores, "lse")
    constants = constants_of(scores, tiles, True, SKIPS=is_bounded(scores))
    del constants["DV"], constants["CHUNKS_V"]
    constants["STAGES"] = constants.pop("num_stages")
    lse_kernel[programs_of(scores, -2, tiles)](arguments(scores), lse, top, **constants)
    return scores._replace(lse=lse, top=top)


def delta_of(scores: Scores) -> Tensor:
    """delta, (B, H, Nq), dense, in float32; made if it is not given, from o and do, or from tiles, which takes lse."""
    if scores.delta is not None:
        return scores.delta.to(torch.float32).contiguous()
    if scores.o is None:
        return _statistics(scores, Wanted(), Wanted(parts=("act_grad",), over="queries"))[1]["act_grad"]
    delta, o, dv = numbers(scores, scores.q.shape[:-1]), heads(dense_columns(scores.o)), scores.v.shape[-1]
    blocks = {"CHUNKS": triton.cdiv(dv, ROWS.chunk), "CH": ROWS.chunk, "BLOCK_M": ROWS.rows}
    programs = programs_of(scores, -2, ROWS)
    delta_kernel[programs](arguments(scores), o, delta, DV=dv, **blocks, num_warps=ROWS.warps)
    return delta


def _written(wanted: Wanted) -> Point:
    """Where the gradient itself goes."""
    if wanted.tensor is None:
        return NOTHING
    return Point(heads(wanted.tensor), 1 if wanted.accumulate else None, Sums())


def _statistics(scores: Scores, s: Wanted, p: Wanted) -> tuple[Parts, Parts]:
    """The parts of statistics: those of both points in one launch, where they go the same way and registers do."""
    sums = [_Sums(scores, w) for w in (s, p)]
    for by_key in (False, True):
        of_s, of_p = (x.shares if x.by_key == by_key else {} for x in sums)
        launches = [(of_s, of_p)] if len(of_s) + len(of_p) <= TOGETHER else [(of_s, {}), ({}, of_p)]
        for first, second in launches:
            dense = bool(second.keys() - {"act_grad"} or first.keys() & {"act_grad", "hist"})
            half = {"half": 1} if scores.q.dtype == torch.float16 else {}
            points = [NOTHING._replace(sums=Sums(**x, **(half if "nonfinite" in x else {}))) for x in (first, second)]
            if first or second:
                _launch(scores, by_key, "statistics", points[0], points[1], dense)
    return sums[0].found(), sums[1].found()


def _relevance(scores: Scores, p: Wanted) -> Parts:
    """A launch each: there are no registers for the sums of another."""
    return {name: _legrad(scores) if name == "legrad" else _map(scores, name) for name in p.relevance}


def _legrad(scores: Scores) -> Tensor:
    b, h, n, m = scores.shape
    shares = numbers(scores, (b, h, m))
    _launch(scores, True, "legrad", NOTHING, NOTHING._replace(sums=Sums(positive=shares)), dense=True)
    return shares.sum(1) / (h * n)


def _map(scores: Scores, name: str) -> Tensor:
    """Relevance of each query and key."""
    tiles, (b, h, n, m) = tiles_of(scores, "relevance"), scores.shape
    programs = b * triton.cdiv(n, tiles.rows) * triton.cdiv(m, tiles.columns)
    parts = next((i for i in range(1, h) if not h % i and i * programs >= PROGRAMS), h)
    shares = numbers(scores, (parts, b, n, m))
    constants = constants_of(scores, tiles, True, RELU=name == "chefer", PARTS=parts, SKIPS=is_bounded(scores))
    relevance_kernel[(programs * parts, 1, 1)](arguments(scores), shares, **constants)
    return shares[0] if parts == 1 else shares.sum(0)


def _launch(scores: Scores, by_key: bool, kind: str, s: Point, p: Point, dense: bool) -> None:
    """Launch a kernel of points; `dense`: it wants something of tiles too in which p is 0."""
    tiles, values = tiles_of(scores, kind), s != NOTHING or p.sums.act_grad is not None
    constants = constants_of(scores, tiles, values, SKIPS=is_bounded(scores) and not dense)
    kernel = by_key_kernel if by_key else by_query_kernel
    kernel[programs_of(scores, -1 if by_key else -2, tiles)](arguments(scores), s, p, **constants)


class _Sums:
    """The statistics of one point: shares, a number for each query or for each key, which are then put together."""

    def __init__(self, scores: Scores, wanted: Wanted) -> None:
        self.scores, self.over, self.parts = scores, wanted.over, wanted.parts
        self.by_key = wanted.over in ("keys", "channels")
        dim = -1 if self.by_key else -2
        shape = *scores.shape[:2], scores.shape[dim]
        rows, _, _ = programs_of(scores, dim, tiles_of(scores, "statistics"))
        self.shares = {
            part: numbers(scores, (rows, HIST_BINS) if part == "hist" else shape, DTYPES_OF_PARTS.get(part))
            for part in wanted.parts
            if part != "count"
        }

    def found(self) -> Parts:
        """The parts."""
        found = {name: self._total(name, x) for name, x in self.shares.items()}
        if "count" in self.parts:
            found["count"] = count(numbers(self.scores, ()).expand(self.scores.shape), self.over)
        return found

    def _total(self, name: str, x: Tensor) -> Tensor:
        dims = (0,) if name == "hist" else {"tensor": (0, 1, 2), "heads": (2,), "channels": (0, 1)}.get(self.over, ())
        if not dims:
            return x.to(torch.int64) if name == "nonfinite" else x
        return x.amax(dims) if name == "amax" else x.sum(dims)
