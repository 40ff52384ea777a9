"""Tiles: how a pointwise kernel walks tensors of any layout with one body.

The host (retainops/ops/_walk.py) merges the dims of all operands into as few as possible and hands each tensor
over as an `Operand`. The last two merged dims are cut into tiles of (BLOCK_M, BLOCK_N), one a program; the dims
before them are counted off by the program index. For dense tensors everything merges into a single dim, (1, n).

A stride of None marks a dim in which the tensor does not move (it is broadcast there, or the dim has one element).
None and 1 are compile-time constants to Triton, so a broadcast costs no address arithmetic and a stride of one
gives 128-bit accesses. Offsets are int64 wherever they can be large.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """A tensor, or what stands for one, as kernels take it. By what is not None it is one of

    - a tensor: `ptr`, `strides`;
    - an output that nobody wants: nothing;
    - a gradient that is summed over broadcast dims: `ptr`, `strides`, `tiles`. It is written as partial sums, one share
      a tile: the strides are None in the summed dims of the tile, and `tiles` says how far one tile's share is from the
      next one's;
    - a Python number, passed by value: `number`;
    - random numbers: `seed`, `strides`. They are made where they are used, from the seed and each element's place,
      which the strides give: the same ones in forward and in backward. Where four neighbours in the last dim share a
      counter of the generator, `quads` is 1 and the strides are in counters.
    """

    ptr: Any
    strides: tuple  # one a dim of SHAPE, in elements; None: does not move in this dim
    tiles: tuple = (None, None)  # down and along the tiles, in elements; None: not summed in this direction
    number: Any = None  # a Python number, in place of a tensor
    seed: Any = None  # pointer to the int64 seed of uniform numbers, in place of a tensor
    quads: Any = None  # 1: those numbers are made four at a time; None: one by one


@triton.jit
def tile(SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's tile: (outer index, first row, first column, whether it lies inside SHAPE as a whole)."""
    # Rounded up without going above the size: SHAPE + BLOCK - 1 overflows int32 for sizes just below 2**31.
    tiles_n = (SHAPE[-1] - 1) // BLOCK_N + 1
    pid = tl.program_id(0)
    tiles_m = (SHAPE[-2] - 1) // BLOCK_M + 1
    n = (pid % tiles_n).to(tl.int64) * BLOCK_N
    m = (pid // tiles_n % tiles_m).to(tl.int64) * BLOCK_M
    whole = (m + BLOCK_M <= SHAPE[-2]) & (n + BLOCK_N <= SHAPE[-1])
    return pid // tiles_n // tiles_m, m, n, whole


@triton.jit
def tile_number(at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The number of a tile, counted along the last dim first."""
    z, m, n, _whole = at
    tiles_n = (SHAPE[-1] - 1) // BLOCK_N + 1
    tiles_m = (SHAPE[-2] - 1) // BLOCK_M + 1
    return (z.to(tl.int64) * tiles_m + m // BLOCK_M) * tiles_n + n // BLOCK_N


@triton.jit
def offsets(X, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of X's part of the tile, of shape (BLOCK_M or 1, BLOCK_N or 1): 1 where X does not move."""
    z, m, n, _whole = at
    o = tl.zeros((1, 1), tl.int64)
    for d in tl.static_range(len(SHAPE) - 3, -1, -1):
        if X.strides[d] is not None:
            o += (z % SHAPE[d]).to(tl.int64) * X.strides[d]
        z = z // SHAPE[d]
    if X.strides[-2] is not None:
        o = o + (m + tl.arange(0, BLOCK_M))[:, None] * X.strides[-2]
    if X.strides[-1] is not None:
        o = o + (n + tl.arange(0, BLOCK_N))[None, :] * X.strides[-1]
    return o


@triton.jit
def inside(X, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of `offsets` lie inside SHAPE."""
    _z, m, n, _whole = at
    ok = tl.full((1, 1), True, tl.int1)
    if X.strides[-2] is not None:
        ok = ok & (m + tl.arange(0, BLOCK_M) < SHAPE[-2])[:, None]
    if X.strides[-1] is not None:
        ok = ok & (n + tl.arange(0, BLOCK_N) < SHAPE[-1])[None, :]
    return ok


@triton.jit
def lanes_inside(at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which lanes of the whole tile lie inside SHAPE."""
    _z, m, n, _whole = at
    rows = m + tl.arange(0, BLOCK_M) < SHAPE[-2]
    cols = n + tl.arange(0, BLOCK_N) < SHAPE[-1]
    return rows[:, None] & cols[None, :]


@triton.jit
def load(
    X, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None
):
    """X's part of the tile as DTYPE; zero outside SHAPE. EVICTION: of what is read, from the cache.

    A mask makes Triton split a 128-bit access unless the length divides by 16, so only ragged tiles have one.
    """
    if X.number is not None:
        return tl.full((1, 1), X.number, DTYPE)
    elif X.seed is not None:
        return uniform(X, at, SHAPE, BLOCK_M, BLOCK_N).to(DTYPE)
    else:
        p = X.ptr + offsets(X, at, SHAPE, BLOCK_M, BLOCK_N)
        if at[3]:
            x = tl.load(p, eviction_policy=EVICTION)
        else:
            ok = inside(X, at, SHAPE, BLOCK_M, BLOCK_N)
            x = tl.load(p, mask=ok, other=0.0, eviction_policy=EVICTION)
        return x.to(DTYPE)


@triton.jit
def load_each(X, COUNT: tl.constexpr, at, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The parts of a tuple of COUNT operands."""
    x = ()
    for i in tl.static_range(COUNT):
        x = x + (load(X[i], at, SHAPE, DTYPE, BLOCK_M, BLOCK_N),)
    return x


@triton.jit
def uniform(X, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Uniform numbers in [0, 1), multiples of 2**-24: word `index % 4` of Philox4x32-7 at the counter `index // 4`.

    Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3": seven rounds are the fewest that
    pass all of BigCrush's tests. Ten, the usual margin, take longer than memory does.
    """
    if X.quads is not None:
        z, m, n, whole = at
        counter = offsets(X, (z, m, n >> 2, whole), SHAPE, BLOCK_M, BLOCK_N // 4)
        r0, r1, r2, r3 = philox(X, counter)
        r = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (counter.shape[0], BLOCK_N))
    else:
        index = offsets(X, at, SHAPE, BLOCK_M, BLOCK_N)
        r0, r1, r2, r3 = philox(X, index >> 2)
        word = index & 3
        r = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    return (r >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def philox(X, counter):
    """The four words of each counter."""
    none = tl.zeros_like(counter).to(tl.uint32)
    return tl.philox(tl.load(X.seed), counter.to(tl.uint32), (counter >> 32).to(tl.uint32), none, none, n_rounds=7)


@triton.jit
def store(X, x, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None):
    """Round the tile `x` to X's dtype and store it."""
    p = X.ptr + offsets(X, at, SHAPE, BLOCK_M, BLOCK_N)
    x = tl.broadcast_to(x, (BLOCK_M, BLOCK_N)).to(X.ptr.dtype.element_ty)
    if at[3]:
        tl.store(p, x, eviction_policy=EVICTION)
    else:
        tl.store(p, x, mask=inside(X, at, SHAPE, BLOCK_M, BLOCK_N), eviction_policy=EVICTION)


@triton.jit
def store_grad(DX, dx, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVICTION: tl.constexpr = None):
    """Store an input's gradient, if it is needed: as it is, or summed over the tile where the input was broadcast."""
    if DX.ptr is not None:
        if DX.tiles[-2] is None and DX.tiles[-1] is None:
            store(DX, dx, at, SHAPE, BLOCK_M, BLOCK_N, EVICTION)
        else:
            # Outside SHAPE dx need not be 0: an operand that is broadcast is not masked, and 0 * inf is nan.
            dx = tl.broadcast_to(dx, (BLOCK_M, BLOCK_N))
            dx = tl.where(lanes_inside(at, SHAPE, BLOCK_M, BLOCK_N), dx, 0.0)
            store_share(DX.ptr, DX, share_of_sum(DX, dx), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def share_of_sum(X, x):
    """Sum the tile `x` in the directions in which X is summed."""
    if X.tiles[-2] is not None:
        x = tl.sum(x, axis=0, keep_dims=True)
    if X.tiles[-1] is not None:
        x = tl.sum(x, axis=1, keep_dims=True)
    return x


@triton.jit
def store_share(P, X, x, at, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store this tile's share of a sum (or maximum) laid out as X says, at P."""
    _z, m, n, _whole = at
    o = offsets(X, at, SHAPE, BLOCK_M, BLOCK_N)
    if X.tiles[-2] is not None:
        o += m // BLOCK_M * X.tiles[-2]
    if X.tiles[-1] is not None:
        o += n // BLOCK_N * X.tiles[-1]
    tl.store(P + o, x, mask=inside(X, at, SHAPE, BLOCK_M, BLOCK_N))
