"""The machine code of the norms: no spills, each tensor moved once, the same bits whatever is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops.group_norm import group_norm
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from retainops.registry import Op
from retainops.testing import ptx, simulated_gpu, static_report
from retainops.testing.driver import driver
from retainops.testing.static import KernelReport
from tests.norm_cases import inputs_of, several
from tests.oracle import all_points, leaves
from tests.triton_version import IS_OLDEST

MOST = ("l2", "amax", "act_grad")


def stats_of(op: Op, over: str = "rows") -> ro.Retained:
    return ro.Retained(**{p.name: ro.Stats(*MOST, over=over, grad=True) for p in op.points})


def call_of(op: Op, shape: tuple[int, int], dtype: torch.dtype, kept: ro.Retained | None) -> Callable[[], None]:
    """Forward and backward, with a gradient for every output."""
    inputs = inputs_of(op, *shape, device="cpu", dtype=dtype)

    def call() -> None:
        outputs = several(op.call(*inputs, retain=kept))
        torch.autograd.grad(outputs, leaves(inputs), [torch.empty_like(y) for y in outputs])

    return call


def assert_no_spills(*reports: KernelReport, known: int = 0) -> None:
    for report in reports:
        assert max(report.spill_stores, report.spill_loads) <= known, str(report)


KNOWN = (
    {("layer_norm", 6000, torch.bfloat16): 48, ("add_layer_norm", 8192, torch.float16): 8}
    if IS_OLDEST
    else {("layer_norm", 6000, torch.bfloat16): 24}
)
"""Bytes that are known to spill where all of 255 registers are taken, with statistics of each row: six registers.

By the oldest Triton twelve, and two in the widest tile. Its PTX is another one, of which every ptxas from 12.8 to 13.4
spills as much, give or take two registers.
"""


@pytest.mark.parametrize(
    ("op", "width", "dtype", "target", "most"),
    [
        (RMS_NORM, 1000, torch.bfloat16, "sm_90", True),
        (LAYER_NORM, 1024, torch.bfloat16, "sm_90", False),
        (LAYER_NORM, 8192, torch.float32, "sm_90", False),
        (LAYER_NORM, 6001, torch.float32, "sm_90", True),
        (RMS_NORM, 8192, torch.bfloat16, "sm_90", True),
        (ADD_LAYER_NORM, 8192, torch.float32, "sm_90", False),
        (ADD_LAYER_NORM, 8192, torch.float16, "sm_90", True),
        (LAYER_NORM, 6000, torch.bfloat16, "sm_90", True),
        (LAYER_NORM, 5120, torch.float64, "sm_90", False),
        (ADD_LAYER_NORM, 5120, torch.float32, "sm_90", False),
        (ADD_LAYER_NORM, 4096, torch.float64, "sm_90", True),
        (LAYER_NORM, 16384, torch.float32, "sm_90", True),
        (ADD_RMS_NORM, 65536, torch.bfloat16, "sm_90", True),
        (LAYER_NORM, 8192, torch.bfloat16, "sm_80", True),
        (ADD_RMS_NORM, 4096, torch.float32, "sm_100", True),
        (LAYER_NORM, 16384, torch.bfloat16, "sm_120", False),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_no_spills(op: Op, width: int, dtype: torch.dtype, target: str, most: bool) -> None:
    """Where a tile is as large as it gets, and most is asked for."""
    reports = static_report(call_of(op, (8, width), dtype, stats_of(op) if most else None), target)
    assert_no_spills(*reports, known=KNOWN.get((op.name, width, dtype), 0))


@pytest.mark.parametrize(
    ("op", "width", "dtype", "at_work"),
    [
        (LAYER_NORM, 32768, torch.bfloat16, 1),
        (LAYER_NORM, 32768, torch.float32, 1),
        (RMS_NORM, 65536, torch.bfloat16, 2),
        (RMS_NORM, 65536, torch.float32, 1),
        (ADD_RMS_NORM, 65536, torch.float32, 1),
        (ADD_LAYER_NORM, 40001, torch.bfloat16, 1),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_rows_in_chunks_are_few_at_a_time(op: Op, width: int, dtype: torch.dtype, at_work: int) -> None:
    """Of a multiprocessor's 65,536 registers they take what leaves the L2 room for all that are at work."""
    inputs = inputs_of(op, 8, width, device="cpu", dtype=dtype)
    with torch.no_grad():
        (report,) = static_report(lambda: op.call(*inputs))
    assert_no_spills(report)
    assert 65536 // (report.registers * 32 * report.num_warps) == at_work, str(report)
    assert at_work * report.num_warps == (32 if width % 16 == 0 else 8)


@pytest.mark.parametrize(
    ("op", "width", "dtype"),
    [(RMS_NORM, 4096, torch.bfloat16), (ADD_LAYER_NORM, 8192, torch.float32)],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_wide_accesses_and_one_more_store_for_a_point(op: Op, width: int, dtype: torch.dtype) -> None:
    """All of 128 bits but for what is one number a row."""
    forward, off, _sums = static_report(call_of(op, (8, width), dtype, None))
    on = static_report(call_of(op, (8, width), dtype, all_points(op)))[1]
    for report in (forward, off, on):
        moved = {access for access in report.whole_tile if access.startswith(("LDG", "STG"))}
        assert moved <= {"LDG.128", "LDGSTS.128", "STG.128", "LDG.32", "LDGSTS.32", "STG.32"}, str(report)
    assert off.loads == on.loads
    a_tile = max(width, 4096) // (32 * off.num_warps)
    stores = sum(
        a_tile * (x.dtype.itemsize if name == "summed" else 4) // 16 for name, x in points_of(op, width, dtype)
    )
    assert on.whole_tile["STG.128"] - off.whole_tile["STG.128"] == stores


def points_of(op: Op, width: int, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        found.append((name, value))
        return value

    op.reference(*inputs_of(op, 1, width, device="cpu", dtype=dtype), point)
    return found


@pytest.mark.parametrize("op", [LAYER_NORM, ADD_RMS_NORM], ids=lambda op: op.name)
def test_each_byte_is_moved_once(op: Op) -> None:
    """In rows that fit into registers: counted as the compiled code is executed. Weights are read by each program."""
    rows, width, counts = 6, 4096, []
    inputs = inputs_of(op, rows, width, device="cpu")
    size, row = 4 * rows * width, 4 * width
    with driver("sm_90", lambda launch: counts.append((launch.grid[0], ptx.run(launch)))):
        outputs = several(op.call(*inputs))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (programs, forward), (_, backward), (_, sums) = counts
    assert programs == rows
    weights, numbers = len(leaves(inputs)) - len(outputs), 4 * rows * (2 if op is LAYER_NORM else 1)
    assert forward.bytes_loaded == len(outputs) * size + weights * rows * row  # a row's weights, from the cache
    assert forward.bytes_stored == len(outputs) * size + numbers
    assert backward.bytes_loaded == (1 + len(outputs)) * size + programs * row + numbers
    assert backward.bytes_stored == size + weights * programs * row  # dx, and a share of dw and db for each program
    assert (sums.bytes_loaded, sums.bytes_stored) == (weights * programs * row, weights * row)
    for count in (forward, backward, sums):
        assert count.sectors == count.ideal_sectors


def test_what_is_asked_for_changes_no_bit_of_the_compiled_codes_results() -> None:
    """Were the compiler free to fuse products into sums, it would do so here and not there."""
    runs, dy = [], torch.linspace(-1, 1, 8 * 1024).view(8, 1024)
    with simulated_gpu(engine="ptx"):
        for kept in (None, ro.Retained("xhat"), stats_of(LAYER_NORM), ro.Retained(xhat=ro.Stats(*MOST))):
            inputs = inputs_of(LAYER_NORM, 8, 1024, device="cpu")
            y = LAYER_NORM.call(*inputs, retain=kept)
            runs.append([y, *torch.autograd.grad(y, leaves(inputs), dy)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("dtype", "memory_format", "target"),
    [
        (torch.bfloat16, torch.contiguous_format, "sm_90"),
        (torch.bfloat16, torch.channels_last, "sm_90"),
        (torch.float64, torch.channels_last, "sm_80"),
    ],
    ids=str,
)
def test_group_norm(dtype: torch.dtype, memory_format: Any, target: str) -> None:
    """Each kernel that reads x, or dy, reads it once, 128 bits at a time: no copy, in either layout."""
    x = torch.empty(2, 64, 64, 64, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    w, b = (torch.empty(64, dtype=dtype, requires_grad=True) for _ in "wb")

    def call() -> None:
        y = group_norm(x, 4, w, b, retain=ro.Retained(xhat=ro.Stats(*MOST)))
        torch.autograd.grad(y, (x, w, b), torch.empty_like(y))

    reports = {r.name.removeprefix("group_norm_").removesuffix("_kernel"): r for r in static_report(call, target)}
    assert list(reports) == ["moments", "gather", "fwd", "sums", "project", "bwd"]
    assert_no_spills(*reports.values())
    dense = memory_format is torch.contiguous_format
    for name, read, written in (("moments", 1, 0), ("fwd", 1, 1), ("sums", 2, 0), ("bwd", 2, 1)):
        report = reports[name]
        once = (4096 if dense else 8192) * dtype.itemsize // 16 // (32 * report.num_warps)
        for_channels = (
            0 if dense else 5 * 4
        )  # what there is once a channel: up to five tensors, 128 bits at a time, too
        assert report.whole_tile["STG.128"] == written * once, str(report)
        assert 0 <= report.whole_tile["LDG.128"] - read * once <= for_channels, str(report)
