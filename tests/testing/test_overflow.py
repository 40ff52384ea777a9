"""overflows(): what may wrap is found where it steers memory, whatever the arguments; and nothing that may not."""

from __future__ import annotations

import operator
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from retainops.testing import overflows, ranges
from retainops.testing.ttir import Operation

FIRST_LINE = "    i = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)"
X, Y = torch.zeros(4096), torch.zeros(4096)


@triton.jit
def double_kernel(X, Y, n, WIDE: tl.constexpr, MASKED_WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = (tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    j = (tl.program_id(0).to(tl.int64) if MASKED_WIDE else tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, 2 * tl.load(X + i, mask=j < n, other=0.0), mask=j < n)


@triton.jit
def step_over_kernel(X, Y, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(X + at, mask=at < n, other=0.0)
    tl.store(Y + tl.arange(0, BLOCK), total)


@triton.jit
def count_up_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = 0
    while i < n:
        at = i + tl.arange(0, BLOCK)
        tl.store(Y + at, tl.load(X + at, mask=at < n, other=0.0), mask=at < n)
        i += BLOCK


@triton.jit
def carry_kernel(X, Y, n, KEEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = 0
    for i in range(0, n, BLOCK):
        tl.store(Y + at + tl.arange(0, BLOCK), 0.0)
        at = i % 64 if KEEPS else at + BLOCK


@triton.jit
def hash_kernel(X, Y, n, BLOCK: tl.constexpr):
    """Wraps on purpose, in what is stored and not in where."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, ((i + n) * 1000003 ^ n * 7919).to(tl.float32), mask=i < n)


@triton.jit
def cut_kernel(X, Y, n, m, BLOCK: tl.constexpr):
    """Of a grid of blocks: a product that fits, as a block's number is less than the number of blocks."""
    blocks = (n - 1) // BLOCK + 1
    if tl.program_id(0) < m:
        first = tl.minimum(tl.program_id(0) % blocks, blocks >> 1) * BLOCK
    else:
        first = tl.maximum(tl.where(m > n, 0, tl.program_id(0) & 15), 3) << 4
    at = first + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def strided_kernel(X, Y, n, strides, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y + at * strides[1], tl.load(X + at * strides[0], mask=at < n, other=0.0), mask=at < n)


def found(kernel, *args, **options) -> list[tuple[str, str]]:
    bounds = options.pop("bounds", None)
    of = overflows(lambda: kernel[(1,)](X, Y, *args, **options, BLOCK=128), bounds=bounds)
    return [(each.operation, each.lines[0].split("/")[-1]) for each in of]


def test_a_product_in_an_address_or_in_a_mask() -> None:
    assert found(double_kernel, 4096, WIDE=True, MASKED_WIDE=True) == []
    for wide, masked_wide in ((False, True), (True, False)):
        operations = {operation for operation, _ in found(double_kernel, 4096, WIDE=wide, MASKED_WIDE=masked_wide)}
        assert operations == {"arith.muli", "arith.addi"}


def test_what_it_says() -> None:
    report = overflows(lambda: double_kernel[(1,)](X, Y, 4096, WIDE=False, MASKED_WIDE=True, BLOCK=128))
    at = 1 + Path(__file__).read_text().splitlines().index(FIRST_LINE)
    said = f"double_kernel: arith.muli of int32 may reach {(2**31 - 2) * 128}, at testing/test_overflow.py:{at}"
    assert said in map(str, report)


def test_sizes_that_are_int64_to_triton() -> None:
    assert found(double_kernel, 2**31 + 5, WIDE=True, MASKED_WIDE=True) == []


def test_bounds() -> None:
    one = {"WIDE": False, "MASKED_WIDE": False}
    assert found(double_kernel, 4096, **one, bounds={"program_id": (0, 2**24 - 1)}) == []
    assert found(double_kernel, 4096, **one, bounds={"program_id": (0, 2**24)}) != []
    assert found(strided_kernel, 100, (2, 3)) != []
    assert found(strided_kernel, 100, (2, 3), bounds={"strides.*": (0, 2**23)}) == []
    assert found(strided_kernel, 100, (2, 3), bounds={"strides.*": (0, 2**23), "strides.1": (0, 2**25)}) != []


def test_loops() -> None:
    assert found(step_over_kernel, 4000) == []
    assert {operation for operation, _ in found(step_over_kernel, 4000, bounds={"n": (0, 2**31 - 1)})} == {
        "scf.for",
        "arith.addi",
    }
    assert found(carry_kernel, 4000, KEEPS=True) == []
    assert found(carry_kernel, 4000, KEEPS=False) != []


@triton.jit
def returns_early_kernel(X, Y, n, BLOCK: tl.constexpr):
    if n * n < 5:
        return
    tl.store(Y + tl.arange(0, BLOCK), 0.0)


@triton.jit(noinline=True)
def times(a, b):
    return a * b


@triton.jit
def calls_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + times(n, n) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def counts_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.atomic_add(Y + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) * n < 5)


@triton.jit
def scans_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + tl.cumsum(tl.full((BLOCK,), 1, tl.int32) * n), 0.0)


@triton.jit
def counts_down_kernel(X, Y, n, BLOCK: tl.constexpr):
    for i in range(n.to(tl.uint32) - 5, n.to(tl.uint32) + 10):
        tl.store(Y + i.to(tl.int64), 0.0)


@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (count_up_kernel, "scf.while"),
        (returns_early_kernel, "cf."),
        (calls_kernel, "tt.call"),
        (counts_kernel, "tt.atomic_rmw"),
        (scans_kernel, "tt.scan"),
    ],
)
def test_what_is_not_followed_is_said(kernel, what: str) -> None:
    with pytest.raises(ValueError, match=rf"overflows: {kernel.__name__} has {what}.* at .*test_overflow.py:\d+"):
        found(kernel, 4000)


@triton.jit
def sums_kernel(X, Y, n, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    each = tl.arange(0, BLOCK) % 7 if SMALL else tl.arange(0, BLOCK) * 0 + n
    tl.store(Y + tl.sum(each), 0.0)
    tl.store(Y + tl.max(each), 0.0)


@triton.jit
def splits_kernel(X, Y, n, BLOCK: tl.constexpr):
    _, right = tl.split(tl.reshape(tl.arange(0, BLOCK) * n, (BLOCK // 2, 2)))
    tl.store(Y + right, 0.0)


@triton.jit
def chooses_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(tl.where(n * n > 4, X, Y) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def branches_kernel(X, Y, n, BLOCK: tl.constexpr):
    if n * n > 4:
        tl.store(Y + tl.arange(0, BLOCK), 0.0)


@triton.jit
def shifts_kernel(X, Y, n, m, BLOCK: tl.constexpr):
    tl.store(Y + (1 << (m & 31)) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def unsigned_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + (n.to(tl.uint32) - 5) // 2 + tl.arange(0, BLOCK), 0.0)


@triton.jit
def flag_kernel(X, Y, n, flag, BLOCK: tl.constexpr):
    tl.store(Y + flag.to(tl.int32) * 2 + tl.arange(0, BLOCK), 0.0, mask=tl.arange(0, BLOCK) < n)


@triton.jit
def grid_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + tl.program_id(1) * 40000 + tl.arange(0, BLOCK), 0.0)


@triton.jit
def masks_kernel(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, 0.0, mask=i * n < 5)


@triton.jit
def counts_to_kernel(X, Y, n, BLOCK: tl.constexpr):
    for _ in range(n * n):
        tl.store(Y + tl.arange(0, BLOCK), 0.0)


@triton.jit
def takes_one_of_two_kernel(X, Y, n, BLOCK: tl.constexpr):
    at = 0
    if n > 5:
        at = 1
    else:
        at = n * n
    tl.store(Y + at + tl.arange(0, BLOCK), 0.0)


@triton.jit
def cuts_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + (n.to(tl.int64) * n).to(tl.int32), 0.0)


@triton.jit
def compares_unsigned_kernel(X, Y, n, BLOCK: tl.constexpr):
    tl.store(Y + tl.arange(0, BLOCK), 0.0, mask=n.to(tl.uint32) - 5 < tl.arange(0, BLOCK).to(tl.uint32))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def ors_kernel(X, Y, n, BLOCK: tl.constexpr):
    """5 | 2 is no element; times 2**28 it does not fit."""
    tl.store(Y + tl.reduce(tl.arange(0, BLOCK) % 6, 0, _or) * 400000000, 0.0)


@triton.jit
def finds_kernel(X, Y, n, BLOCK: tl.constexpr):
    at = tl.argmax(tl.load(X + tl.arange(0, BLOCK)), 0)
    tl.store(Y + at * 1000, 0.0)


def test_what_may_not_though_it_is_chosen() -> None:
    assert found(finds_kernel, 5) == []


def test_all_that_steers() -> None:
    for kernel in (masks_kernel, counts_to_kernel, takes_one_of_two_kernel, cuts_kernel):
        assert found(kernel, 5) != [], kernel.__name__
    for kernel in (compares_unsigned_kernel, ors_kernel):
        assert found(kernel, 5) != [], kernel.__name__
    assert found(sums_kernel, 5, SMALL=True) == []
    assert "tt.reduce" in {operation for operation, _ in found(sums_kernel, 5, SMALL=False)}
    for kernel in (splits_kernel, chooses_kernel, branches_kernel, unsigned_kernel, counts_down_kernel, grid_kernel):
        assert found(kernel, 5) != [], kernel.__name__
    assert found(shifts_kernel, 5, 6) != []
    assert found(flag_kernel, 5, True) == []


def test_what_may_not_and_what_steers_nothing() -> None:
    assert found(cut_kernel, 4000, 7) == []
    assert found(hash_kernel, 4000) == []


def test_mistakes() -> None:
    def call(n: int) -> None:
        double_kernel[(1,)](X, Y, n, WIDE=True, MASKED_WIDE=True, BLOCK=128)

    with pytest.raises(ValueError, match=r"double_kernel got n = -5, taken to be from 0 to 2147418112; pass bounds="):
        overflows(lambda: call(-5))
    with pytest.raises(ValueError, match="the call launched no kernel"):
        overflows(lambda: None)
    with pytest.raises(ValueError, match="unknown target"):
        overflows(lambda: call(5), target="sm_1")


RULES = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divsi": lambda a, b: int(a / b) if b else None,
    "arith.remsi": lambda a, b: a - int(a / b) * b if b else None,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.andi": operator.and_,
    "arith.shli": lambda a, b: a << b if b >= 0 else None,
    "arith.shrsi": lambda a, b: a >> b if b >= 0 else None,
    "arith.select": lambda a, b: a,
    "tt.broadcast": lambda a, b: b,
}
SPAN = st.tuples(st.integers(-20, 20), st.integers(0, 9)).map(lambda x: (x[0], x[0] + x[1]))


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None, derandomize=True)
@given(a=SPAN, b=SPAN)
def test_no_rule_leaves_a_value_out(name: str, a: ranges.Range, b: ranges.Range) -> None:
    op = Operation(name, [], [], [], "", "")
    operands = ((0, 1), a, b) if name == "arith.select" else (a, b)
    allowed = ranges._RULES[name](op, *operands)
    every = [RULES[name](x, y) for x, y in product(range(a[0], a[1] + 1), range(b[0], b[1] + 1))]
    every = [x for x in every if x is not None]
    if allowed is not None and every:
        assert allowed[0] <= min(every)
        assert max(every) <= allowed[1]
