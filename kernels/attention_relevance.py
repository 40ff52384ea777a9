"""Relevance of attention: means over heads, one tile of (query, key) after another, so that no head's own is stored."""

import triton
import triton.language as tl

from retainops.kernels.attention import exp, keys_seen, per_row, product, scores


@triton.jit
def relevance_kernel(
    X,
    CHEFER,
    ATTN_GRAD,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """The sum over one of PARTS of the heads of relu(p * dp), and of p * dp, each over the number of all heads.

    CHEFER and ATTN_GRAD, of which one may be None, are (PARTS, batch, queries, keys), dense.
    """
    pid = tl.program_id(0)
    blocks_n, blocks_m = tl.cdiv(X.keys, BLOCK_N), tl.cdiv(X.queries, BLOCK_M)
    j, i = pid % blocks_n, pid // blocks_n % blocks_m
    outer = pid // blocks_n // blocks_m  # number of the part, then of the batch
    b, heads = (outer // PARTS).to(tl.int64), X.heads // PARTS
    part = outer % PARTS
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = j * BLOCK_N + tl.arange(0, BLOCK_N)
    queries, keys = rows[:, None], columns[None, :]
    first, last = keys_seen(X, i * BLOCK_M, BLOCK_M, BLOCK_N, SKIPS)
    steps = tl.where((j >= first) & (j < last), heads * CHUNKS, 0)
    chefer = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    attn_grad = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, steps):
        h = (part * heads + step // CHUNKS).to(tl.int64)
        c = step % CHUNKS
        qk = product(qk, X.q, X.k, b, h, h // X.group, rows, X.queries, columns, X.keys, c, D, CHUNKS, CH)
        dp = product(dp, X.do, X.v, b, h, h // X.group, rows, X.queries, columns, X.keys, c, DV, CHUNKS, CH)
        if c == CHUNKS - 1:
            p = exp(scores(qk, X, b, h, queries, keys) - per_row(X.lse, X, b, h, queries), X)
            each = p * dp
            if CHEFER is not None:
                chefer += tl.where(each < 0.0, 0.0, each)
            if ATTN_GRAD is not None:
                attn_grad += each
            qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    batches = tl.num_programs(0) // blocks_n // blocks_m // PARTS
    at = ((part * batches + b) * X.queries + queries) * X.keys + keys
    inside = (queries < X.queries) & (keys < X.keys)
    if CHEFER is not None:
        tl.store(CHEFER + at, chefer / X.heads, mask=inside)
    if ATTN_GRAD is not None:
        tl.store(ATTN_GRAD + at, attn_grad / X.heads, mask=inside)
