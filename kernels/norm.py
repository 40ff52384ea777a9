"""Norms over the last dim: y = xhat * (w + offset) + b, xhat = (x - mean) * rstd. docs/ops/norm.md derives them.

With a MEAN it is layer norm; otherwise mean is 0: root mean square norm. With a residual R, x is the sum of the two,
which is stored too. Where a program walks over many tiles, in backward and along rows that are CHUNKED, the next ones
are on their way while it works on one (STAGES). In backward what all rows share is held in registers: the weights, if
they fit (HOLD), and a share of their gradients.
"""

import triton
import triton.language as tl

from retainops.kernels.elementary import rsqrt
from retainops.kernels.points import retain
from retainops.kernels.rows import (
    AGAIN,
    ONCE,
    add_to_lanes,
    load_for_rows,
    load_inside,
    moments,
    moments_of_lanes,
    row_tile,
    row_tiles,
    store_share_of_rows,
    straight_tile,
)
from retainops.kernels.tiles import load, store, store_grad
from retainops.kernels.unary import divide


@triton.jit
def norm_fwd_kernel(
    X,
    R,
    W,
    B,
    S,
    Y,
    MEAN,
    RSTD,
    EPS,
    OFFSET,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROUND: tl.constexpr,
    CHUNKED: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y, and mean and rstd for backward. A row is one tile, each of a program, or CHUNKED: then it is read twice.

    ROUND: the dtype that xhat is rounded to before w, or None.
    """
    i = tl.program_id(0)
    at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    eps = load(EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if not CHUNKED:
        x = summed(X, R, S, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        mean, square, away = moments(x, at, SHAPE, MEAN.ptr is not None, WHOLE, BLOCK_M, BLOCK_N)
        rstd = stored(MEAN, RSTD, mean, square, eps, at, SHAPE, BLOCK_M)
        xhat = rounded(away * rstd, ROUND)
        w = weight(W, OFFSET, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        b = load_for_rows(B, 0.0, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        store_normed(S, Y, W, B, x, xhat, w, b, at, SHAPE, BLOCK_M, BLOCK_N)
    else:
        mean = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
        square = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
        for n in tl.range(0, SHAPE[-1], BLOCK_N, num_stages=STAGES):
            at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            x = summed(X, R, S, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, AGAIN)
            mean, square = add_to_lanes(mean, square, x, n // BLOCK_N, at, SHAPE, MEAN.ptr is not None, WHOLE, BLOCK_N)
        mean, square = moments_of_lanes(mean, square, SHAPE, MEAN.ptr is not None, BLOCK_N)
        at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        rstd = stored(MEAN, RSTD, mean, square, eps, at, SHAPE, BLOCK_M)
        # Backwards: what was read last is the likeliest to be in the cache still.
        last = (SHAPE[-1] - 1) // BLOCK_N * BLOCK_N
        for n in tl.range(0, SHAPE[-1], BLOCK_N, num_stages=STAGES):
            at = straight_tile(i, last - n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            x = summed(X, R, S, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, ONCE)
            there = row_tile(i, last - n, SHAPE, BLOCK_M, BLOCK_N)
            w = weight(W, OFFSET, there, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
            b = load_for_rows(B, 0.0, there, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
            xhat = rounded((x - mean) * rstd, ROUND)
            store_normed(S, Y, W, B, x, xhat, w, b, at, SHAPE, BLOCK_M, BLOCK_N, ONCE)


@triton.jit
def norm_bwd_kernel(
    X,
    W,
    MEAN,
    RSTD,
    ALONG,
    LEVEL,
    DY,
    DS,
    OFFSET,
    DX,
    DW,
    DB,
    DSUMMED,
    DXHAT,
    DPRE,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROUND: tl.constexpr,
    HOLD: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * (w + offset): of one chunk of columns, in all rows.

    It has three uses. A chunk is a row: ALONG and LEVEL are None, and the two means are taken here. A chunk is a part
    of a row: they are known, from `norm_project_kernel`. Statistics alone, over columns: DX, DW and DB are None, and
    what only they need is not computed.
    """
    chunks = (SHAPE[-1] - 1) // BLOCK_N + 1
    column = tl.program_id(0) % chunks * BLOCK_N
    first, step = tl.program_id(0) // chunks, tl.num_programs(0) // chunks
    dw = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    db = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    if HOLD:
        at = straight_tile(0, column, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        w = weight(W, OFFSET, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    for i in tl.range(first, row_tiles(SHAPE, BLOCK_M), step, num_stages=STAGES):
        at = straight_tile(i, column, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        x, xhat, rstd = recomputed(X, MEAN, RSTD, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        dy = load_inside(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        if not HOLD:
            w = weight(W, OFFSET, row_tile(i, column, SHAPE, BLOCK_M, BLOCK_N), SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        g = dy * w
        if DW.ptr is not None:
            dw += dy * rounded(xhat, ROUND)
        if DB.ptr is not None:
            db += dy
        along, level = projections(ALONG, LEVEL, MEAN, g, xhat, at, SHAPE, DTYPE, BLOCK_M)
        retain(DXHAT, g, xhat, at, SHAPE, BLOCK_M, BLOCK_N)
        retain(DPRE, g, rounded(xhat, ROUND), at, SHAPE, BLOCK_M, BLOCK_N)
        dx = g - xhat * (along / SHAPE[-1])
        if MEAN.ptr is not None:
            dx -= level / SHAPE[-1]
        dx *= rstd
        if DS.ptr is not None:
            dx += load(DS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        store_grad(DX, dx, at, SHAPE, BLOCK_M, BLOCK_N)
        retain(DSUMMED, dx, x, at, SHAPE, BLOCK_M, BLOCK_N)
    at = straight_tile(0, column, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    store_share_of_rows(DW, dw, first, at, SHAPE, BLOCK_N)
    store_share_of_rows(DB, db, first, at, SHAPE, BLOCK_N)


@triton.jit
def norm_project_kernel(
    X,
    W,
    MEAN,
    RSTD,
    DY,
    OFFSET,
    ALONG,
    LEVEL,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What of g the norm removes: its sums along xhat and, if there is a MEAN, along the ones."""
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # the first rows last: backward wants them first, from the cache
    along = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    level = tl.zeros((BLOCK_M, BLOCK_N), DTYPE)
    for n in tl.range(0, SHAPE[-1], BLOCK_N, num_stages=STAGES):
        at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        _x, xhat, _rstd = recomputed(X, MEAN, RSTD, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        w = weight(W, OFFSET, row_tile(i, n, SHAPE, BLOCK_M, BLOCK_N), SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        g = load_inside(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N) * w
        along += g * xhat
        level += g
    at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    store(ALONG, tl.sum(along, axis=1, keep_dims=True), at, SHAPE, BLOCK_M, 1)
    if MEAN.ptr is not None:
        store(LEVEL, tl.sum(level, axis=1, keep_dims=True), at, SHAPE, BLOCK_M, 1)


@triton.jit
def projections(ALONG, LEVEL, MEAN, g, xhat, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sums of g along xhat and along the ones (0 if there is no MEAN): of a whole row, or those that are known."""
    if ALONG.ptr is None:
        along = tl.sum(g * xhat, axis=1, keep_dims=True)
    else:
        along = load(ALONG, at, SHAPE, DTYPE, BLOCK_M, 1)
    if MEAN.ptr is None:
        return along, tl.zeros_like(along)
    elif LEVEL.ptr is None:
        return along, tl.sum(g, axis=1, keep_dims=True)
    else:
        return along, load(LEVEL, at, SHAPE, DTYPE, BLOCK_M, 1)


@triton.jit
def summed(
    X, R, S, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None
):
    """A tile of x; with a residual, of x + r as it will be rounded and stored."""
    x = load_inside(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION)
    if S.ptr is not None:
        x = (x + load_inside(R, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION)).to(S.ptr.dtype.element_ty).to(DTYPE)
    return x


@triton.jit
def weight(W, OFFSET, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """w + offset; 1 if there is no w."""
    w = load_for_rows(W, 1.0, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if W.ptr is not None:
        w += load(OFFSET, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    return w


@triton.jit
def stored(MEAN, RSTD, mean, square, eps, at, SHAPE, BLOCK_M: tl.constexpr):
    """1 / sqrt(variance + eps), from the sum of squares around the mean; it is stored, and so is the mean if wanted."""
    variance = divide(square, SHAPE[-1] + tl.zeros_like(square))
    rstd = rsqrt(variance + eps)
    if MEAN.ptr is not None:
        store(MEAN, mean, at, SHAPE, BLOCK_M, 1)
    store(RSTD, rstd, at, SHAPE, BLOCK_M, 1)
    return rstd


@triton.jit
def rounded(xhat, ROUND: tl.constexpr):
    """What the weight multiplies."""
    if ROUND is None:
        return xhat
    else:
        return xhat.to(ROUND).to(xhat.dtype)


@triton.jit
def store_normed(
    S, Y, W, B, x, xhat, w, b, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None
):
    """y and, of a sum, x."""
    if S.ptr is not None:
        store(S, x, at, SHAPE, BLOCK_M, BLOCK_N, EVICTION)
    if W.ptr is not None:
        xhat *= w
    if B.ptr is not None:
        xhat += b
    store(Y, xhat, at, SHAPE, BLOCK_M, BLOCK_N, EVICTION)


@triton.jit
def recomputed(X, MEAN, RSTD, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x, xhat and rstd again, in backward."""
    x = load_inside(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    rstd = load(RSTD, at, SHAPE, DTYPE, BLOCK_M, 1)
    if MEAN.ptr is not None:
        return x, (x - load(MEAN, at, SHAPE, DTYPE, BLOCK_M, 1)) * rstd, rstd
    else:
        return x, x * rstd, rstd
