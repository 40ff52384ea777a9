"""Relevance of attention: means over heads, one tile of (query, key) after another, so that no head's own is stored."""

import triton
import triton.language as tl

from retainops.kernels.attention import add_chunk, inside, keys_seen, per_query, probabilities, scores


@triton.jit
def relevance_kernel(
    X,
    MAP,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_V: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """The sum over one of PARTS of the heads of p * dp, or of relu(p * dp), divided by the number of all heads.

    MAP is (PARTS, batch, queries, keys), dense.
    """
    blocks_n, blocks_m = tl.cdiv(X.keys, BLOCK_N), tl.cdiv(X.queries, BLOCK_M)
    pid = tl.program_id(0)
    n, m = pid % blocks_n * BLOCK_N, pid // blocks_n % blocks_m * BLOCK_M
    outer = pid // blocks_n // blocks_m
    b, part, heads = outer // PARTS, outer % PARTS, X.heads // PARTS
    queries, keys = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    first, last = keys_seen(X, m, BLOCK_M, BLOCK_N, SKIPS)
    EACH: tl.constexpr = CHUNKS + CHUNKS_V
    seen = (n >= first * BLOCK_N) & (n < last * BLOCK_N)
    steps = tl.where(seen, heads * EACH, 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SKIPS:
        none = tl.zeros((BLOCK_M, 1), tl.float32)
        for i in range(tl.where(seen, 0, heads)):  # a row that is nan is so from end to end
            none += 0.0 * per_query(X.lse, X, (b, part * heads + i, m, n, queries, keys))
        total += none
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        at = (b, part * heads + step // EACH, m, n, queries, keys)
        product = add_chunk(product, X, b, at[1], m, n, step % EACH, D, DV, CHUNKS, CH, False)
        if step % EACH == CHUNKS - 1:
            s = scores(product, X, at)
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if step % EACH == EACH - 1:
            each = probabilities(s, X, at) * product
            if RELU:
                each = tl.maximum(each, 0.0, propagate_nan=tl.PropagateNan.ALL)
            total += each
            product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    batches = tl.num_programs(0) // blocks_n // blocks_m // PARTS
    tile = ((part * batches + b).to(tl.int64) * X.queries + m) * X.keys + n
    there = inside(X, (b, part, m, n, queries, keys))
    tl.store(MAP + tile + (queries.to(tl.int64) * X.keys + keys), total / X.heads, mask=there)
