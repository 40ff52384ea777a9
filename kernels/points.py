"""Points: what a backward kernel does with the gradient of an interior value, if anybody asked.

A kernel writes one line for each point, `retain(DC, dc, c, ...)`. What was not asked for is a None pointer, and its
code is not compiled. Statistics are shares, one a tile, which the host adds up (or takes the maximum of): no atomics,
the same bits at every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.tiles import lanes_inside, load, share_of_sum, store_grad, store_share, tile_number


class Stats(NamedTuple):
    """Where each tile leaves its share of each statistic; None for one that nobody asked for."""

    sumsq: Any = None
    sum: Any = None
    abs_sum: Any = None
    act_grad: Any = None
    amax: Any = None
    nonfinite: Any = None
    half: Any = None  # 1: the point is of float16, in which more is inf
    hist: Any = None  # 256 counts a tile
    strides: tuple = (None, None)  # as in Operand, in statistics
    tiles: tuple = (None, None)
    by_warp: Any = None  # 1: each of a tile's warps leaves a share of its own
    two_warps: Any = None  # 1: there are two of them, None: four


class Retained(NamedTuple):
    """What was asked of a point; `ptr` is None if its full gradient was not."""

    ptr: Any
    strides: tuple
    accumulate: Any  # 1: add to what is there; None: overwrite
    stats: Stats
    tiles: tuple = (None, None)  # as in Operand: a point that is broadcast on the way to the output is summed
    number: Any = None
    seed: Any = None


LANES: tl.constexpr = tl.constexpr(32)
"""Of a warp."""


@triton.jit
def retain(DC, dc, c, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keep the gradient `dc` of the point whose value is `c`, or statistics of it."""
    take_stats(DC.stats, dc, c, at, SHAPE, BLOCK_M, BLOCK_N)
    if DC.ptr is not None:
        if DC.accumulate is not None:
            dc += load(DC, at, SHAPE, dc.dtype, BLOCK_M, BLOCK_N)
        store_grad(DC, dc, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def take_stats(S, g, c, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This tile's share of each statistic of g, from g before it is rounded."""
    g, product = tl.broadcast_to(g, (BLOCK_M, BLOCK_N)), tl.broadcast_to(g * c, (BLOCK_M, BLOCK_N))
    if at[3]:  # Inside, nothing needs a mask: `where` would copy g for every lane, which takes registers.
        leave_shares(S, g, product, None, at, SHAPE, BLOCK_M, BLOCK_N)
    else:
        # Outside SHAPE g need not be 0: an operand that is broadcast is not masked.
        ok = lanes_inside(at, SHAPE, BLOCK_M, BLOCK_N)
        g, product = tl.where(ok, g, 0.0), tl.where(ok, product, 0.0)
        leave_shares(S, g, product, ok, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def leave_shares(S, g, product, ok, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`take_stats` of g and g * c that are 0 outside SHAPE; ok: which lanes are inside, None: all."""
    if S.sumsq is not None:
        leave_sum(S.sumsq, S, g * g, at, SHAPE, BLOCK_M, BLOCK_N)
    if S.sum is not None:
        leave_sum(S.sum, S, g, at, SHAPE, BLOCK_M, BLOCK_N)
    if S.abs_sum is not None:
        leave_sum(S.abs_sum, S, tl.abs(g), at, SHAPE, BLOCK_M, BLOCK_N)
    if S.act_grad is not None:
        leave_sum(S.act_grad, S, product, at, SHAPE, BLOCK_M, BLOCK_N)
    if S.amax is not None:
        # As integers, magnitudes order as they do as floats, and nan is above inf: a float maximum may drop it.
        bits = magnitude_bits(g)
        if S.by_warp is not None:
            share = tl.max(tl.max(tl.max(of_warps(S, bits, BLOCK_N), axis=3), axis=0), axis=1)
            leave_of_warps(S.amax, share.to(g.dtype, bitcast=True), at, SHAPE, BLOCK_M, BLOCK_N)
        else:
            share = share_of_max(S, bits).to(g.dtype, bitcast=True)
            store_share(S.amax, S, share, at, SHAPE, BLOCK_M, BLOCK_N)
    if S.nonfinite is not None:
        is_nonfinite = magnitude_bits(g.to(tl.float32)) >= least_nonfinite(S)
        if g.dtype == tl.float64:
            is_nonfinite = magnitude_bits(g) >= 0x7FF0000000000000
        leave_sum(S.nonfinite, S, is_nonfinite.to(tl.int32), at, SHAPE, BLOCK_M, BLOCK_N)
    if S.hist is not None:
        bins = tl.reshape(magnitude_bits(g.to(tl.float32)) >> 23, (BLOCK_M * BLOCK_N,))
        if ok is None:
            counts = tl.histogram(bins, 256)
        else:
            counts = tl.histogram(bins, 256, mask=tl.reshape(ok, (BLOCK_M * BLOCK_N,)))
        tl.store(S.hist + tile_number(at, SHAPE, BLOCK_M, BLOCK_N) * 256 + tl.arange(0, 256), counts)


@triton.jit
def least_nonfinite(S):
    """Of float32, the bits of the least magnitude that is not finite once it is rounded to the point's dtype."""
    return 0x477FF000 if S.half is not None else 0x7F800000  # 65520 rounds to an inf of float16


@triton.jit
def leave_sum(P, S, x, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave the tile's share of a sum at P, or those of its warps."""
    if S.by_warp is not None:
        share = tl.sum(tl.sum(tl.sum(of_warps(S, x, BLOCK_N), axis=3), axis=0), axis=1)
        leave_of_warps(P, share, at, SHAPE, BLOCK_M, BLOCK_N)
    else:
        store_share(P, S, share_of_sum(S, x), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def of_warps(S, x, BLOCK_N: tl.constexpr):
    """A tile of one row by (access of a thread, warp, lane, element): threads have two 128-bit accesses each.

    If Triton lays the tile out in another way this is as right, and slower: warps wait for each other then.
    """
    WARPS: tl.constexpr = 2 if S.two_warps is not None else 4
    return tl.reshape(x, (2, WARPS, LANES, BLOCK_N // (2 * WARPS * LANES)))


@triton.jit
def leave_of_warps(P, share, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave a share for each warp at P: lane 0 of each does."""
    WARPS: tl.constexpr = share.shape[0]
    warp, lane = tl.arange(0, WARPS)[:, None], tl.arange(0, LANES)[None, :]
    # Addresses of the other lanes, which store nothing, are neighbours: so Triton lays lanes out along this dim.
    p = P + tile_number(at, SHAPE, BLOCK_M, BLOCK_N) * WARPS + warp + lane
    tl.store(p, tl.broadcast_to(share[:, None], (WARPS, LANES)), mask=tl.broadcast_to(lane == 0, (WARPS, LANES)))


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, as an integer."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def share_of_max(X, x):
    """The maximum over the tile `x` in the directions in which X is reduced."""
    if X.tiles[-2] is not None:
        x = tl.max(x, axis=0, keep_dims=True)
    if X.tiles[-1] is not None:
        x = tl.max(x, axis=1, keep_dims=True)
    return x
