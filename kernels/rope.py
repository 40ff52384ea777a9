"""Rotary position embedding: pairs of elements, turned by an angle. docs/ops/rope.md derives it.

A program takes some tokens and a group of the heads of q and of k, and holds the tokens' cosines and sines in registers
from head to head. Its tensors are (batch, heads, seq, dim) of any strides. Backward is the same kernel, of other signs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from retainops.kernels.points import retain
from retainops.kernels.tiles import load, tile


class Pairs(NamedTuple):
    """A tensor, or a table of cosines or sines, as the kernel takes it; `first` is None for one that nobody wants.

    Its leading elements are pairs, (j, j + PAIRS) or, interleaved, (2j, 2j + 1).
    """

    first: Any
    second: Any
    rest: Any  # what is behind the pairs, and passed through
    strides: tuple  # of batch, heads and seq, from pair to pair, and along the rest


@triton.jit
def rope_kernel(
    Q,
    K,
    COS,
    SIN,
    Q_OUT,
    K_OUT,
    Q_HEADS,
    K_HEADS,
    SEQ,
    GROUPS,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUNS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """BLOCK_M tokens of every GROUPS-th head. INVERSE: the gradients of the inputs, from those of the outputs.

    RUNS: pairs lie side by side in memory, and are read as one run. HALF: tables have one column for each pair.
    """
    tiles = (SEQ - 1) // BLOCK_M + 1
    i = tl.program_id(0)
    group = i // tiles % GROUPS
    batch = (i // tiles // GROUPS).to(tl.int64)
    token = (i % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cos0, cos1 = of_table(COS, batch, token, SEQ, DTYPE, PAIRS, BLOCK_N, RUNS, HALF)
    sin0, sin1 = of_table(SIN, batch, token, SEQ, DTYPE, PAIRS, BLOCK_N, RUNS, HALF)
    if INVERSE:
        to_first, to_second = sin1, -sin0
    else:
        to_first, to_second = -sin0, sin1
    if Q_OUT.first is not None:
        for head in range(group, Q_HEADS, GROUPS):
            turn(Q, Q_OUT, cos0, cos1, to_first, to_second, batch, head, token, SEQ, PAIRS, REST, BLOCK_R, RUNS)
    if K_OUT.first is not None:
        for head in range(group, K_HEADS, GROUPS):
            turn(K, K_OUT, cos0, cos1, to_first, to_second, batch, head, token, SEQ, PAIRS, REST, BLOCK_R, RUNS)


@triton.jit
def rope_points_kernel(DY, Y, DC, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keep an output's gradient as that of a point; Y is there only if its values are asked for."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    y = dy
    if Y.ptr is not None:
        y = load(Y, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    retain(DC, dy, y, at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def of_table(
    T,
    batch,
    token,
    SEQ,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
    HALF: tl.constexpr,
):
    """What belongs to the first and to the second element of each pair."""
    row = batch * T.strides[0] + token * T.strides[2]
    if HALF:
        pair = tl.arange(0, BLOCK_N)[None, :]
        o = row + pair.to(tl.int64) * T.strides[3]
        both = tl.load(T.first + o, mask=(token < SEQ) & (pair < PAIRS), other=0.0).to(DTYPE)
        return both, both
    else:
        return load_pairs(T, row, token < SEQ, DTYPE, PAIRS, BLOCK_N, RUNS)


@triton.jit
def turn(
    X,
    Y,
    cos0,
    cos1,
    to_first,
    to_second,
    batch,
    head,
    token,
    SEQ,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Turn the pairs of one head, and pass the rest through."""
    x_row = batch * X.strides[0] + head.to(tl.int64) * X.strides[1] + token * X.strides[2]
    y_row = batch * Y.strides[0] + head.to(tl.int64) * Y.strides[1] + token * Y.strides[2]
    x0, x1 = load_pairs(X, x_row, token < SEQ, cos0.dtype, PAIRS, cos0.shape[1], RUNS)
    y0 = x0 * cos0 + x1 * to_first
    y1 = x1 * cos1 + x0 * to_second
    store_pairs(Y, y0, y1, y_row, token < SEQ, PAIRS, cos0.shape[1], RUNS)
    if REST > 0:
        column = tl.arange(0, BLOCK_R)[None, :]
        inside = (token < SEQ) & (column < REST)
        rest = tl.load(X.rest + x_row + column.to(tl.int64) * X.strides[4], mask=inside, other=0.0)
        tl.store(Y.rest + y_row + column.to(tl.int64) * Y.strides[4], rest, mask=inside)


@triton.jit
def load_pairs(X, row, inside, DTYPE: tl.constexpr, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr):
    if RUNS:
        column = tl.arange(0, 2 * BLOCK_N)[None, :]
        x = tl.load(X.first + row + column, mask=inside & (column < 2 * PAIRS), other=0.0).to(DTYPE)
        return tl.split(tl.reshape(x, (row.shape[0], BLOCK_N, 2)))
    else:
        pair = tl.arange(0, BLOCK_N)[None, :]
        o = row + pair.to(tl.int64) * X.strides[3]
        x0 = tl.load(X.first + o, mask=inside & (pair < PAIRS), other=0.0)
        x1 = tl.load(X.second + o, mask=inside & (pair < PAIRS), other=0.0)
        return x0.to(DTYPE), x1.to(DTYPE)


@triton.jit
def store_pairs(Y, y0, y1, row, inside, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr):
    dtype: tl.constexpr = Y.first.dtype.element_ty
    if RUNS:
        column = tl.arange(0, 2 * BLOCK_N)[None, :]
        y = tl.reshape(tl.join(y0.to(dtype), y1.to(dtype)), (row.shape[0], 2 * BLOCK_N))
        tl.store(Y.first + row + column, y, mask=inside & (column < 2 * PAIRS))
    else:
        pair = tl.arange(0, BLOCK_N)[None, :]
        o = row + pair.to(tl.int64) * Y.strides[3]
        tl.store(Y.first + o, y0.to(dtype), mask=inside & (pair < PAIRS))
        tl.store(Y.second + o, y1.to(dtype), mask=inside & (pair < PAIRS))
