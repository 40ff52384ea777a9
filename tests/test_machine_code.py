"""What the machine code does, from SASS for sm_90: pay only for what is asked. No GPU is needed to read it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import retainops as ro
from retainops.kernels.tiles import load, store, store_grad, tile
from retainops.ops._walk import ELEMENTS
from retainops.testing import sass, static, static_report
from retainops.testing.driver import driver
from retainops.testing.static import KernelReport
from tests.triton_version import IS_OLDEST

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = {"aligned": 4096, "ragged": 4099}
ACCESS = 16  # bytes of a 128-bit access


@triton.jit
def without_points_bwd_kernel(
    A, B, DY, DA, DB, SHAPE, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """mul_sin's backward as it would be if nobody had ever thought of retaining."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    a = load(A, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    b = load(B, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    c = a * b
    dc = dy * tl.cos(c)
    da, db = dc * b, dc * a
    store_grad(DA, da, at, SHAPE, BLOCK_M, BLOCK_N)
    store_grad(DB, db, at, SHAPE, BLOCK_M, BLOCK_N)


def backward_call(dtype: torch.dtype, n: int, retain: Callable[[], ro.Retained | None]) -> Callable[[], object]:
    a, b = (torch.ones(n, dtype=dtype, requires_grad=True) for _ in "ab")

    def call() -> None:
        y = ro.mul_sin(a, b, retain=retain())
        torch.autograd.grad(y, [a, b], torch.ones_like(y))

    return call


def to_tensors(report: KernelReport) -> dict[str, int]:
    """Stores to global memory; float64's sin and cos of huge arguments use the stack by generic stores ("ST")."""
    return {access: times for access, times in report.stores.items() if access.startswith("STG")}


@dataclass(frozen=True, eq=False)
class Compiled:
    """As much of a compiled kernel as `assemble` takes."""

    asm: dict[str, str]
    metadata: Any


def without_lines(kernel: Any) -> str:
    """The machine code that ptxas makes of the same instructions where nothing says which line each is of."""
    instructions = kernel.asm["ptx"].split("\t.section")[0]
    bare = re.sub(r"^(\$L__tmp\d+:|\s*\.loc\s.*)$", "", instructions, flags=re.MULTILINE)
    return sass.machine_code(static.assemble(Compiled({"ptx": bare}, kernel.metadata))[0])


def reports(dtype: torch.dtype, n: int, retain: Callable = lambda: None, target: str = "sm_90") -> list[KernelReport]:
    return static_report(backward_call(dtype, n, retain), target)


def warps(dtype: torch.dtype) -> int:
    """Of a tile: so two accesses a thread, or four of float64."""
    return 2 if dtype.itemsize == 2 else 4


KNOWN = (
    {("sm_80", dtype, "ragged"): {"mul_sin_fwd_kernel": 4} for dtype in (torch.float16, torch.bfloat16)}
    if IS_OLDEST
    else {("sm_80", torch.bfloat16, "aligned"): {"mul_sin_bwd_kernel": 4}}
)
"""Bytes that are known to spill: one register, where ptxas stops at 80, for the sake of a sixth program at once, or 96.

The oldest Triton makes an address of 64 bits for each element that is read with a mask, where later ones make one for
eight neighbours. So where 16-bit tensors are ragged its kernels take 91 to 127 registers, and theirs 67 to 99.
"""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_spills(dtype: torch.dtype, length: str, target: str) -> None:
    known = KNOWN.get((target, dtype, length), {})
    for report in reports(dtype, LENGTHS[length], lambda: ro.Retained("c"), target):
        most = known.get(report.name, 0)
        assert report.spill_stores <= most, str(report)
        assert report.spill_loads <= most, str(report)


@pytest.mark.parametrize(
    "shapes", [((64, 96), (96,)), ((64, 96), (64, 1)), ((64, 96), ()), ((64, 1), (1, 96))], ids=str
)
def test_no_spills_in_broadcast_sums(shapes: tuple) -> None:
    a, b = (torch.ones(shape, requires_grad=True) for shape in shapes)
    for want in (ro.Retained("c"), ro.Retained(c=ro.Stats("l2", "amax", "act_grad", over="channels"))):
        for report in static_report(lambda want=want: ro.mul_sin(a, b, retain=want).sum().backward()):
            assert (report.spill_stores, report.spill_loads) == (0, 0), str(report)


SCHEDULED_BY_LINES = [(torch.bfloat16, "aligned")] if IS_OLDEST else []
"""Where ptxas puts the same instructions into another order since their lines are others.

Each new line is a label in the PTX, and ptxas lets some labels part what it would interleave. The kernel that never
heard of points has its lines in another file, so its labels stand elsewhere.
"""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retention_off_is_the_kernel_that_never_heard_of_it(dtype: torch.dtype, length: str) -> None:
    n = LENGTHS[length]
    shape, strides = (1, n), (None, 1)
    held = tl.float64 if dtype == torch.float64 else tl.float32

    def plain() -> None:
        from retainops.kernels.tiles import Operand

        operands = [Operand(torch.empty(n, dtype=dtype), strides) for _ in range(5)]
        grid = (-(-n // ELEMENTS),)
        without_points_bwd_kernel[grid](*operands, shape, held, 1, ELEMENTS, num_warps=warps(dtype))

    launches = []
    for call in (plain, backward_call(dtype, n, lambda: None), backward_call(dtype, n, lambda: ro.Retained("c"))):
        with driver("sm_90") as launched:
            call()
        launches.append(launched[-1])
    never, off, on = (static.report(launch, "sm_90") for launch in launches)
    assert off.name == on.name == "mul_sin_bwd_kernel"
    if (dtype, length) in SCHEDULED_BY_LINES:
        assert (off.registers, off.mix, off.accesses) == (never.registers, never.mix, never.accesses)
    else:
        assert off.machine_code == never.machine_code
    bare_never, bare_off, bare_on = (without_lines(launch.kernel) for launch in launches)
    assert bare_off == bare_never
    assert bare_on != bare_never  # the comparison can fail
    assert on.machine_code != off.machine_code


@pytest.mark.parametrize("n", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_more_store_for_the_retained_point_and_no_more_loads(dtype: torch.dtype, n: int) -> None:
    plain = reports(dtype, n)[-1]
    for want in (lambda: ro.Retained("c"), lambda: ro.Retained(c=ro.Into(torch.empty(n, dtype=dtype)))):
        kept = reports(dtype, n, want)[-1]
        assert kept.loads == plain.loads
        # Two gradients are stored without, three with: each width half as often again.
        assert {width: 2 * times for width, times in to_tensors(kept).items()} == {
            width: 3 * times for width, times in to_tensors(plain).items()
        }


@pytest.mark.parametrize("n", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accesses_of_16_bytes_at_any_length(dtype: torch.dtype, n: int) -> None:
    """A whole tile is accessed 128 bits at a time; only a ragged tile, one a tensor, is not."""
    a_thread = ELEMENTS * dtype.itemsize // (warps(dtype) * 32 * ACCESS)  # accesses for one tensor's tile, a thread
    for report, tensors in zip(reports(dtype, n), [(2, 1), (3, 2)], strict=True):
        loads, stores = tensors
        copies = 2 if n % 16 == 0 else 1  # the masked code of an aligned length is 128 bits wide too
        assert report.loads["LDG.128"] == copies * loads * a_thread
        assert report.stores["STG.128"] == copies * stores * a_thread


def test_a_gradient_not_needed_is_not_stored() -> None:
    a, b = torch.ones(4096, requires_grad=True), torch.ones(4096)
    one = static_report(lambda: ro.mul_sin(a, b).sum().backward())[-1]
    both = reports(torch.float32, 4096)[-1]
    assert 2 * sum(one.stores.values()) == sum(both.stores.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_statistics_add_two_thousandths_of_the_bytes(dtype: torch.dtype) -> None:
    n = 1 << 20
    plain = reports(dtype, n)[-1]
    kept = reports(dtype, n, lambda: ro.Retained(c=ro.Stats("l2", "amax")))[-1]
    assert (kept.spill_stores, kept.spill_loads) == (0, 0)
    assert kept.loads == plain.loads
    assert kept.stores["STG.128"] == plain.stores["STG.128"]
    # Stored beside: one float32 a statistic and warp of a tile of 1024 elements, of which five tensors are moved.
    shares, moved = 2 * 4 * warps(dtype), 5 * 1024 * dtype.itemsize
    assert sum(kept.stores.values()) - sum(plain.stores.values()) <= 4  # predicated to one lane, in two places
    assert shares / moved < 0.002


@pytest.mark.parametrize("target", ["gfx942"])
def test_amd(target: str) -> None:
    for report in reports(torch.bfloat16, 4096, lambda: ro.Retained("c"), target):
        assert report.spill_stores == 0


def test_the_mended_import_is_the_one_kernel() -> None:
    """Two imports of one kernel under two names would be two kernels to Triton."""
    assert store.fn.__module__ == "retainops.kernels.tiles"
