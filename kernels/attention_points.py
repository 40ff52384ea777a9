"""What is kept of attention's gradients ds and dp: by blocks of queries, the gradients themselves and sums over each
query's keys; by blocks of keys, sums over each key's queries.

The second way round a tile lies on its side, keys down and queries along: sums are along rows either way, which takes
no exchange between warps. A program makes its sums alone and in one order: no atomics, the same bits at every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.attention import (
    add_chunk,
    inside,
    keys_seen,
    per_query,
    pointers,
    probabilities,
    queries_seeing,
    scores,
    whereabouts,
)
from retainops.kernels.points import least_nonfinite, magnitude_bits


class Sums(NamedTuple):
    """Where to leave each statistic: pointers to (batch, heads, rows), dense; None for one that nobody asked for."""

    sumsq: Any = None
    sum: Any = None
    abs_sum: Any = None
    act_grad: Any = None
    amax: Any = None
    nonfinite: Any = None
    half: Any = None  # as in `Stats`
    positive: Any = None  # the sum of what is above 0
    hist: Any = None  # 256 counts a program


class Point(NamedTuple):
    """What was asked of s or p."""

    grad: Any  # Heads; its ptr is None where the gradient itself was not asked for
    accumulate: Any  # 1: add to what is there; None: overwrite
    sums: Sums


@triton.jit
def by_query_kernel(
    X,
    S,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_V: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """The gradients of BLOCK_M rows of s and p, and statistics of each row.

    CHUNKS is 0 where p itself is of no account. SKIPS: leave out tiles in which it is 0.
    """
    b, h, m = whereabouts(X, X.queries, BLOCK_M)
    queries, keys = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    first, last = keys_seen(X, m, BLOCK_M, BLOCK_N, SKIPS)
    of_s, of_p = no_sums(BLOCK_M), no_sums(BLOCK_M)
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    EACH: tl.constexpr = CHUNKS + CHUNKS_V
    for step in range(first * EACH, last * EACH):
        at = (b, h, m, step // EACH * BLOCK_N, queries, keys)
        product = add_chunk(product, X, b, h, m, at[3], step % EACH, D, DV, CHUNKS, CH, False)
        if CHUNKS > 0 and step % EACH == CHUNKS - 1:
            s = scores(product, X, at)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if step % EACH == EACH - 1:
            p, ds = gradient(s, product, X, at, CHUNKS > 0)
            of_p = add(of_p, P.sums, product, p, X, at)
            of_s = add(of_s, S.sums, ds, s, X, at)
            keep(P, product, X, at)
            keep(S, ds, X, at)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SKIPS:
        skipped = X.keys - (tl.minimum(last * BLOCK_N, X.keys) - tl.minimum(first * BLOCK_N, X.keys))
        of_p, of_s = add_skipped(of_p, of_s, P.sums, S.sums, X, (b, h, m, 0, queries, keys), skipped)
    leave(of_p, P.sums, X, X.queries, b, h, m, queries)
    leave(of_s, S.sums, X, X.queries, b, h, m, queries)
    if SKIPS and S.grad.ptr is not None and S.accumulate is None:
        _p, none = nothing(X, (b, h, m, 0, queries, keys))
        none = tl.broadcast_to(none, (BLOCK_M, BLOCK_N))
        for j in range(first):
            keep(S, none, X, (b, h, m, j * BLOCK_N, queries, keys))
        for j in range(last, tl.cdiv(X.keys, BLOCK_N)):
            keep(S, none, X, (b, h, m, j * BLOCK_N, queries, keys))


@triton.jit
def by_key_kernel(
    X,
    S,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_V: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """Statistics of BLOCK_M columns of s and p, by blocks of BLOCK_N queries."""
    b, h, n = whereabouts(X, X.keys, BLOCK_M)
    keys, queries = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    first, last = queries_seeing(X, n, BLOCK_N, BLOCK_M, SKIPS)
    of_s, of_p = no_sums(BLOCK_M), no_sums(BLOCK_M)
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    EACH: tl.constexpr = CHUNKS + CHUNKS_V
    for step in range(first * EACH, last * EACH):
        at = (b, h, step // EACH * BLOCK_N, n, queries, keys)
        product = add_chunk(product, X, b, h, at[2], n, step % EACH, D, DV, CHUNKS, CH, True)
        if CHUNKS > 0 and step % EACH == CHUNKS - 1:
            s = scores(product, X, at)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if step % EACH == EACH - 1:
            p, ds = gradient(s, product, X, at, CHUNKS > 0)
            of_p = add(of_p, P.sums, product, p, X, at)
            of_s = add(of_s, S.sums, ds, s, X, at)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SKIPS:
        for i in range(first + tl.cdiv(X.queries, BLOCK_N) - last):
            at = (b, h, tl.where(i < first, i, i - first + last) * BLOCK_N, n, queries, keys)
            of_p, of_s = add_skipped(of_p, of_s, P.sums, S.sums, X, at, 1)
    leave(of_p, P.sums, X, X.keys, b, h, n, keys)
    leave(of_s, S.sums, X, X.keys, b, h, n, keys)


@triton.jit
def gradient(s, dp, X, at, HAS_S: tl.constexpr):
    """Tiles of p and ds, which nobody reads where there is no s, or no delta."""
    p = dp
    if HAS_S:
        p = probabilities(s, X, at)
    ds = p
    if X.delta is not None:
        ds = p * (dp - per_query(X.delta, X, at))
    return p, ds


@triton.jit
def no_sums(BLOCK_M: tl.constexpr):
    """The sums of no tile, in the order of `Sums`."""
    zero = tl.zeros((BLOCK_M, 1), tl.float32)
    count = tl.zeros((BLOCK_M, 1), tl.int32)
    return zero, zero, zero, zero, count, count, zero, tl.zeros((256,), tl.int32)


@triton.jit
def add(sums, S, g, value, X, at):
    """The sums with a tile of the gradient g added, of the point whose value is `value`."""
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = sums
    there = inside(X, at)
    g = tl.where(there, g, 0.0)  # outside it need not be 0: 0 * inf is nan
    if S.sumsq is not None:
        sumsq += tl.sum(g * g, axis=1, keep_dims=True)
    if S.sum is not None:
        total += tl.sum(g, axis=1, keep_dims=True)
    if S.abs_sum is not None:
        abs_sum += tl.sum(tl.abs(g), axis=1, keep_dims=True)
    if S.act_grad is not None:
        act_grad += tl.sum(tl.where(there, g * value, 0.0), axis=1, keep_dims=True)
    if S.amax is not None:  # as integers, so that nan counts as above inf
        amax = tl.maximum(amax, tl.max(magnitude_bits(g), axis=1, keep_dims=True))
    if S.nonfinite is not None:
        nonfinite += tl.sum((magnitude_bits(g) >= least_nonfinite(S)).to(tl.int32), axis=1, keep_dims=True)
    if S.positive is not None:
        positive += tl.sum(tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL), axis=1, keep_dims=True)
    if S.hist is not None:
        bins = tl.reshape(magnitude_bits(g) >> 23, (g.numel,))
        hist += tl.histogram(bins, 256, mask=tl.reshape(tl.broadcast_to(there, g.shape), (g.numel,)))
    return sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist


@triton.jit
def nothing(X, at):
    """Of each query of a tile in which p is 0: p * dp, and ds. A row that is nan is so from end to end."""
    p = 0.0 * per_query(X.lse, X, at)
    ds = p
    if X.delta is not None:
        ds += 0.0 * per_query(X.delta, X, at)
    return p, ds


@triton.jit
def add_skipped(of_p, of_s, P, S, X, at, times):
    """The sums with a tile added in which p is 0, or so many columns of it."""
    p, ds = nothing(X, at)
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = of_s
    none = tl.sum(ds, axis=1, keep_dims=True)
    if S.sumsq is not None:
        sumsq += none
    if S.sum is not None:
        total += none
    if S.abs_sum is not None:
        abs_sum += none
    if S.amax is not None:
        amax = tl.maximum(amax, magnitude_bits(none))
    if S.nonfinite is not None:
        nonfinite += tl.sum((ds != ds).to(tl.int32), axis=1, keep_dims=True) * times
    of_s = sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = of_p
    if P.act_grad is not None:
        act_grad += tl.sum(p, axis=1, keep_dims=True)
    return (sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist), of_s


@triton.jit
def leave(sums, S, X, SIZE, b, h, first, rows):
    """Store each row's sums."""
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = sums
    at, ok = ((b.to(tl.int64) * X.heads + h) * SIZE + first) + rows, rows < SIZE - first
    if S.sumsq is not None:
        tl.store(S.sumsq + at, sumsq, mask=ok)
    if S.sum is not None:
        tl.store(S.sum + at, total, mask=ok)
    if S.abs_sum is not None:
        tl.store(S.abs_sum + at, abs_sum, mask=ok)
    if S.act_grad is not None:
        tl.store(S.act_grad + at, act_grad, mask=ok)
    if S.amax is not None:
        tl.store(S.amax + at, amax.to(tl.float32, bitcast=True), mask=ok)
    if S.nonfinite is not None:
        tl.store(S.nonfinite + at, nonfinite, mask=ok)
    if S.positive is not None:
        tl.store(S.positive + at, positive, mask=ok)
    if S.hist is not None:
        tl.store(S.hist + tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256), hist)


@triton.jit
def keep(P, g, X, at):
    """Store a tile of the gradient, if it was asked for."""
    if P.grad.ptr is not None:
        b, h, m, n, queries, keys = at
        p, there = pointers(P.grad, b, h, m, n, queries, keys), inside(X, at)
        if P.accumulate is not None:
            g += tl.load(p, mask=there, other=0.0).to(tl.float32)
        tl.store(p, g.to(P.grad.ptr.dtype.element_ty), mask=there)
