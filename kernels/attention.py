"""The scores of attention made again, tile by tile, and their gradients. docs/ops/attention.md derives them.

    s = cap * tanh(scale * q k^T / cap) + mask     what enters the softmax; without a cap: scale * q k^T + mask
    p = exp(s - lse)                               lse: the logarithm of the sum of exp(s) over a row
      = exp((s - top) - lse)                       with an added mask, and in float32: lse is that of s - top, a maximum
    dp = do v^T
    ds = p * (dp - delta)                          delta: the sum of do * o over a row, which is that of p * dp

A tile takes two matrix products, q k^T and then do v^T. Both are summed in chunks of CH columns, and one loop counts
the chunks of both, of all the tiles of a program: so loads stay ahead of the tensor cores from one tile to the next,
shared memory does not grow with the head size, which need not be a power of two, and one set of pointers serves both
products (two sets spill).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.unary import divide, exp, tanh


class Heads(NamedTuple):
    """A tensor of (batch, head, row, column): its pointer, or None, and four strides in elements.

    `far` is 1 where offsets within a tile take 64 bits; from one tile to another they always do. `eighths` is 1 where
    all strides but that of columns are given in units of 8 elements: so Triton knows that they divide by 8, and reads
    128 bits at a time. By itself it finds out about 16, which a head size of 72 is no multiple of.
    """

    ptr: Any
    batch: Any = 0
    head: Any = 0
    row: Any = 0
    column: Any = 0
    far: Any = None
    eighths: Any = None


class Attention(NamedTuple):
    """What attention was called with, and what is left of its forward. Columns of q, k, v and do are neighbours."""

    q: Heads
    k: Heads  # of heads // group heads, like v
    v: Heads
    do: Heads
    mask: Heads  # bool (True: takes part) or floating point (added)
    lse: Any  # (batch, heads, queries), dense, as delta
    delta: Any
    top: Any  # as lse, which is then of s - top; None: 0. Beside a large one float32 has no room for the logarithm
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
    """This program's (batch, head, first row); programs of one head are neighbours, since they read the same."""
    blocks = tl.cdiv(SIZE, BLOCK)
    pid = tl.program_id(0)
    return pid // blocks // X.heads, pid // blocks % X.heads, pid % blocks * BLOCK


@triton.jit
def pointers(H, b, h, row, column, rows, columns):
    """To the elements (row + rows, column + columns) of a head; rows and columns count within a tile."""
    return pointers_from(H.ptr, whole_of(H), H.column, H.far, H.eighths, b, h, row, column, rows, columns)


@triton.jit
def whole_of(H):
    """The strides of a batch, a head and a row."""
    return H.batch, H.head, H.row


@triton.jit
def pointers_from(P, strides, stride, far, eighths, b, h, row, column, rows, columns):
    """As `pointers`, of what a tensor is made of: Triton 3.6 makes no NamedTuple with a None in a kernel."""
    UNIT: tl.constexpr = 1 if eighths is None else 8
    batch, head, line = strides
    tile = P + (b.to(tl.int64) * batch + h.to(tl.int64) * head + row.to(tl.int64) * line) * UNIT
    tile += column.to(tl.int64) * stride
    if far is not None:
        return tile + (rows.to(tl.int64) * line * UNIT + columns.to(tl.int64) * stride)
    else:
        return tile + (rows * (line * UNIT) + columns * stride)


@triton.jit
def add_chunk(
    total,
    X,
    b,
    h,
    m,
    n,
    step,
    D: tl.constexpr,
    DV: tl.constexpr,
    CHUNKS: tl.constexpr,
    CH: tl.constexpr,
    KEYS_DOWN: tl.constexpr,
):
    """Add a chunk to the product of queries from m on and keys from n on: of q k^T, or from step CHUNKS on of do v^T.

    KEYS_DOWN: the tile lies on its side, a key a row.
    """
    second = step >= CHUNKS
    c = tl.where(second, step - CHUNKS, step) * CH
    width = tl.where(second, DV, D) - c
    WHOLE: tl.constexpr = (CHUNKS == 0 or D % CH == 0) and DV % CH == 0
    if CHUNKS == 0:
        Q, of_queries, K, of_keys = X.do.ptr, whole_of(X.do), X.v.ptr, whole_of(X.v)
    else:
        Q, of_queries = tl.where(second, X.do.ptr, X.q.ptr), either(second, X.do, X.q)
        K, of_keys = tl.where(second, X.v.ptr, X.k.ptr), either(second, X.v, X.k)
    if KEYS_DOWN:
        k = chunk_from(K, of_keys, X.q, b, h // X.group, n, X.keys, c, width, WHOLE, CH, total.shape[0])
        q = chunk_from(Q, of_queries, X.q, b, h, m, X.queries, c, width, WHOLE, CH, total.shape[1])
        return tl.dot(k, tl.trans(q), total, input_precision="ieee")
    else:
        q = chunk_from(Q, of_queries, X.q, b, h, m, X.queries, c, width, WHOLE, CH, total.shape[0])
        k = chunk_from(K, of_keys, X.q, b, h // X.group, n, X.keys, c, width, WHOLE, CH, total.shape[1])
        return tl.dot(q, tl.trans(k), total, input_precision="ieee")


@triton.jit
def either(condition, A, B):
    """The strides of the tensor A, or else of B."""
    batch, head = tl.where(condition, A.batch, B.batch), tl.where(condition, A.head, B.head)
    return batch, head, tl.where(condition, A.row, B.row)


@triton.jit
def chunk(H, b, h, row, count, c, width, WHOLE: tl.constexpr, CH: tl.constexpr, BLOCK: tl.constexpr):
    """CH columns from c on, of BLOCK rows from `row` on; 0 where there are none: rows end at `count`, columns `width`
    after c, unless the chunks are WHOLE."""
    return chunk_from(H.ptr, whole_of(H), H, b, h, row, count, c, width, WHOLE, CH, BLOCK)


@triton.jit
def chunk_from(
    P, strides, LIKE, b, h, row, count, c, width, WHOLE: tl.constexpr, CH: tl.constexpr, BLOCK: tl.constexpr
):
    """As `chunk`, of a tensor like another one in what is compiled in."""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, CH)[None, :]
    there = rows < count - row
    if not WHOLE:
        there = there & (columns < width)
    p = pointers_from(P, strides, 1, LIKE.far, LIKE.eighths, b, h, row, c, rows, columns)
    return tl.load(p, mask=there, other=0.0)


@triton.jit
def inside(X, at):
    """Which elements of a tile there are."""
    _b, _h, m, n, queries, keys = at
    return (queries < X.queries - m) & (keys < X.keys - n)


@triton.jit
def scores(qk, X, at):
    """A tile of s, from one of q k^T; -inf where a query does not see a key. Beyond the last of them it is anything.

    `at` is (batch, head, first query, first key, queries, keys). The last two count from the first ones, along the dims
    of the tile in which they lie: (n, 1) and (1, n), or the other way round.
    """
    b, h, m, n, queries, keys = at
    s = qk * X.scale
    if X.cap is not None:
        s = X.cap * tanh(divide(s, X.cap))
    if X.mask.ptr is not None:
        mask = tl.load(pointers(X.mask, b, h, m, n, queries, keys), mask=inside(X, at), other=0)
        if X.mask.ptr.dtype.element_ty == tl.int1:
            s = tl.where(mask, s, float("-inf"))
        else:
            s += mask.to(tl.float32)
    if X.left is not None or X.right is not None:
        i, j = queries + (m - n), keys
        if X.q_at is not None or X.k_at is not None:
            i, j = positions(X.q_at, m, queries, X.queries), positions(X.k_at, n, keys, X.keys)
        if X.left is not None:
            s = tl.where(j >= i - X.left, s, float("-inf"))
        if X.right is not None:
            s = tl.where(j <= i + X.right, s, float("-inf"))
    return s


@triton.jit
def positions(AT, first, index, SIZE):
    """Of these queries or keys."""
    if AT is None:
        return first + index
    else:
        return tl.load(AT + first + index, mask=index < SIZE - first, other=0).to(tl.int32)


LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def probabilities(s, X, at):
    """p. Where q has 16 bits its error is some roundings of float32, and it takes two instructions."""
    lse = per_query(X.lse, X, at)
    if X.top is not None:
        s -= per_query(X.top, X, at)
    if X.q.ptr.dtype.element_ty == tl.float32:
        return exp(s - lse)
    else:
        return tl.exp2(s * LOG2_E - lse * LOG2_E)


@triton.jit
def per_query(P, X, at):
    """The numbers of a tile's queries in a (batch, heads, queries) tensor."""
    b, h, m, _n, queries, _keys = at
    first = (b.to(tl.int64) * X.heads + h) * X.queries + m
    return tl.load(P + first + queries, mask=queries < X.queries - m, other=0.0)


@triton.jit
def keys_seen(X, m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SKIPS: tl.constexpr):
    """The blocks of keys, from the first to before the last, of which queries from m on see anything."""
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
        last = tl.minimum(last, tl.cdiv(tl.maximum(n + BLOCK_N + X.left, 0), BLOCK_M))
    if SKIPS and X.right is not None:
        first = tl.minimum(tl.maximum(n - X.right, 0) // BLOCK_M, last)
    return first, last
