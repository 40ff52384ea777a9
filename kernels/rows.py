"""Rows: tiles of (BLOCK_M rows, BLOCK_N columns) for ops that reduce over the last dim.

The host (retainops/ops/_rows.py) merges the dims before the last one. A row is one tile where it fits into registers;
a wider one is walked in chunks, from memory each time (the second time mostly from the cache).
"""

import triton
import triton.language as tl

from retainops.kernels.tiles import lanes_inside, load, offsets
from retainops.kernels.unary import divide


@triton.jit
def row_tile(i, column, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile number `i` down the rows, at a column; as kernels/tiles.py has it."""
    tiles_m = (SHAPE[-2] - 1) // BLOCK_M + 1
    m = (i % tiles_m).to(tl.int64) * BLOCK_M
    n = tl.cast(column, tl.int64)
    whole = (m + BLOCK_M <= SHAPE[-2]) & (n + BLOCK_N <= SHAPE[-1])
    return i // tiles_m, m, n, whole


@triton.jit
def tile_in_loop(i, column, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """As `row_tile`, for a loop of `num_stages`, where Triton starts loads ahead of their turn, but not in a branch.

    So either no access has a mask (WHOLE: BLOCK_N divides the row's length, and a tile is one row) or all have. A row
    is aligned for 128-bit accesses only where its length divides by 16, and there a mask does not split them.
    """
    z, m, n, _whole = row_tile(i, column, SHAPE, BLOCK_M, BLOCK_N)
    if WHOLE and BLOCK_M == 1:
        return z, m, n, True
    else:
        return z, m, n, False


@triton.jit
def load_inside(X, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """As `load`, for what is summed: a whole tile, 0 outside SHAPE, also of a tensor that does not move in it."""
    x = load(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if X.strides[-2] is None or X.strides[-1] is None:
        x = tl.where(lanes_inside(at, SHAPE, BLOCK_M, BLOCK_N), x, 0.0)
    return x


@triton.jit
def load_for_rows(W, none, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What all rows of a tile share, such as a weight, as many times as there are rows; `none` if there is no W.

    Loaded once, it would be one element a thread, and Triton may then lay out all that it meets like that. In a loop
    of `num_stages`, with a tile of `row_tile`, the load is in a branch: it comes from the cache each time. Otherwise
    Triton would copy it to shared memory ahead of each row.
    """
    if W.ptr is None:
        return tl.full((1, 1), none, DTYPE)
    else:
        p = tl.broadcast_to(W.ptr + offsets(W, at, SHAPE, BLOCK_M, BLOCK_N), (BLOCK_M, BLOCK_N))
        if at[3]:
            w = tl.load(p)
        else:
            ok = tl.broadcast_to(columns_inside(at, SHAPE, BLOCK_N), (BLOCK_M, BLOCK_N))
            w = tl.load(p, mask=ok, other=0.0)
        return w.to(DTYPE)


@triton.jit
def row_tiles(SHAPE, BLOCK_M: tl.constexpr):
    """How many tiles there are down the rows."""
    count = (SHAPE[-2] - 1) // BLOCK_M + 1
    for d in tl.static_range(len(SHAPE) - 2):
        count *= SHAPE[d]
    return count


@triton.jit
def columns_inside(at, SHAPE, BLOCK_N: tl.constexpr):
    """Which columns of a tile lie inside SHAPE, of shape (1, BLOCK_N)."""
    return (at[2] + tl.arange(0, BLOCK_N) < SHAPE[-1])[None, :]


@triton.jit
def moments(x, at, SHAPE, CENTRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mean of each row of a tile (0 if not CENTRED), and the sum of squares around it. x is 0 outside SHAPE."""
    mean = tl.zeros((BLOCK_M, 1), x.dtype)
    if CENTRED:
        count = tl.minimum(SHAPE[-1] - at[2], BLOCK_N).to(x.dtype)
        mean = divide(tl.sum(x, axis=1, keep_dims=True), count + mean)
        x = tl.where(columns_inside(at, SHAPE, BLOCK_N), x - mean, 0.0)
    return mean, tl.sum(x * x, axis=1, keep_dims=True)


@triton.jit
def add_to_moments(mean, square, count, m, s, more):
    """The moments of `count` elements and of `more` others together. Chan, Golub and LeVeque 1979."""
    part = more.to(mean.dtype) / (count + more).to(mean.dtype)
    away = m - mean
    return mean + away * part, square + s + away * (part * count) * away  # in this order: 0 of none, not 0 * inf


@triton.jit
def store_share_of_rows(DW, dw, program, at, SHAPE, BLOCK_N: tl.constexpr):
    """Store a program's share of a sum over rows, as `Shares` of retainops/ops/_rows.py lays them out."""
    if DW.ptr is not None:
        columns = at[2] + tl.arange(0, BLOCK_N)[None, :]
        p = DW.ptr + program.to(tl.int64) * SHAPE[-1] + columns
        tl.store(p, tl.sum(dw, axis=0, keep_dims=True), mask=columns < SHAPE[-1])
