"""How the kernels of attention's scores are launched: tiles, and arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton

from retainops.buffers import share_memory
from retainops.kernels.attention import Attention, Heads
from retainops.ops._scores import Scores

Tensor = torch.Tensor
LONGEST = 2**29
"""Queries or keys that the kernels take: what they count then stays in int32."""
FAR = 2**30
"""As good as no bound to a window."""


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
    added = scores.mask is not None and scores.mask.dtype != torch.bool
    # Comparisons of places take registers too, and so does `top`.
    cut = kind == "grad" and (added or bounds(scores) != (None, None))
    masked = kind == "relevance" and scores.mask is not None and not hopper  # and so do pointers to a mask
    columns = 64 if kind == "statistics" or cut or masked or blackwell else 128
    widths = scores.q.shape[-1], scores.v.shape[-1]
    chunks = (64, 32) if hopper or blackwell else (32,)  # others hold a chunk in registers
    # Of chunks that are not full not more than a fifth is wasted.
    chunk = next((c for c in chunks if all(4 * c * triton.cdiv(w, c) <= 5 * w for w in widths)), 16)
    if kind == "lse":
        width = triton.next_power_of_2(max(widths[0], 16))  # q as a whole stays where it is
        return Tiles(64, 64, width if width <= 128 else chunk, 4, 3 if hopper else 2)
    if hopper and chunk == 64 and all(104 <= w <= 128 for w in widths) and scores.mask is None:  # as measured
        if kind == "relevance":
            return Tiles(64, 128, 128, 4, 2)
        if kind == "legrad":
            return Tiles(128, 128, 128, 8, 2)
    return Tiles(128, columns, chunk, 8, 3)


def constants_of(scores: Scores, tiles: Tiles, values: bool, **constants: Any) -> dict[str, Any]:
    """What is compiled into a kernel; `values`: it needs those of s or p."""
    d, dv = scores.q.shape[-1], scores.v.shape[-1]
    chunks = {"CHUNKS": triton.cdiv(d, tiles.chunk) if values else 0, "CHUNKS_V": triton.cdiv(dv, tiles.chunk)}
    blocks = {"CH": tiles.chunk, "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns}
    warps = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return {"D": d, "DV": dv, **chunks, **blocks, **warps, **constants}


def programs_of(scores: Scores, dim: int, tiles: Tiles) -> tuple[int, int, int]:
    b, h = scores.shape[:2]
    return b * h * triton.cdiv(scores.shape[dim], tiles.rows), 1, 1


def numbers(scores: Scores, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or torch.float32, device=scores.q.device)


def is_bounded(scores: Scores) -> bool:
    """Whether there are tiles of which no query sees anything, and it is known which."""
    return bounds(scores) != (None, None) and scores.q_at is None and scores.k_at is None


def bounds(scores: Scores) -> tuple[int | None, int | None]:
    """Query i sees keys from i - left to i + right."""
    left, right = scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    left, right = (None if x is None else max(min(x, FAR), -FAR) for x in (left, right))  # sums stay in int32
    return left, right


def arguments(scores: Scores) -> Attention:
    """The kernels' argument."""
    _, h, n, m = scores.shape
    mask = None if scores.mask is None else scores.mask.expand(scores.shape)
    cap = None if scores.softcap is None else float(scores.softcap)
    return Attention(
        *alike(dense_columns(t) for t in (scores.q, scores.k, scores.v, scores.do)),
        heads(mask),
        *(scores.lse, scores.delta, scores.top, scores.q_at, scores.k_at),
        *(float(scores.scale), cap, *bounds(scores)),
        *(h, h // scores.k.shape[1], n, m),
    )


def alike(tensors: Iterable[Tensor]) -> list[Heads]:
    """One pointer stands for one or another of them: so what is compiled in must be true of all."""
    read = [heads(t) for t in tensors]
    far = 1 if any(x.far for x in read) else None
    if any(stride % 8 for x in read for stride in (x.batch, x.head, x.row)):
        return [x._replace(far=far) for x in read]
    return [Heads(x.ptr, x.batch // 8, x.head // 8, x.row // 8, x.column, far, 1) for x in read]


def dense_columns(t: Tensor) -> Tensor:
    """With columns that are neighbours."""
    return t if t.stride(-1) == 1 else t.contiguous()


def heads(t: Tensor | None) -> Heads:
    if t is None:
        return Heads(None)
    far = 256 * max(t.stride()[2:]) >= 2**30  # tiles have no more rows, or columns
    return Heads(t, *t.stride(), far=1 if far else None)


def apart(scores: Scores, written: Sequence[Tensor]) -> Scores:
    """With copies of what shares memory with a tensor that is written: programs would race."""
    changed: dict[str, Any] = {
        name: t.clone()
        for name, t in scores._asdict().items()
        if isinstance(t, Tensor) and any(share_memory(t, w) for w in written)
    }
    return scores._replace(**changed)
