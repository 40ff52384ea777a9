"""The scores of attention made again, tile by tile, and their gradients. docs/ops/attention.md derives them.

    s = cap * tanh(scale * q k^T / cap) + mask     what enters the softmax; without a cap: scale * q k^T + mask
    p = exp(s - lse)                               lse: the logarithm of the sum of exp(s) over a row
    dp = do v^T
    ds = p * (dp - delta)                          delta: the sum of do * o over a row, which is that of p * dp

A tile takes two matrix products, over the columns of q and k and over those of v and do. Both run in chunks of CH
columns, and one loop counts the chunks of all tiles of a program: so loads stay ahead of the tensor cores from one tile
to the next, and memory on the chip does not grow with the head size, which need not be a power of two.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.elementary import log
from retainops.kernels.unary import exp as exact_exp
from retainops.kernels.unary import tanh


class Heads(NamedTuple):
    """A tensor of (batch, head, row, column): its pointer, or None, and four strides in elements."""

    ptr: Any
    batch: Any = 0
    head: Any = 0
    row: Any = 0
    column: Any = 0


class Attention(NamedTuple):
    """What attention was called with, and what is left of its forward."""

    q: Heads
    k: Heads  # of heads // group heads, like v
    v: Heads
    do: Heads
    mask: Heads  # bool (True: takes part) or floating point (added)
    lse: Any  # (batch, heads, queries), dense, as delta
    delta: Any
    q_at: Any  # positions of picked queries and keys; None: 0, 1, 2, ...
    k_at: Any
    scale: Any
    cap: Any
    left: Any  # query i sees keys from i - left to i + right; None: without a bound
    right: Any
    heads: Any
    group: Any
    queries: Any
    keys: Any


@triton.jit
def whereabouts(X, SIZE, BLOCK: tl.constexpr):
    """This program's (batch, head, block of SIZE rows); blocks of one head are neighbours, which share their reads."""
    blocks = tl.cdiv(SIZE, BLOCK)
    pid = tl.program_id(0)
    return (pid // blocks // X.heads).to(tl.int64), (pid // blocks % X.heads).to(tl.int64), pid % blocks


@triton.jit
def place(H, b, h):
    """Where a matrix of H begins."""
    return H.ptr + b * H.batch + h * H.head


@triton.jit
def chunk(H, b, h, rows, SIZE, c, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, CH: tl.constexpr):
    """Chunk c of some rows of H, of which there are SIZE; 0 outside."""
    columns = c * CH + tl.arange(0, CH)
    inside = (rows < SIZE)[:, None]
    if CHUNKS * CH != WIDTH:
        inside = inside & (columns < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * H.row + columns.to(tl.int64)[None, :] * H.column
    return tl.load(place(H, b, h) + at, mask=inside, other=0.0)


@triton.jit
def product(
    total,
    ROWS,
    COLUMNS,
    b,
    row_head,
    column_head,
    rows,
    row_count,
    columns,
    column_count,
    c,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
):
    """Add to a tile the products of chunk c of its ROWS and its COLUMNS."""
    x = chunk(ROWS, b, row_head, rows, row_count, c, WIDTH, CHUNKS, CH)
    y = chunk(COLUMNS, b, column_head, columns, column_count, c, WIDTH, CHUNKS, CH)
    return tl.dot(x, tl.trans(y), total, input_precision="ieee")


@triton.jit
def scores(qk, X, b, h, queries, keys):
    """A tile of s, from one of q k^T; -inf where a query does not see a key. `queries` and `keys` number its rows and
    columns, or its columns and rows: (n, 1) and (1, n)."""
    s = qk * X.scale
    if X.cap is not None:
        s = X.cap * tanh(s / X.cap)
    seen = (queries < X.queries) & (keys < X.keys)
    if X.mask.ptr is not None:
        at = queries.to(tl.int64) * X.mask.row + keys.to(tl.int64) * X.mask.column
        if X.mask.ptr.dtype.element_ty == tl.int1:
            seen = seen & tl.load(place(X.mask, b, h) + at, mask=seen, other=False)
        else:
            s += tl.load(place(X.mask, b, h) + at, mask=seen, other=0.0).to(tl.float32)
    if X.left is not None or X.right is not None:
        i, j = positions(X.q_at, queries, X.queries), positions(X.k_at, keys, X.keys)
        if X.left is not None:
            seen = seen & (j >= i - X.left)
        if X.right is not None:
            seen = seen & (j <= i + X.right)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def positions(AT, index, SIZE):
    if AT is None:
        return index
    else:
        return tl.load(AT + index, mask=index < SIZE, other=0).to(tl.int32)


@triton.jit
def per_row(P, X, b, h, queries):
    """The numbers of these queries in a (batch, heads, queries) tensor."""
    return tl.load(P + (b * X.heads + h) * X.queries + queries, mask=queries < X.queries, other=0.0)


@triton.jit
def exp(x, X):
    """Where q has 16 bits, the hardware's own: an error of some float32 roundings is far below that of q."""
    if X.q.ptr.dtype.element_ty == tl.float32:
        return exact_exp(x)
    else:
        return tl.exp(x)


@triton.jit
def keys_seen(X, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SKIPS: tl.constexpr):
    """The blocks of keys, from the first to before the last, that queries from m on see anything of."""
    first, last = 0, tl.cdiv(X.keys, BLOCK_N)
    if SKIPS and X.right is not None:
        last = tl.minimum(last, tl.cdiv(tl.maximum(m + BLOCK_M + X.right, 0), BLOCK_N))
    if SKIPS and X.left is not None:
        first = tl.minimum(tl.maximum(m - X.left, 0) // BLOCK_N, last)
    return first, last


@triton.jit
def queries_seeing(X, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SKIPS: tl.constexpr):
    """The blocks of queries, from the first to before the last, that see anything of keys from n on."""
    first, last = 0, tl.cdiv(X.queries, BLOCK_M)
    if SKIPS and X.left is not None:
        last = tl.minimum(last, tl.cdiv(n + BLOCK_N + X.left, BLOCK_M))
    if SKIPS and X.right is not None:
        first = tl.minimum(tl.maximum(n - X.right, 0) // BLOCK_M, last)
    return first, last


@triton.jit
def lse_kernel(
    X,
    LSE,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """lse of BLOCK_M queries; 0 of a query that sees no key."""
    b, h, i = whereabouts(X, X.queries, BLOCK_M)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = keys_seen(X, i * BLOCK_M, BLOCK_M, BLOCK_N, SKIPS)
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first * CHUNKS, last * CHUNKS):
        columns = step // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        c = step % CHUNKS
        qk = product(qk, X.q, X.k, b, h, h // X.group, rows, X.queries, columns, X.keys, c, D, CHUNKS, CH)
        if c == CHUNKS - 1:
            s = scores(qk, X, b, h, rows[:, None], columns[None, :])
            higher = tl.maximum(top, tl.max(s, axis=1, keep_dims=True))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * exp(top - base, X) + tl.sum(exp(s - base, X), axis=1, keep_dims=True)
            top = higher
            qk = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lse = tl.where(total == 0.0, 0.0, top + log(total))
    queries = rows[:, None]
    tl.store(LSE + (b * X.heads + h) * X.queries + queries, lse, mask=queries < X.queries)


@triton.jit
def delta_kernel(
    X, O, DELTA, DV: tl.constexpr, CHUNKS: tl.constexpr, CH: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta of BLOCK_M queries, from o."""
    b, h, i = whereabouts(X, X.queries, BLOCK_M)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for c in range(0, CHUNKS):
        o = chunk(O, b, h, rows, X.queries, c, DV, CHUNKS, CH).to(tl.float32)
        do = chunk(X.do, b, h, rows, X.queries, c, DV, CHUNKS, CH).to(tl.float32)
        total += tl.sum(o * do, axis=1)
    tl.store(DELTA + (b * X.heads + h) * X.queries + rows, total, mask=rows < X.queries)
