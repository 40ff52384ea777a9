"""Group norm of groups that are one tile each, of channels by positions: x is read once each way.

x is of shape (batch, groups, channels of a group, ...); w and b have one number for each group and channel. What is
behind channels, the positions, is the last merged dim. Other groups: kernels/group_norm.py.
"""

import triton
import triton.language as tl

from retainops.kernels.elementary import rsqrt
from retainops.kernels.group_norm import affine, normalised
from retainops.kernels.points import retain
from retainops.kernels.rows import hardly_varies, load_inside, straight_tile
from retainops.kernels.tiles import lanes_inside, load, store, store_grad
from retainops.kernels.unary import divide


@triton.jit
def group_norm_tile_fwd_kernel(
    X,
    W,
    B,
    EPS,
    Y,
    MEAN,
    VAR,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y of one group, which is one tile; its mean and its variance at each of its channels."""
    at = straight_tile(tl.program_id(0), 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    x = load_inside(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    size = size_of_group(SHAPE, DTYPE)
    mean = divide(sum_of_group(x), size)
    away = from_mean(x, mean, at, SHAPE, WHOLE, BLOCK_M, BLOCK_N)
    square = sum_of_group(away * away)
    if tl.max(hardly_varies(mean, square, size).to(tl.int32)) > 0:
        left = divide(sum_of_group(away), size)
        away = from_mean(away, left, at, SHAPE, WHOLE, BLOCK_M, BLOCK_N)
        square = sum_of_group(away * away)
        mean += left
    variance = divide(square, size)
    store(MEAN, mean, at, SHAPE, BLOCK_M, 1)
    store(VAR, variance, at, SHAPE, BLOCK_M, 1)
    y = away * rsqrt(variance + load(EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N))
    store(Y, affine(y, W, B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def group_norm_tile_bwd_kernel(
    X,
    MEAN,
    VAR,
    W,
    EPS,
    DY,
    DX,
    DW,
    DB,
    DXHAT,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dx of one group, which is one tile; dw = sum(dy * xhat) and db = sum(dy) of each of its channels."""
    at = straight_tile(tl.program_id(0), 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
    xhat, rstd = normalised(X, MEAN, VAR, EPS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    g = load_inside(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dw = tl.sum(g * xhat, axis=1, keep_dims=True)
    db = tl.sum(g, axis=1, keep_dims=True)
    if DW.ptr is not None:
        store(DW, dw, at, SHAPE, BLOCK_M, 1)
    if DB.ptr is not None:
        store(DB, db, at, SHAPE, BLOCK_M, 1)
    if W.ptr is not None:
        w = load(W, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        g, dw, db = g * w, dw * w, db * w
    if DX.ptr is not None:
        size = size_of_group(SHAPE, DTYPE)
        along = divide(tl.sum(dw, axis=0, keep_dims=True), size)
        level = divide(tl.sum(db, axis=0, keep_dims=True), size)
        store_grad(DX, (g - level - xhat * along) * rstd, at, SHAPE, BLOCK_M, BLOCK_N)
    retain(DXHAT, g, xhat, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def from_mean(x, mean, at, SHAPE, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x - mean, and 0 outside SHAPE."""
    x = x - mean
    if not WHOLE:
        x = tl.where(lanes_inside(at, SHAPE, BLOCK_M, BLOCK_N), x, 0.0)
    return x


@triton.jit
def sum_of_group(x):
    """Of a tile that is one group, of shape (1, 1)."""
    return tl.sum(x, keep_dims=True)


@triton.jit
def size_of_group(SHAPE, DTYPE: tl.constexpr):
    """How many elements a group has that is one tile, of shape (1, 1)."""
    return (tl.full((1, 1), 1, tl.int64) * SHAPE[-2] * SHAPE[-1]).to(DTYPE)
