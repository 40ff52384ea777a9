"""Kernels for the tests of the PTX emulator, and how those run them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from retainops.testing.driver import Launch, driver
from retainops.testing.ptx import Counters, run


@triton.jit
def unary_kernel(X, Y, n, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    x = x.to(tl.float32) if x.dtype.primitive_bitwidth == 16 else x
    tl.store(Y + i, F(x).to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def copy_kernel(X, Y, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i * stride, tl.load(X + i * stride, mask=i < n), mask=i < n)


@triton.jit
def rms_norm_kernel(X, W, Y, n, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    x = tl.load(X + row * n + j, mask=j < n, other=0.0).to(tl.float32)
    w = tl.load(W + j, mask=j < n, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt_rn(tl.sum(x * x, axis=0) / n + eps)
    tl.store(Y + row * n + j, (x * rstd * w).to(Y.dtype.element_ty), mask=j < n)


@triton.jit
def column_sum_kernel(X, Y, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), Y.dtype.element_ty)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        inside = (i[:, None] < rows) & (j[None, :] < columns)
        total += tl.load(X + i[:, None] * columns + j[None, :], mask=inside, other=0.0).to(total.dtype)
    tl.store(Y + j, tl.sum(total, axis=0), mask=j < columns)


@triton.jit
def transpose_kernel(X, Y, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tl.store(Y + j[:, None] * M + i[None, :], tl.trans(tl.load(X + i[:, None] * N + j[None, :])))


@triton.jit
def pipelined_kernel(X, Y, n, BLOCK: tl.constexpr):
    for block in tl.range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0), num_stages=3):
        i = block * BLOCK + tl.arange(0, BLOCK)
        tl.store(Y + i, tl.load(X + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def scan_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.cumsum(tl.load(X + i, mask=i < n, other=0), axis=0), mask=i < n)


@triton.jit
def extremes_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0)
    tl.store(Y, tl.sum(x, 0))
    tl.store(Y + 1, tl.max(x, 0))
    tl.store(Y + 2, tl.min(x, 0))
    tl.store(Y + 3, tl.argmax(x, 0))


@triton.jit
def divide_kernel(X, Y, n, d, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    tl.store(Y + i, x // d * 1000 + x % d, mask=i < n)


@triton.jit
def strided_kernel(X, Y, m, n, sx0, sx1, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    j = tl.arange(0, BLOCK)
    x = tl.load(X + row * sx0 + j * sx1, mask=j < n)
    tl.store(Y + row * n + j, x, mask=j < n)


@triton.jit
def mixed_kernel(XS, Y, one, flag, half, wide, n, BLOCK: tl.constexpr):
    """Every way to pass an argument: nested tuples with tensors, numbers and None; one; bool; floats; int64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(XS[0] + i, mask=i < n)
    if XS[1][1] is not None:
        x += tl.load(XS[1][1] + i, mask=i < n)
    x = x * XS[1][0] + one
    tl.store(Y + i, tl.where(flag, x * half, x) + wide, mask=i < n)


@triton.jit
def dot_kernel(A, B, C, M: tl.constexpr):
    i = tl.arange(0, M)
    at = i[:, None] * M + i[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))


@triton.jit
def assembly_kernel(X, Y, BLOCK: tl.constexpr):
    """Inline assembly with a block of its own: its registers shadow no others."""
    i = tl.arange(0, BLOCK)
    y = tl.inline_asm_elementwise(
        """{
            .reg .b32 t<2>;
            prmt.b32 t0, $1, $1, 0x0123;
            lop3.b32 t1, t0, $1, t0, 0x3c;
            mov.b32 $0, t1;
        }""",
        "=r,r",
        [tl.load(X + i)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    tl.store(Y + i, y)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def tanh(x):
    return libdevice.tanh(x)


@triton.jit
def fast_sin(x):
    return libdevice.fast_sinf(x)


def run_all(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> tuple[Launch, Counters]:
    """Executes one launch through its PTX."""
    counted: list[Counters] = []
    with driver("sm_90", execute=lambda launch: counted.append(run(launch))) as launches:
        kernel[grid](*args, **constants)
    return launches[0], counted[0]


def unary(f: Any, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    y = torch.full_like(x, -77, dtype=dtype or x.dtype)
    run_all(unary_kernel, (triton.cdiv(len(x), 1024),), x, y, len(x), F=f, BLOCK=1024)
    return y
