"""y = sin(c), c = a * b. The derivation is docs/ops/mul_sin.md; the layouts are kernels/tiles.py."""

import triton
import triton.language as tl

from retainops.kernels.points import retain
from retainops.kernels.tiles import load, store, store_grad, tile


@triton.jit
def mul_sin_fwd_kernel(A, B, Y, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of y = sin(a * b). Interiors are held in DTYPE: fp32, or fp64 for fp64."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    a = load(A, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    b = load(B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    c = a * b
    store(Y, tl.sin(c), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit
def mul_sin_bwd_kernel(A, B, DY, DA, DB, DC, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One tile of dc = dy * cos(c), da = dc * b, db = dc * a. c is recomputed, never read."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    a = load(A, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    b = load(B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    c = a * b
    dc = dy * tl.cos(c)
    retain(DC, dc, c, at, SHAPE, BLOCK_M, BLOCK_N)
    store_grad(DA, dc * b, at, SHAPE, BLOCK_M, BLOCK_N)
    store_grad(DB, dc * a, at, SHAPE, BLOCK_M, BLOCK_N)
