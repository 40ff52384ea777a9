"""Two numbers of each row of attention's scores: the logarithm of its sum, and what its softmax takes off dp."""

import triton
import triton.language as tl

from retainops.kernels.attention import LOG2_E, chunk, keys_seen, scores, whereabouts
from retainops.kernels.elementary import log
from retainops.kernels.unary import exp


@triton.jit
def lse_kernel(
    X,
    LSE,
    TOP,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """lse of BLOCK_M queries; 0 of a query that sees no key. With TOP it is of s - top, and top goes there."""
    b, h, m = whereabouts(X, X.queries, BLOCK_M)
    queries, keys = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    first, last = keys_seen(X, m, BLOCK_M, BLOCK_N, SKIPS)
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    q = chunk(X.q, b, h, m, X.queries, m * 0, D, D % CH == 0, CH, BLOCK_M)  # the only one, or the first
    for j in tl.range(first, last, num_stages=STAGES):
        n = j * BLOCK_N
        k = chunk(X.k, b, h // X.group, n, X.keys, m * 0, D, D % CH == 0, CH, BLOCK_N)
        qk = tl.dot(q, tl.trans(k), input_precision="ieee")
        for i in tl.static_range(1, CHUNKS):
            c = m * 0 + i * CH
            more = chunk(X.q, b, h, m, X.queries, c, D - c, D % CH == 0, CH, BLOCK_M)
            k = chunk(X.k, b, h // X.group, n, X.keys, c, D - c, D % CH == 0, CH, BLOCK_N)
            qk = tl.dot(more, tl.trans(k), qk, input_precision="ieee")
        s = scores(qk, X, (b, h, m, n, queries, keys))
        s = tl.where(keys < X.keys - n, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1, keep_dims=True))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * power(top - base, X) + tl.sum(power(s - base, X), axis=1, keep_dims=True)
        top = higher
    none = total == 0.0
    top, lse = tl.where(none, 0.0, top), tl.where(none, 0.0, log(total))
    first = (b.to(tl.int64) * X.heads + h) * X.queries + m
    if TOP is not None:
        tl.store(TOP + first + queries, top, mask=queries < X.queries - m)
    else:
        lse += top
    tl.store(LSE + first + queries, lse, mask=queries < X.queries - m)


@triton.jit
def power(x, X):
    """exp(x). Where q has 16 bits it takes two instructions."""
    if X.q.ptr.dtype.element_ty == tl.float32:
        return exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@triton.jit
def delta_kernel(X, OUT, DELTA, DV: tl.constexpr, CHUNKS: tl.constexpr, CH: tl.constexpr, BLOCK_M: tl.constexpr):
    """delta of BLOCK_M queries, from o."""
    b, h, m = whereabouts(X, X.queries, BLOCK_M)
    queries = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for i in range(CHUNKS):
        c = i * CH
        o = chunk(OUT, b, h, m, X.queries, c, DV - c, DV % CH == 0, CH, BLOCK_M).to(tl.float32)
        do = chunk(X.do, b, h, m, X.queries, c, DV - c, DV % CH == 0, CH, BLOCK_M).to(tl.float32)
        total += tl.sum(o * do, axis=1)
    first = (b.to(tl.int64) * X.heads + h) * X.queries + m
    tl.store(DELTA + first + queries, total, mask=queries < X.queries - m)
