"""Rows: tiles of (BLOCK_M rows, BLOCK_N columns) for ops that reduce over the last dim.

The host (retainops/ops/_rows.py) merges the dims before the last one. A row is one tile where it fits into registers;
a wider one is walked in chunks, from memory each time (the second time mostly from the cache).
"""

import triton
import triton.language as tl

from retainops.kernels.tiles import lanes_inside, load, offsets
from retainops.kernels.unary import divide

AGAIN: tl.constexpr = tl.constexpr("evict_last")
"""What is read of a row that is read twice stays in the cache, ..."""
ONCE: tl.constexpr = tl.constexpr("evict_first")
"""... and what is not touched again makes room for it."""


@triton.jit
def row_tile(i, column, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tile number `i` down the rows, at a column; as kernels/tiles.py has it."""
    tiles_m = (SHAPE[-2] - 1) // BLOCK_M + 1
    m = (i % tiles_m).to(tl.int64) * BLOCK_M
    n = tl.cast(column, tl.int64)
    whole = (m + BLOCK_M <= SHAPE[-2]) & (n + BLOCK_N <= SHAPE[-1])
    return i // tiles_m, m, n, whole


@triton.jit
def straight_tile(i, column, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr):
    """As `row_tile`, for code without branches: either no access has a mask or all have.

    No access has one where all tiles lie inside SHAPE (WHOLE). A row is aligned for 128-bit accesses only where its
    length divides by 16, and there a mask does not split them. Two copies of the code, one with masks, would take more
    registers, twice as many in layer norm; and in a loop of `num_stages` Triton does not start loads ahead of their
    turn from within a branch.
    """
    z, m, n, _whole = row_tile(i, column, SHAPE, BLOCK_M, BLOCK_N)
    if WHOLE:
        return z, m, n, True
    else:
        return z, m, n, False


@triton.jit
def load_inside(
    X, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None
):
    """As `load`, for what is summed: a whole tile, 0 outside SHAPE, also of a tensor that does not move in it."""
    x = load(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION)
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
    return leading(SHAPE[-1] - at[2], BLOCK_N)


@triton.jit
def leading(count, BLOCK_N: tl.constexpr):
    """Which columns of a tile are among the first `count`; numbered in int32, since int64 takes two registers each."""
    return tl.arange(0, BLOCK_N)[None, :] < tl.minimum(count, BLOCK_N).to(tl.int32)


@triton.jit
def moments(x, at, SHAPE, CENTRED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mean of each row of a tile (0 if not CENTRED), the sum of squares around it, and x - mean.

    x is 0 outside SHAPE; WHOLE: nothing is outside.
    """
    mean = tl.zeros((BLOCK_M, 1), x.dtype)
    if CENTRED:
        count = tl.minimum(SHAPE[-1] - at[2], BLOCK_N).to(x.dtype) + mean
        mean = divide(tl.sum(x, axis=1, keep_dims=True), count)
        x = centred(x, mean, at, SHAPE, WHOLE, BLOCK_N)
        square = tl.sum(x * x, axis=1, keep_dims=True)
        few = hardly_varies(mean, square, count)
        if tl.max(few.to(tl.int32)) > 0:
            left = tl.where(few, divide(tl.sum(x, axis=1, keep_dims=True), count), 0.0)
            x = centred(x, left, at, SHAPE, WHOLE, BLOCK_N)
            square = tl.sum(x * x, axis=1, keep_dims=True)
            mean += left
        return mean, square, x
    else:
        return mean, tl.sum(x * x, axis=1, keep_dims=True), x


@triton.jit
def hardly_varies(mean, square, count):
    """Of which rows little is left around the mean.

    The sum that gives a mean is rounded. Of a row of equal values that is all that is left, and a small eps makes it
    large. So of these rows the mean of what is left is removed, too, in a branch: one that is hardly ever taken costs
    less than one more sum.
    """
    little = 2.0**-15 * mean
    return square < count * (little * little)


@triton.jit
def centred(x, mean, at, SHAPE, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """x - mean, and 0 outside SHAPE."""
    x = x - mean
    if not WHOLE:
        x = tl.where(columns_inside(at, SHAPE, BLOCK_N), x, 0.0)
    return x


@triton.jit
def add_to_lanes(mean, square, x, i, at, SHAPE, CENTRED: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The moments of each lane's own elements, with chunk number i of a row, x. Welford 1962.

    No lane waits for another one before the row is over.
    """
    if CENTRED:
        away = x - mean
        one = tl.full((1, 1), 1.0, x.dtype)
        # Division is approximate here, in float32. Not for the first element, which the mean is then, exactly.
        more = mean + away * tl.where(i == 0, one, one / (one * (i + 1)))
        away *= x - more
        if WHOLE:
            return more, square + away
        else:
            inside = columns_inside(at, SHAPE, BLOCK_N)
            return tl.where(inside, more, mean), square + tl.where(inside, away, 0.0)
    else:
        return mean, square + x * x  # x is 0 outside SHAPE


@triton.jit
def moments_of_lanes(mean, square, SHAPE, CENTRED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The mean of each row (0 if not CENTRED) and the sum of squares around it, from those of its lanes.

    Means are taken from one of them: so the mean of equal values is exact. Chan, Golub and LeVeque 1979.
    """
    if CENTRED:
        columns = tl.arange(0, BLOCK_N)[None, :]
        count = (SHAPE[-1] // BLOCK_N + (columns < SHAPE[-1] % BLOCK_N).to(tl.int32)).to(mean.dtype)
        one = tl.sum(tl.where(columns == 0, mean, 0.0), axis=1, keep_dims=True)
        away = mean - one
        level = tl.sum(count * away, axis=1, keep_dims=True)
        level = divide(level, tl.zeros_like(level) + SHAPE[-1])
        away -= level
        return one + level, tl.sum(square + count * (away * away), axis=1, keep_dims=True)
    else:
        return tl.zeros((square.shape[0], 1), square.dtype), tl.sum(square, axis=1, keep_dims=True)


@triton.jit
def store_share_of_rows(DW, dw, program, at, SHAPE, BLOCK_N: tl.constexpr):
    """Store a program's share of a sum over rows, as `Shares` of retainops/ops/_rows.py lays them out."""
    if DW.ptr is not None:
        columns = at[2] + tl.arange(0, BLOCK_N)[None, :]
        p = DW.ptr + program.to(tl.int64) * SHAPE[-1] + columns
        tl.store(p, tl.sum(dw, axis=0, keep_dims=True), mask=columns < SHAPE[-1])


@triton.jit
def sum_shares_kernel(A, B, SUM_A, SUM_B, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add up the shares of BLOCK_N columns of A, or of B if there is one: the first programs A's, the others B's.

    Shares lie in rows of SHAPE[-1], and there are SHAPE[-2] of them.
    """
    blocks = (SHAPE[-1] - 1) // BLOCK_N + 1
    column = tl.program_id(0) % blocks * BLOCK_N
    if B.ptr is None or tl.program_id(0) < blocks:
        sum_columns(A, SUM_A, column, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    else:
        sum_columns(B, SUM_B, column, SHAPE, DTYPE, BLOCK_M, BLOCK_N)


@triton.jit
def sum_columns(A, SUM, column, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the sums of the columns of A from `column` on."""
    rows, columns = tl.arange(0, BLOCK_M)[:, None], column + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for m in range(0, SHAPE[-2], BLOCK_M):
        ok = (m + rows < SHAPE[-2]) & (columns < SHAPE[-1])
        total += tl.load(A.ptr + (m + rows).to(tl.int64) * SHAPE[-1] + columns, mask=ok, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    tl.store(SUM.ptr + columns, total.to(SUM.ptr.dtype.element_ty), mask=columns < SHAPE[-1])
