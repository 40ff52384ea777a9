"""softmax and log_softmax (LOG) over the last dim. docs/ops/softmax.md derives them.

s = scale * x, with a floating mask added; -inf where a BOOLEAN mask is 0 and, if CAUSAL, where the column is above the
row's query. A row is one tile, or CHUNKED: then it is read twice each way.
"""

import triton
import triton.language as tl

from retainops.kernels.elementary import log
from retainops.kernels.points import retain
from retainops.kernels.rows import AGAIN, ONCE, leading, straight_tile
from retainops.kernels.tiles import load, offsets, store, store_grad
from retainops.kernels.unary import exp, reciprocal


@triton.jit
def softmax_fwd_kernel(
    X,
    MASK,
    QUERY,
    SCALE,
    Y,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    CHUNKED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK_M rows of y."""
    i = tl.program_id(0)
    if not CHUNKED:
        at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        s = scaled(X, MASK, QUERY, SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL)
        top = tl.max(s, axis=1, keep_dims=True)
        total = tl.sum(exp(s - top), axis=1, keep_dims=True)
        store(Y, normalised(s, top, total, LOG), at, SHAPE, BLOCK_M, BLOCK_N)
    else:
        top = tl.full((BLOCK_M, 1), float("-inf"), DTYPE)
        total = tl.zeros((BLOCK_M, 1), DTYPE)
        for n in range(0, SHAPE[-1], BLOCK_N):
            at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            s = scaled(X, MASK, QUERY, SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL, AGAIN)
            higher = tl.maximum(top, tl.max(s, axis=1, keep_dims=True))
            base = finite_or_0(higher)
            total = total * exp(top - base) + tl.sum(exp(s - base), axis=1, keep_dims=True)
            top = higher
        for n in range(0, SHAPE[-1], BLOCK_N):
            at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            s = scaled(X, MASK, QUERY, SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL, ONCE)
            store(Y, normalised(s, top, total, LOG), at, SHAPE, BLOCK_M, BLOCK_N, ONCE)


@triton.jit
def softmax_bwd_kernel(
    X,
    MASK,
    QUERY,
    SCALE,
    Y,
    DY,
    DX,
    DMASK,
    DSCALED,
    DP,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    LOG: tl.constexpr,
    CHUNKED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dscaled = p * (dy - sum(dy * p)), or dy - p * sum(dy) if LOG. X is there only if its values are asked for."""
    i = tl.program_id(0)
    if not CHUNKED:
        at = straight_tile(i, 0, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
        y, dy = of_outputs(Y, DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
        ds = gradient(y, dy, level(y, dy, LOG), LOG)
        s = ds
        if X.ptr is not None:
            s = scaled(X, MASK, QUERY, SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL)
        retain(DP, dy, y, at, SHAPE, BLOCK_M, BLOCK_N)
        retain(DSCALED, ds, s, at, SHAPE, BLOCK_M, BLOCK_N)
        store_dx(DX, DMASK, MASK, QUERY, SCALE, ds, at, SHAPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL)
    else:
        removed = tl.zeros((BLOCK_M, 1), DTYPE)
        for n in range(0, SHAPE[-1], BLOCK_N):
            at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            y, dy = of_outputs(Y, DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, AGAIN)
            removed += level(y, dy, LOG)
        for n in range(0, SHAPE[-1], BLOCK_N):
            at = straight_tile(i, n, SHAPE, BLOCK_M, BLOCK_N, WHOLE)
            y, dy = of_outputs(Y, DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, ONCE)
            ds = gradient(y, dy, removed, LOG)
            s = ds
            if X.ptr is not None:
                s = scaled(X, MASK, QUERY, SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL)
            retain(DP, dy, y, at, SHAPE, BLOCK_M, BLOCK_N)
            retain(DSCALED, ds, s, at, SHAPE, BLOCK_M, BLOCK_N)
            store_dx(DX, DMASK, MASK, QUERY, SCALE, ds, at, SHAPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL, ONCE)


@triton.jit
def scaled(
    X,
    MASK,
    QUERY,
    SCALE,
    at,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVICTION: tl.constexpr = None,
):
    """A tile of s; -inf outside SHAPE."""
    s = load(X, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION) * load(SCALE, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    if MASK.ptr is not None and not BOOLEAN:
        s += load(MASK, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    return tl.where(open_to(MASK, QUERY, at, SHAPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL), s, float("-inf"))


@triton.jit
def open_to(
    MASK,
    QUERY,
    at,
    SHAPE,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Which columns each row sees: inside SHAPE and not masked. A row's offset in QUERY is its place among queries."""
    seen = leading(SHAPE[-1] - at[2], BLOCK_N)
    if BOOLEAN:
        seen = seen & (load(MASK, at, SHAPE, tl.int32, BLOCK_M, BLOCK_N) != 0)
    if CAUSAL:
        seen = seen & leading(offsets(QUERY, at, SHAPE, BLOCK_M, 1) - at[2] + 1, BLOCK_N)
    return seen


@triton.jit
def finite_or_0(top):
    """So that a chunk of which nothing is seen adds exp(-inf - 0) = 0 to a sum, and not exp(-inf + inf) = nan."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def normalised(s, top, total, LOG: tl.constexpr):
    if LOG:
        return s - top - log(total)
    else:
        return exp(s - top) * reciprocal(total)


@triton.jit
def of_outputs(
    Y, DY, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None
):
    """y and its gradient, 0 in columns outside SHAPE, also of a gradient that is one number a row."""
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION)
    if DY.strides[-1] is None:
        dy = tl.where(leading(SHAPE[-1] - at[2], BLOCK_N), dy, 0.0)
    return load(Y, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N, EVICTION), dy


@triton.jit
def level(y, dy, LOG: tl.constexpr):
    """What softmax takes off dy in each row: a tile's part of the sum."""
    if LOG:
        return tl.sum(dy, axis=1, keep_dims=True)
    else:
        return tl.sum(dy * y, axis=1, keep_dims=True)


@triton.jit
def gradient(y, dy, removed, LOG: tl.constexpr):
    """The gradient of s."""
    if LOG:
        return dy - exp(y) * removed
    else:
        return y * (dy - removed)


@triton.jit
def store_dx(
    DX,
    DMASK,
    MASK,
    QUERY,
    SCALE,
    ds,
    at,
    SHAPE,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOOLEAN: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVICTION: tl.constexpr = None,
):
    """A masked element has the gradient 0, also in a row of which nothing is seen, where ds is nan."""
    if BOOLEAN or CAUSAL:
        ds = tl.where(open_to(MASK, QUERY, at, SHAPE, BLOCK_M, BLOCK_N, BOOLEAN, CAUSAL), ds, 0.0)
    store_grad(DMASK, ds, at, SHAPE, BLOCK_M, BLOCK_N)
    dx = ds * load(SCALE, at, SHAPE, ds.dtype, BLOCK_M, BLOCK_N)
    store_grad(DX, dx, at, SHAPE, BLOCK_M, BLOCK_N, EVICTION)
