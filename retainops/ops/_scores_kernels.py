"""The contract of `_scores` on Triton: one kernel for each loop order in which something is wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from retainops.buffers import share_memory
from retainops.kernels.attention import Attention, Heads, delta_kernel, lse_kernel
from retainops.kernels.attention_points import Point, Sums, by_key_kernel, by_query_kernel
from retainops.kernels.attention_relevance import relevance_kernel
from retainops.ops._launch import on_device
from retainops.ops._scores import Scores, Wanted
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
FAR = 2**30
"""As good as no bound to a window: of queries and keys there are fewer."""


class Tiles(NamedTuple):
    """How a kernel cuts up its work.

    Attributes:
        rows, columns: of a tile of scores.
        chunk: columns of q, k, v and do at a time.
        warps, stages: what Triton calls num_warps and num_stages.
    """

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


ROWS = Tiles(64, 0, 64, 4, 1)
"""Of the output and its gradient, where delta is made."""


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
    return None


def answer(scores: Scores, s: Wanted | None, p: Wanted | None) -> tuple[Parts, Parts]:
    """As `_scores.answer`, of what is not refused."""
    s, p = s or Wanted(), p or Wanted()
    takes_s = s.tensor is not None or bool(s.parts)
    scores = _apart(scores, [w.tensor for w in (s, p) if w.tensor is not None])
    with on_device(scores.q.device):
        if takes_s or p.takes_value:
            scores = scores._replace(lse=lse_of(scores))
        if takes_s:
            scores = scores._replace(delta=delta_of(scores))
        if s.tensor is not None or p.tensor is not None:
            of = [
                Point(_heads(w.tensor), 1 if w.accumulate else None, Sums()) if w.tensor is not None else NOTHING
                for w in (s, p)
            ]
            _launch(scores, False, "grad", of[0], of[1], dense=p.tensor is not None)
        of_s, of_p = _statistics(scores, s, p)
        return of_s, {**of_p, **_relevance(scores, p)}


def lse_of(scores: Scores) -> Tensor:
    """lse, (B, H, Nq), dense, in float32; made if it is not given."""
    if scores.lse is not None:
        return scores.lse.to(torch.float32).contiguous()
    lse, tiles = _numbers(scores, scores.q.shape[:-1]), tiles_of(scores, "lse")
    constants = _constants(scores, tiles, True, SKIPS=_is_bounded(scores))
    del constants["DV"], constants["CHUNKS_V"]
    lse_kernel[_programs(scores, -2, tiles)](_attention(scores), lse, **constants)
    return lse


def delta_of(scores: Scores) -> Tensor:
    """delta, (B, H, Nq), dense, in float32; made if it is not given, from o and do, or from tiles, which takes lse."""
    if scores.delta is not None:
        return scores.delta.to(torch.float32).contiguous()
    if scores.o is None:
        return _statistics(scores, Wanted(), Wanted(parts=("act_grad",), over="queries"))[1]["act_grad"]
    delta, dv = _numbers(scores, scores.q.shape[:-1]), scores.v.shape[-1]
    blocks = {"CHUNKS": triton.cdiv(dv, ROWS.chunk), "CH": ROWS.chunk, "BLOCK_M": ROWS.rows}
    programs = _programs(scores, -2, ROWS)
    delta_kernel[programs](_attention(scores), _heads(_dense(scores.o)), delta, DV=dv, **blocks, num_warps=ROWS.warps)
    return delta


def _statistics(scores: Scores, s: Wanted, p: Wanted) -> tuple[Parts, Parts]:
    """The parts of statistics: those of both points in one launch where they go the same way."""
    sums = [_Sums(scores, w) for w in (s, p)]
    for by_key in (False, True):
        of_s, of_p = (x.shares if x.by_key == by_key else {} for x in sums)
        dense = bool(of_p.keys() - {"act_grad"} or of_s.keys() & {"act_grad", "hist"})
        if of_s or of_p:
            s_point, p_point = (NOTHING._replace(sums=Sums(**x)) for x in (of_s, of_p))
            _launch(scores, by_key, "statistics", s_point, p_point, dense=dense)
    return sums[0].found(), sums[1].found()


def _relevance(scores: Scores, p: Wanted) -> Parts:
    """A launch each: there are no registers for the sums of another."""
    return {name: _legrad(scores) if name == "legrad" else _map(scores, name) for name in p.relevance}


def _legrad(scores: Scores) -> Tensor:
    b, h, n, m = scores.shape
    shares = _numbers(scores, (b, h, m))
    _launch(scores, True, "legrad", NOTHING, NOTHING._replace(sums=Sums(positive=shares)), dense=True)
    return shares.sum(1) / (h * n)


def _map(scores: Scores, name: str) -> Tensor:
    """Relevance of each query and key."""
    tiles, (b, h, n, m) = tiles_of(scores, "relevance"), scores.shape
    programs = b * triton.cdiv(n, tiles.rows) * triton.cdiv(m, tiles.columns)
    parts = next((i for i in range(1, h) if not h % i and i * programs >= PROGRAMS), h)
    shares = _numbers(scores, (parts, b, n, m))
    constants = _constants(scores, tiles, True, RELU=name == "chefer", PARTS=parts, SKIPS=_is_bounded(scores))
    relevance_kernel[(programs * parts, 1, 1)](_attention(scores), shares, **constants)
    return shares[0] if parts == 1 else shares.sum(0)


def _launch(scores: Scores, by_key: bool, kind: str, s: Point, p: Point, dense: bool) -> None:
    """Launch a kernel of points; `dense`: it wants something of tiles too in which p is 0."""
    tiles, values = tiles_of(scores, kind), s != NOTHING or p.sums.act_grad is not None
    constants = _constants(scores, tiles, values, SKIPS=_is_bounded(scores) and not dense)
    kernel = by_key_kernel if by_key else by_query_kernel
    kernel[_programs(scores, -1 if by_key else -2, tiles)](_attention(scores), s, p, **constants)


class _Sums:
    """The statistics of one point: shares, a number for each query or for each key, which are then put together."""

    def __init__(self, scores: Scores, wanted: Wanted) -> None:
        self.scores, self.over, self.parts = scores, wanted.over, wanted.parts
        self.by_key = wanted.over in ("keys", "channels")
        dim = -1 if self.by_key else -2
        shape, rows = (*scores.shape[:2], scores.shape[dim]), _programs(scores, dim, tiles_of(scores, "statistics"))[0]
        self.shares = {
            part: _numbers(scores, (rows, HIST_BINS) if part == "hist" else shape, DTYPES_OF_PARTS.get(part))
            for part in wanted.parts
            if part != "count"
        }

    def found(self) -> Parts:
        """The parts."""
        found = {name: self._total(name, x) for name, x in self.shares.items()}
        if "count" in self.parts:
            found["count"] = count(_numbers(self.scores, ()).expand(self.scores.shape), self.over)
        return found

    def _total(self, name: str, x: Tensor) -> Tensor:
        dims = (0,) if name == "hist" else {"tensor": (0, 1, 2), "heads": (2,), "channels": (0, 1)}.get(self.over, ())
        if not dims:
            return x.to(torch.int64) if name == "nonfinite" else x
        return x.amax(dims) if name == "amax" else x.sum(dims)


def tiles_of(scores: Scores, kind: str) -> Tiles:
    """How to cut up the work: by shapes, dtypes and the GPU, so that no answer depends on what else is asked for.

    They are as large as registers allow, by what ptxas says of each kernel (tests/test_attention_machine_code.py).

    Args:
        kind: "grad", "statistics", "relevance", "legrad" or "lse": what is kept of a tile.
    """
    if scores.q.dtype == torch.float32:  # without tensor cores, which would round to 10 bits
        return Tiles(64, 64, 16, 8 if kind in ("statistics", "legrad") else 4, 2)
    target = triton.runtime.driver.active.get_current_target()
    hopper, blackwell = (target.backend == "cuda" and target.arch // 10 == n for n in (9, 10))
    cut = kind == "grad" and _bounds(scores) != (None, None)  # comparisons of places take registers too
    columns = 64 if kind == "statistics" or cut or blackwell else 128
    widths = scores.q.shape[-1], scores.v.shape[-1]
    chunks = (64, 32) if hopper or blackwell else (32,)  # others hold a chunk in registers
    # Of chunks that are not full not more than a fifth is wasted.
    chunk = next((c for c in chunks if all(4 * c * triton.cdiv(w, c) <= 5 * w for w in widths)), 16)
    return Tiles(128, columns, chunk, 8, 3)


def _constants(scores: Scores, tiles: Tiles, values: bool, **constants: Any) -> dict[str, Any]:
    """What is compiled into a kernel; `values`: it needs those of s or p."""
    d, dv = scores.q.shape[-1], scores.v.shape[-1]
    chunks = {"CHUNKS": triton.cdiv(d, tiles.chunk) if values else 0, "CHUNKS_V": triton.cdiv(dv, tiles.chunk)}
    blocks = {"CH": tiles.chunk, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns}
    warps = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return {"D": d, "DV": dv, **chunks, **blocks, **warps, **constants}


def _programs(scores: Scores, dim: int, tiles: Tiles) -> tuple[int, int, int]:
    b, h = scores.shape[:2]
    return b * h * triton.cdiv(scores.shape[dim], tiles.rows), 1, 1


def _numbers(scores: Scores, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or torch.float32, device=scores.q.device)


def _is_bounded(scores: Scores) -> bool:
    """Whether there are tiles of which no query sees anything, and it is known which."""
    return _bounds(scores) != (None, None) and scores.q_at is None and scores.k_at is None


def _bounds(scores: Scores) -> tuple[int | None, int | None]:
    """Query i sees keys from i - left to i + right."""
    left, right = scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    left, right = (None if x is None else max(min(x, FAR), -FAR) for x in (left, right))  # sums stay in int32
    return left, right


def _attention(scores: Scores) -> Attention:
    """The kernels' argument."""
    _, h, n, m = scores.shape
    mask = None if scores.mask is None else scores.mask.expand(scores.shape)
    cap = None if scores.softcap is None else float(scores.softcap)
    return Attention(
        *_alike(_dense(t) for t in (scores.q, scores.k, scores.v, scores.do)),
        _heads(mask),
        *(scores.lse, scores.delta, scores.q_at, scores.k_at),
        *(float(scores.scale), cap, *_bounds(scores)),
        *(h, h // scores.k.shape[1], n, m),
    )


def _alike(tensors: Iterable[Tensor]) -> list[Heads]:
    """One pointer stands for one or another of them: so what is compiled in must be true of all."""
    read = [_heads(t) for t in tensors]
    far = 1 if any(x.far for x in read) else None
    if any(stride % 8 for x in read for stride in (x.batch, x.head, x.row)):
        return [x._replace(far=far) for x in read]
    return [Heads(x.ptr, x.batch // 8, x.head // 8, x.row // 8, x.column, far, 1) for x in read]


def _dense(t: Tensor) -> Tensor:
    """With columns that are neighbours."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _heads(t: Tensor | None) -> Heads:
    if t is None:
        return Heads(None)
    far = 256 * max(t.stride()[2:]) >= 2**30  # tiles have no more rows, or columns
    return Heads(t, *t.stride(), far=1 if far else None)


def _apart(scores: Scores, written: Sequence[Tensor]) -> Scores:
    """With copies of what shares memory with a tensor that is written: programs would race."""
    changed: dict[str, Any] = {
        name: t.clone()
        for name, t in scores._asdict().items()
        if isinstance(t, Tensor) and any(share_memory(t, w) for w in written)
    }
    return scores._replace(**changed)
