"""Small correct kernels that the tests of retainops.testing run. They import triton only."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operand(NamedTuple):
    """A tensor as the tuple that retainops's kernels take; a stride of None: it does not move in this dim."""

    ptr: Any
    strides: tuple


@triton.jit
def copy_kernel(X, Y, n, BLOCK: tl.constexpr):
    """y = x over n elements."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)


@triton.jit
def axpy_kernel(ALPHA, X, Y, OUT, n, BLOCK: tl.constexpr):
    """out = alpha * x + y in fp32, rounded to out's dtype; alpha is a number."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n).to(tl.float32)
    y = tl.load(Y + i, mask=i < n).to(tl.float32)
    tl.store(OUT + i, (ALPHA * x + y).to(OUT.dtype.element_ty), mask=i < n)


@triton.jit
def mean_square(x, n):
    """The mean of x squared over a row of n elements; lanes outside the row hold 0."""
    return tl.sum(x * x, axis=0) / n


@triton.jit
def rms_norm_fwd_kernel(X, W, Y, RSTD, n, EPS, BLOCK: tl.constexpr):
    """y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps): one row of n contiguous elements a program."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    x = tl.load(X + row * n + j, mask=j < n, other=0.0).to(tl.float32)
    w = tl.load(W + j, mask=j < n, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(mean_square(x, n) + EPS)
    tl.store(RSTD + row, rstd)
    tl.store(Y + row * n + j, (x * rstd * w).to(Y.dtype.element_ty), mask=j < n)


@triton.jit
def mul_sin_bwd_kernel(A, B, DY, DA, DB, DC, n, BLOCK: tl.constexpr):
    """dc = dy * cos(a * b), da = dc * b, db = dc * a; DC is None where dc is not wanted."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + i, mask=i < n).to(tl.float32)
    b = tl.load(B + i, mask=i < n).to(tl.float32)
    dc = tl.load(DY + i, mask=i < n).to(tl.float32) * tl.cos(a * b)
    if DC is not None:
        tl.store(DC + i, dc.to(DC.dtype.element_ty), mask=i < n)
    tl.store(DA + i, (dc * b).to(DA.dtype.element_ty), mask=i < n)
    tl.store(DB + i, (dc * a).to(DB.dtype.element_ty), mask=i < n)


@triton.jit
def pointers(X, m, n):
    """Pointers to X's elements at rows m and columns n, of shape (rows or 1, columns or 1)."""
    p = X.ptr + tl.zeros((1, 1), tl.int32)
    if X.strides[0] is not None:
        p = p + m[:, None] * X.strides[0]
    if X.strides[1] is not None:
        p = p + n[None, :] * X.strides[1]
    return p


@triton.jit
def add_operands_kernel(A, B, Y, SHAPE, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = a + b over SHAPE = (rows, columns), each an `Operand` of any strides; one tile a program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < SHAPE[0])[:, None] & (n < SHAPE[1])[None, :]
    a = tl.load(tl.broadcast_to(pointers(A, m, n), (BLOCK_M, BLOCK_N)), mask=inside, other=0.0)
    b = tl.load(tl.broadcast_to(pointers(B, m, n), (BLOCK_M, BLOCK_N)), mask=inside, other=0.0)
    tl.store(pointers(Y, m, n), (a + b).to(Y.ptr.dtype.element_ty), mask=inside)
