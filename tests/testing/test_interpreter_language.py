"""The interpreter evaluates Python as Triton's compiler does: conditions, loops, types, closures."""

import pytest
import torch
import triton
import triton.language as tl

from retainops.testing.builder import semantic
from retainops.testing.language import Patched, changes
from retainops.testing.memory import KernelFault
from retainops.testing.rewriting import interpreted, truth
from retainops.testing.simulated import simulated_gpu

HALF = tl.constexpr(0.5)


@pytest.fixture(autouse=True)
def gpu():
    torch.manual_seed(0)
    with simulated_gpu():
        yield


@triton.jit
def strided_rows_kernel(X, Y, rows, n, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=2):
        at = row.to(tl.int64) * n + j
        tl.store(Y + at, tl.load(X + at, mask=j < n) * 2, mask=j < n)
    for row in range(tl.program_id(0), rows, 3):
        for k in tl.static_range(2):
            tl.store(Y + row * n + k, HALF * row.to(tl.float32) + k)


def test_loops_over_rows():
    x, y = torch.randn(10, 20), torch.empty(10, 20)
    strided_rows_kernel[(3,)](x, y, 10, 20, BLOCK=32)
    assert torch.equal(y[:, 2:], 2 * x[:, 2:])
    assert torch.equal(y[:, :2], torch.arange(10)[:, None] * 0.5 + torch.arange(2))


@triton.jit
def promotion_kernel(X, Y, ALPHA, BLOCK: tl.constexpr, SHIFT: tl.constexpr = HALF):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    third = 1.0 / 3
    tl.store(Y + i, x * ALPHA + SHIFT)  # a number that is an argument is fp32
    tl.store(Y + BLOCK + i, x * third + SHIFT)  # so is one that has been given a name
    tl.store(Y + 2 * BLOCK + i, x * (1.0 / 3) + SHIFT)  # a constant takes x's type
    x *= third
    tl.store(Y + 3 * BLOCK + i, x + SHIFT)


def test_types_are_the_compiled_ones():
    x, y = torch.randn(64).bfloat16(), torch.empty(4, 64)
    promotion_kernel[(1,)](x, y, 1 / 3, BLOCK=64)
    wide = x.float() * torch.tensor(1 / 3) + 0.5
    narrow = x * torch.tensor(1 / 3).bfloat16() + 0.5
    assert torch.equal(y, torch.stack([wide, wide, narrow.float(), wide]))


@triton.jit
def conditions_kernel(X, NOTHING, Y, n):
    i = tl.program_id(0)
    y = 0
    if NOTHING is not None and tl.load(NOTHING) > 0:
        y += 1
    if NOTHING is None or tl.load(NOTHING) > 0:
        y += 10
    if not (i < 2) and (i > 0 and i < n):
        y += 100
    if i == 1 or tl.load(X + i) > 0:
        y += 1000
    if min(i, 2) == 2:
        y += 10000
    if max(i, 1, min(0, 1)) == 1:
        y += 100000
    assert y >= 0, "a scalar"
    tl.store(Y + i, 1 if y == 100010 else y)


def test_conditions():
    x, y = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    conditions_kernel[(4,)](x, None, y, 3)
    assert y.tolist() == [1, 101010, 10110, 10010]
    with pytest.raises(KernelFault, match=r"load of X\[1\]"):  # there is no short cut on a GPU
        conditions_kernel[(2,)](x[:1], None, y, 3)


@triton.jit
def between(a, b, c):
    return a < b < c  # triton 3.6 compiles no such chains, 3.9 does


def test_a_chain_of_comparisons():
    with Patched(changes()):
        found = [interpreted(between)(*map(semantic.to_tensor, abc)) for abc in ((1, 2, 3), (2, 2, 3), (1, 2, 2))]
    assert list(map(truth, found)) == [True, False, False]


def test_a_kernel_inside_a_function():
    scale = tl.constexpr(3.0)

    @triton.jit
    def thrice(x):
        return x * scale

    @triton.jit
    def kernel(X, Y, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        x = tl.load(X + i)
        tl.store(Y + i, FUNCTION(thrice(x)) + x.sum(axis=0, keep_dims=True))

    x, y = torch.arange(8.0), torch.empty(8)
    kernel[(1,)](x, y, FUNCTION=thrice, BLOCK=8)
    assert torch.equal(y, 9 * x + 28)


@triton.jit
def scalar_kernel(X, Y, n):
    i = tl.program_id(0)
    tl.store(Y + i, tl.load(X + i, mask=i < n, other=0.0) + 1)


def test_a_scalar_masked_off_is_other():
    x, y = torch.ones(2), torch.empty(4)
    scalar_kernel[(4,)](x, y, 2)
    assert y.tolist() == [2, 2, 1, 1]


@triton.jit
def hints_kernel(X, Y, first, n, m, BLOCK: tl.constexpr):
    """y = x from `first` on, as the compiler is told: in whole blocks, which begin at a multiple of 16."""
    first = tl.multiple_of(first, 16)
    i = tl.max_contiguous(tl.multiple_of((tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) % n, BLOCK), BLOCK)
    p = tl.multiple_of(X + first + i, [BLOCK * 4])
    row = tl.max_constancy(tl.arange(0, BLOCK)[:, None] // m + tl.zeros((1, 2), tl.int32), [4, 2])
    pair = tl.core.max_contiguous(row * 2 + tl.arange(0, 2)[None, :], [1, 2])
    tl.store(Y + i, tl.load(p) + 0 * tl.sum(pair))


FALSE_HINTS = {
    "a scalar": ((17, 128, 4), r"tl.multiple_of\(16\) at .*py:\d+ by program 0: element 0, 17, begins what is contig"),
    "contiguity": ((64, 100, 4), r"tl.max_contiguous\(64\) at .* by program 1: element 36, 0, does not follow the one"),
    "a pointer": ((16, 128, 4), r"tl.multiple_of\(256\) at .* by program 0: element 0, \d+, begins what is contiguous"),
    "constancy": ((64, 128, 2), r"tl.max_constancy\(4, 2\) at .*: element \(2, 0\), 1, is not equal to the one before"),
}


def aligned(n: int) -> torch.Tensor:
    """n numbers from an address on that divides by 4096."""
    x = torch.arange(n + 1024.0)
    first = -x.data_ptr() % 4096 // 4
    return x[first : first + n]


def test_hints_to_the_compiler_that_are_true():
    x, y = aligned(256), torch.empty(128)
    hints_kernel[(2,)](x, y, 64, 128, 4, BLOCK=64)
    assert torch.equal(y, x[64:192])


@pytest.mark.parametrize("name", FALSE_HINTS)
def test_a_hint_to_the_compiler_that_is_false(name):
    (first, n, m), message = FALSE_HINTS[name]
    x, y = aligned(256), torch.empty(128)
    with pytest.raises(KernelFault, match=f"hints_kernel: {message}"):
        hints_kernel[(2,)](x, y, first, n, m, BLOCK=64)
    with simulated_gpu(check=False):
        hints_kernel[(2,)](x, y, first, n, m, BLOCK=64)
