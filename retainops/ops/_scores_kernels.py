"""The contract of `_scores` on Triton: one kernel for each loop order in which something is wanted."""

from __future__ import annotations

from collections.abc import Sequence
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
    of_s, of_p = s.tensor is not None or bool(s.parts), p.takes_value
    scores = _apart(scores, [w.tensor for w in (s, p) if w.tensor is not None])
    with on_device(scores.q.device):
        if of_s or of_p:
            scores = scores._replace(lse=lse_of(scores))
        if of_s:
            scores = scores._replace(delta=delta_of(scores))
        found = [_by_query(scores, s, p), _by_key(scores, s, p), ({}, _maps(scores, p))]
    return {k: x for part, _ in found for k, x in part.items()}, {k: x for _, part in found for k, x in part.items()}


def lse_of(scores: Scores) -> Tensor:
    """lse, (B, H, Nq), dense, in float32; made if it is not given."""
    if scores.lse is not None:
        return scores.lse.to(torch.float32).contiguous()
    lse, tiles = _numbers(scores, scores.q.shape[:-1]), tiles_of(scores)
    constants = _constants(scores, tiles, values=True, SKIPS=_is_bounded(scores))
    del constants["DV"], constants["CHUNKS_V"]
    lse_kernel[_programs(scores, -2, tiles)](_attention(scores), lse, **constants)
    return lse


def delta_of(scores: Scores) -> Tensor:
    """delta, (B, H, Nq), dense, in float32; made if it is not given, from o and do, or from tiles, which takes lse."""
    if scores.delta is not None:
        return scores.delta.to(torch.float32).contiguous()
    if scores.o is None:
        return _by_query(scores, Wanted(), Wanted(parts=("act_grad",), over="queries"))[1]["act_grad"]
    delta, dv = _numbers(scores, scores.q.shape[:-1]), scores.v.shape[-1]
    blocks = {"CHUNKS": triton.cdiv(dv, ROWS.chunk), "CH": ROWS.chunk, "BLOCK_M": ROWS.rows}
    programs = _programs(scores, -2, ROWS)
    delta_kernel[programs](_attention(scores), _heads(_dense(scores.o)), delta, DV=dv, **blocks, num_warps=ROWS.warps)
    return delta


def _by_query(scores: Scores, s: Wanted, p: Wanted) -> tuple[Parts, Parts]:
    """The gradients themselves, and what is over queries, heads or the tensor."""
    sums = [_Sums(scores, w, w.parts if w.over not in ("keys", "channels") else (), -2) for w in (s, p)]
    if not (s.tensor is not None or p.tensor is not None or any(x.shares for x in sums)):
        return sums[0].found(), sums[1].found()
    points = [_point(w.tensor, w.accumulate, x) for w, x in zip((s, p), sums, strict=True)]
    _launch(by_query_kernel, scores, -2, points, dense=p.tensor is not None)
    return sums[0].found(), sums[1].found()


def _by_key(scores: Scores, s: Wanted, p: Wanted) -> tuple[Parts, Parts]:
    """What is over keys, or over all but the last dim; and legrad."""
    legrad = tuple(name for name in p.relevance if name == "legrad")
    of_s, of_p = (w.parts if w.over in ("keys", "channels") else () for w in (s, p))
    sums = [_Sums(scores, s, of_s, -1), _Sums(scores, p, of_p + legrad, -1)]
    if any(x.shares for x in sums):
        _launch(by_key_kernel, scores, -1, [_point(None, False, x) for x in sums], dense=bool(legrad))
    return sums[0].found(), sums[1].found()


def _launch(kernel: Any, scores: Scores, dim: int, points: Sequence[Point], dense: bool) -> None:
    """Launch a kernel by blocks of a dim of the scores; `dense`: it wants something of tiles in which p is 0."""
    s, p = points
    tiles = tiles_of(scores)
    dense = dense or any(x is not None for name, x in p.sums._asdict().items() if name != "act_grad")
    dense = dense or s.sums.act_grad is not None or s.sums.hist is not None
    values = s != NOTHING or p.sums.act_grad is not None
    constants = _constants(scores, tiles, values, SKIPS=_is_bounded(scores) and not dense)
    kernel[_programs(scores, dim, tiles)](_attention(scores), s, p, **constants)


def _maps(scores: Scores, p: Wanted) -> Parts:
    """Relevance of each query and key."""
    names = [name for name in p.relevance if name != "legrad"]
    if not names:
        return {}
    tiles, (b, h, n, m) = tiles_of(scores), scores.shape
    programs = b * triton.cdiv(n, tiles.rows) * triton.cdiv(m, tiles.columns)
    parts = next((i for i in range(1, h) if not h % i and i * programs >= PROGRAMS), h)
    constants = _constants(scores, tiles, values=True, PARTS=parts, SKIPS=_is_bounded(scores))
    maps = {}
    for name in names:  # a launch each: there are no registers for another sum
        shares = _numbers(scores, (parts, b, n, m))
        relevance_kernel[(programs * parts, 1, 1)](_attention(scores), shares, RELU=name == "chefer", **constants)
        maps[name] = shares[0] if parts == 1 else shares.sum(0)
    return maps


class _Sums:
    """Statistics of one point, a number for each row of a dim of the scores, which are then put together.

    Args:
        wanted, parts: which of its parts to take here.
        dim: -2: each query's over its keys; -1: each key's over its queries.
    """

    def __init__(self, scores: Scores, wanted: Wanted, parts: Sequence[str], dim: int) -> None:
        self.scores, self.over, self.dim = scores, wanted.over, dim
        self.parts = parts
        b, h, n = *scores.shape[:2], scores.shape[dim]
        self.shares = {}
        for part in parts:
            if part == "hist":
                rows = _programs(scores, dim, tiles_of(scores))[0]
                self.shares[part] = _numbers(scores, (rows, HIST_BINS), torch.int32)
            elif part != "count":
                dtype = torch.int32 if part == "nonfinite" else torch.float32
                self.shares[part] = _numbers(scores, (b, h, n), dtype)

    def pointers(self) -> Sums:
        """Where the kernel leaves them."""
        return Sums(**{"positive" if name == "legrad" else name: x for name, x in self.shares.items()})

    def found(self) -> Parts:
        """The parts."""
        found = {name: self._total(name, x) for name, x in self.shares.items()}
        if "count" in self.parts:
            found["count"] = count(_numbers(self.scores, ()).expand(self.scores.shape), self.over)
        return found

    def _total(self, name: str, x: Tensor) -> Tensor:
        if name == "hist":
            return x.sum(0)
        if name == "legrad":
            return x.sum(1) / (x.shape[1] * self.scores.shape[-2])
        dims = {"tensor": (0, 1, 2), "heads": (2,), "channels": (0, 1)}.get(self.over, ())
        if not dims:
            return x.to(torch.int64) if name == "nonfinite" else x
        return x.amax(dims) if name == "amax" else x.sum(dims)


def tiles_of(scores: Scores) -> Tiles:
    """How to cut up the work: by dtypes and shapes alone, so that no answer depends on what else is asked for."""
    widths = scores.q.shape[-1], scores.v.shape[-1]
    if scores.q.dtype == torch.float32:
        return Tiles(64, 64, 16, 4, 2)
    return Tiles(128, 128, 32 if any(width % 64 for width in widths) else 64, 8, 3)


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


def _numbers(scores: Scores, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=scores.q.device)


def _is_bounded(scores: Scores) -> bool:
    """Whether there are tiles of which no query sees anything, and it is known which."""
    return _bounds(scores) != (None, None) and scores.q_at is None and scores.k_at is None


def _bounds(scores: Scores) -> tuple[int | None, int | None]:
    """Query i sees keys from i - left to i + right."""
    left, right = scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    return tuple(None if x is None else max(min(x, FAR), -FAR) for x in (left, right))  # sums with it stay in int32


def _attention(scores: Scores) -> Attention:
    """The kernels' argument."""
    _, h, n, m = scores.shape
    mask = None if scores.mask is None else scores.mask.expand(scores.shape)
    cap = None if scores.softcap is None else float(scores.softcap)
    read = [_heads(_dense(t)) for t in (scores.q, scores.k, scores.v, scores.do)]
    far = 1 if any(x.far for x in read) else None  # one pointer stands for several of them
    return Attention(
        *(x._replace(far=far) for x in read),
        _heads(mask),
        *(scores.lse, scores.delta, scores.q_at, scores.k_at),
        *(float(scores.scale), cap, *_bounds(scores)),
        *(h, h // scores.k.shape[1], n, m),
    )


def _dense(t: Tensor) -> Tensor:
    """With columns that are neighbours."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _heads(t: Tensor | None) -> Heads:
    if t is None:
        return Heads(None)
    far = 256 * max(t.stride()[2:]) >= 2**30  # tiles have no more rows, or columns
    return Heads(t, *t.stride(), far=1 if far else None)


def _point(tensor: Tensor | None, accumulate: bool, sums: _Sums) -> Point:
    return Point(_heads(tensor), 1 if accumulate else None, sums.pointers())


def _apart(scores: Scores, written: Sequence[Tensor]) -> Scores:
    """With copies of what shares memory with a tensor that is written: programs would race."""
    changed = {
        name: t.clone()
        for name, t in scores._asdict().items()
        if isinstance(t, Tensor) and any(share_memory(t, w) for w in written)
    }
    return scores._replace(**changed)
