"""What is kept of attention's gradients ds and dp: by blocks of queries, the gradients themselves and sums over each
query's keys; by blocks of keys, sums over each key's queries.

The second way round a tile lies on its side, keys down and queries along: sums are along rows either way, which takes
no exchange between warps. A program makes its sums alone and in one order: no atomics, the same bits at every run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.attention import exp, keys_seen, per_row, place, product, queries_seeing, scores, whereabouts
from retainops.kernels.points import magnitude_bits


class Sums(NamedTuple):
    """Where to leave each statistic: pointers to (batch, heads, rows), dense; None for one that nobody asked for."""

    sumsq: Any = None
    sum: Any = None
    abs_sum: Any = None
    act_grad: Any = None
    amax: Any = None
    nonfinite: Any = None
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
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """The gradients of BLOCK_M rows of s and p, and statistics of each row.

    PRODUCTS: 2, or 1 where p itself is of no account. SKIPS: leave out tiles in which p is 0.
    """
    b, h, i = whereabouts(X, X.queries, BLOCK_M)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = rows[:, None]
    first, last = keys_seen(X, i * BLOCK_M, BLOCK_M, BLOCK_N, SKIPS)
    lse, delta = of_rows(X, b, h, queries)
    of_s, of_p = no_sums(BLOCK_M), no_sums(BLOCK_M)
    qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first * CHUNKS, last * CHUNKS):
        columns = step // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        c = step % CHUNKS
        if PRODUCTS == 2:
            qk = product(qk, X.q, X.k, b, h, h // X.group, rows, X.queries, columns, X.keys, c, D, CHUNKS, CH)
        dp = product(dp, X.do, X.v, b, h, h // X.group, rows, X.queries, columns, X.keys, c, DV, CHUNKS, CH)
        if c == CHUNKS - 1:
            keys = columns[None, :]
            inside = (queries < X.queries) & (keys < X.keys)
            s, p, ds = gradient(qk, dp, lse, delta, X, b, h, queries, keys, PRODUCTS)
            of_p = add(of_p, P.sums, dp, p, inside)
            of_s = add(of_s, S.sums, ds, s, inside)
            keep(P, dp, b, h, queries, keys, inside)
            keep(S, ds, b, h, queries, keys, inside)
            qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    leave(of_p, P.sums, X, X.queries, b, h, queries)
    leave(of_s, S.sums, X, X.queries, b, h, queries)
    if SKIPS and S.grad.ptr is not None and S.accumulate is None:
        none = tl.broadcast_to(0.0 * (lse + delta), (BLOCK_M, BLOCK_N))  # a row that is nan is so from end to end
        for n in range(0, first):
            keep_all(S, none, X, b, h, queries, n, BLOCK_N)
        for n in range(last, tl.cdiv(X.keys, BLOCK_N)):
            keep_all(S, none, X, b, h, queries, n, BLOCK_N)


@triton.jit
def by_key_kernel(
    X,
    S,
    P,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Statistics of BLOCK_M columns of s and p, by blocks of BLOCK_N queries."""
    b, h, j = whereabouts(X, X.keys, BLOCK_M)
    rows = j * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = rows[:, None]
    first, last = queries_seeing(X, j * BLOCK_M, BLOCK_N, BLOCK_M, SKIPS)
    of_s, of_p = no_sums(BLOCK_M), no_sums(BLOCK_M)
    qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first * CHUNKS, last * CHUNKS):
        columns = step // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        c = step % CHUNKS
        if PRODUCTS == 2:
            qk = product(qk, X.k, X.q, b, h // X.group, h, rows, X.keys, columns, X.queries, c, D, CHUNKS, CH)
        dp = product(dp, X.v, X.do, b, h // X.group, h, rows, X.keys, columns, X.queries, c, DV, CHUNKS, CH)
        if c == CHUNKS - 1:
            queries = columns[None, :]
            inside = (queries < X.queries) & (keys < X.keys)
            lse, delta = of_rows(X, b, h, queries)
            s, p, ds = gradient(qk, dp, lse, delta, X, b, h, queries, keys, PRODUCTS)
            of_p = add(of_p, P.sums, dp, p, inside)
            of_s = add(of_s, S.sums, ds, s, inside)
            qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    leave(of_p, P.sums, X, X.keys, b, h, keys)
    leave(of_s, S.sums, X, X.keys, b, h, keys)


@triton.jit
def of_rows(X, b, h, queries):
    """lse and delta of these queries; 0 where they are not needed."""
    lse = tl.zeros_like(queries).to(tl.float32)
    delta = lse
    if X.lse is not None:
        lse = per_row(X.lse, X, b, h, queries)
    if X.delta is not None:
        delta = per_row(X.delta, X, b, h, queries)
    return lse, delta


@triton.jit
def gradient(qk, dp, lse, delta, X, b, h, queries, keys, PRODUCTS: tl.constexpr):
    """Tiles of s, p and ds. With one product there is no p, and nobody reads them."""
    if PRODUCTS == 2:
        s = scores(qk, X, b, h, queries, keys)
        p = exp(s - lse, X)
        return s, p, p * (dp - delta)
    else:
        return dp, dp, dp


@triton.jit
def no_sums(BLOCK_M: tl.constexpr):
    """The sums of no tile, in the order of `Sums`."""
    zero = tl.zeros((BLOCK_M, 1), tl.float32)
    count = tl.zeros((BLOCK_M, 1), tl.int32)
    return zero, zero, zero, zero, count, count, zero, tl.zeros((256,), tl.int32)


@triton.jit
def add(sums, S, g, value, inside):
    """The sums with a tile of the gradient g added, of the point whose value is `value`."""
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = sums
    g = tl.where(inside, g, 0.0)  # outside it need not be 0: 0 * inf is nan
    if S.sumsq is not None:
        sumsq += tl.sum(g * g, axis=1, keep_dims=True)
    if S.sum is not None:
        total += tl.sum(g, axis=1, keep_dims=True)
    if S.abs_sum is not None:
        abs_sum += tl.sum(tl.abs(g), axis=1, keep_dims=True)
    if S.act_grad is not None:
        act_grad += tl.sum(tl.where(inside, g * value, 0.0), axis=1, keep_dims=True)
    if S.amax is not None:  # as integers, so that nan counts as above inf
        amax = tl.maximum(amax, tl.max(magnitude_bits(g), axis=1, keep_dims=True))
    if S.nonfinite is not None:
        nonfinite += tl.sum((magnitude_bits(g) >= 0x7F800000).to(tl.int32), axis=1, keep_dims=True)
    if S.positive is not None:
        positive += tl.sum(tl.where(g < 0.0, 0.0, g), axis=1, keep_dims=True)
    if S.hist is not None:
        bins = tl.reshape(magnitude_bits(g) >> 23, (g.numel,))
        hist += tl.histogram(bins, 256, mask=tl.reshape(tl.broadcast_to(inside, g.shape), (g.numel,)))
    return sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist


@triton.jit
def leave(sums, S, X, SIZE, b, h, rows):
    """Store each row's sums."""
    sumsq, total, abs_sum, act_grad, amax, nonfinite, positive, hist = sums
    at, ok = (b * X.heads + h) * SIZE + rows, rows < SIZE
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
def keep(P, g, b, h, queries, keys, inside):
    """Store a tile of the gradient, if it was asked for."""
    if P.grad.ptr is not None:
        p = place(P.grad, b, h) + queries.to(tl.int64) * P.grad.row + keys.to(tl.int64) * P.grad.column
        if P.accumulate is not None:
            g += tl.load(p, mask=inside, other=0.0).to(tl.float32)
        tl.store(p, g.to(P.grad.ptr.dtype.element_ty), mask=inside)


@triton.jit
def keep_all(P, g, X, b, h, queries, n, BLOCK_N: tl.constexpr):
    """The same for block n of keys."""
    keys = (n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    keep(P, g, b, h, queries, keys, (queries < X.queries) & (keys < X.keys))
