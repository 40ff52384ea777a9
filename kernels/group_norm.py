"""Group norm: y = xhat * w + b, xhat = (x - mean) * rstd of a group of channels. docs/ops/group_norm.md derives it.

x, of shape (batch, channels, ...), is walked in tiles as it lies in memory. What is summed over a group is first summed
over all but batch and channel: a share for each tile and channel. A program for each group adds its shares up, and
leaves the result at each of the group's channels. So no kernel but that one knows of groups, and w, b, mean and the
others are operands of shape (batch or 1, channels, 1, ...). Groups that registers hold: kernels/group_norm_tiles.py.
"""

import triton
import triton.language as tl

from retainops.kernels.elementary import rsqrt
from retainops.kernels.points import retain
from retainops.kernels.rows import hardly_varies, load_inside
from retainops.kernels.tiles import lanes_inside, load, share_of_sum, store, store_grad, store_share, tile
from retainops.kernels.unary import divide


@triton.jit
def group_norm_moments_kernel(
    X, COUNT, MEAN, SQUARE, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """This tile's share of each channel: how many elements, their mean, and the sum of squares around that."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    x = load_inside(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    count = terms_of_sum(MEAN, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    mean = divide(share_of_sum(MEAN, x), count)
    inside = lanes_inside(at, SHAPE, BLOCK_M, BLOCK_N)
    away = tl.where(inside, x - mean, 0.0)
    square = share_of_sum(MEAN, away * away)
    few = hardly_varies(mean, square, count)
    if tl.max(few.to(tl.int32)) > 0:
        left = tl.where(few, divide(share_of_sum(MEAN, away), count), 0.0)
        away = tl.where(inside, away - left, 0.0)
        square = share_of_sum(MEAN, away * away)
        mean += left
    store_share(COUNT.ptr, MEAN, count, at, SHAPE, BLOCK_M, BLOCK_N)
    store_share(MEAN.ptr, MEAN, mean, at, SHAPE, BLOCK_M, BLOCK_N)
    store_share(SQUARE.ptr, MEAN, square, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def terms_of_sum(X, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many elements of a tile go into each of X's sums.

    From the sizes: of the sum of a mask Triton makes one of thousands of additions in every thread.
    """
    count = tl.full((1, 1), 1, tl.int64)
    if X.tiles[-2] is not None:
        count *= tl.minimum(SHAPE[-2] - at[1], BLOCK_M)
    if X.tiles[-1] is not None:
        count *= tl.minimum(SHAPE[-1] - at[2], BLOCK_N)
    return count.to(DTYPE)


@triton.jit
def group_norm_fwd_kernel(
    X, MEAN, VAR, W, B, EPS, Y, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One tile of y."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    y, _rstd = normalised(X, MEAN, VAR, EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    store(Y, affine(y, W, B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def affine(xhat, W, B, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """xhat * w + b, of what there is of the two."""
    if W.ptr is not None:
        xhat *= load(W, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if B.ptr is not None:
        xhat += load(B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    return xhat


@triton.jit
def group_norm_sums_kernel(
    X, MEAN, VAR, EPS, DY, DW, DB, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """This tile's share of dw = sum(dy * xhat) and db = sum(dy) of each batch and channel."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    xhat, _rstd = normalised(X, MEAN, VAR, EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    store_grad(DW, dy * xhat, at, SHAPE, BLOCK_M, BLOCK_N)
    store_grad(DB, dy, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def group_norm_bwd_kernel(
    X,
    MEAN,
    VAR,
    W,
    ALONG,
    LEVEL,
    EPS,
    DY,
    DX,
    DXHAT,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * w. LEVEL and ALONG are the means."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    xhat, rstd = normalised(X, MEAN, VAR, EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    g = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if W.ptr is not None:
        g *= load(W, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if DX.ptr is not None:
        along = load(ALONG, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        level = load(LEVEL, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        store_grad(DX, (g - level - xhat * along) * rstd, at, SHAPE, BLOCK_M, BLOCK_N)
    retain(DXHAT, g, xhat, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def normalised(X, MEAN, VAR, EPS, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of xhat, and the rstd of its channels."""
    x = load(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    mean = load(MEAN, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    variance = load(VAR, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    rstd = rsqrt(variance + load(EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N))
    return (x - mean) * rstd, rstd


@triton.jit
def group_norm_gather_kernel(COUNTS, MEANS, SQUARES, MEAN, VAR, SHARES, CHANNELS, BLOCK: tl.constexpr):
    """The mean and the variance of one group, from SHARES shares of each of its channels."""
    n = SHARES * CHANNELS
    total, count = tl.zeros((BLOCK,), MEAN.dtype.element_ty), tl.zeros((BLOCK,), MEAN.dtype.element_ty)
    # Around one of them, so that the mean of equal ones is exact.
    one = tl.load(MEANS + tl.program_id(0).to(tl.int64) * CHANNELS)
    for i in range(0, n, BLOCK):
        p, ok = share_of_group(i, SHARES, CHANNELS, BLOCK)
        c = tl.load(COUNTS + p, mask=ok, other=0.0)
        total += c * (tl.load(MEANS + p, mask=ok, other=0.0) - one)
        count += c
    size = tl.sum(count, axis=0, keep_dims=True)
    mean = one + divide(tl.sum(total, axis=0, keep_dims=True), size)
    square = tl.zeros((BLOCK,), MEAN.dtype.element_ty)
    for i in range(0, n, BLOCK):
        p, ok = share_of_group(i, SHARES, CHANNELS, BLOCK)
        away = tl.load(MEANS + p, mask=ok, other=0.0) - mean
        square += tl.load(SQUARES + p, mask=ok, other=0.0) + tl.load(COUNTS + p, mask=ok, other=0.0) * away * away
    store_at_channels(MEAN, mean, CHANNELS, BLOCK)
    store_at_channels(VAR, divide(tl.sum(square, axis=0, keep_dims=True), size), CHANNELS, BLOCK)


@triton.jit
def group_norm_project_kernel(DW, DB, W, ALONG, LEVEL, SHARES, CHANNELS, SIZE, GROUPS, STRIDE, BLOCK: tl.constexpr):
    """The means over one group of SIZE elements of g * xhat and of g, from shares of dw and db."""
    along, level = tl.zeros((BLOCK,), ALONG.dtype.element_ty), tl.zeros((BLOCK,), ALONG.dtype.element_ty)
    first = (tl.program_id(0) % GROUPS).to(tl.int64) * CHANNELS
    for i in range(0, SHARES * CHANNELS, BLOCK):
        p, ok = share_of_group(i, SHARES, CHANNELS, BLOCK)
        dw, db = tl.load(DW + p, mask=ok, other=0.0), tl.load(DB + p, mask=ok, other=0.0)
        if W is not None:
            channel = first + (i + tl.arange(0, BLOCK)) % CHANNELS
            w = tl.load(W + channel * STRIDE, mask=ok, other=0.0).to(dw.dtype)
            dw, db = dw * w, db * w
        along += dw
        level += db
    size = tl.full((1,), SIZE, along.dtype)
    store_at_channels(ALONG, divide(tl.sum(along, axis=0, keep_dims=True), size), CHANNELS, BLOCK)
    store_at_channels(LEVEL, divide(tl.sum(level, axis=0, keep_dims=True), size), CHANNELS, BLOCK)


@triton.jit
def share_of_group(i, SHARES, CHANNELS, BLOCK: tl.constexpr):
    """Offsets of shares number i, i + 1, ... of this program's group, and which of them there are.

    Shares lie in rows of all channels of all groups.
    """
    j = i + tl.arange(0, BLOCK)
    row = tl.num_programs(0).to(tl.int64) * CHANNELS
    return j // CHANNELS * row + tl.program_id(0).to(tl.int64) * CHANNELS + j % CHANNELS, j < SHARES * CHANNELS


@triton.jit
def store_at_channels(X, x, CHANNELS, BLOCK: tl.constexpr):
    """Store x at each channel of this program's group."""
    p = X + tl.program_id(0).to(tl.int64) * CHANNELS
    for i in range(0, CHANNELS, BLOCK):
        channel = i + tl.arange(0, BLOCK)
        tl.store(p + channel, tl.broadcast_to(x, (BLOCK,)), mask=channel < CHANNELS)
