"""The machine code of softmax and log_softmax: no spills, and each tensor moved once. No GPU is needed to read it."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from retainops.ops.softmax import log_softmax, softmax
from retainops.testing import static_report
from retainops.testing.static import KernelReport


@pytest.mark.parametrize(
    ("width", "dtype", "statistic", "target"),
    [
        (1, torch.float32, "hist", "sm_90"),
        (1024, torch.bfloat16, "act_grad", "sm_90"),
        (4096, torch.float64, "act_grad", "sm_120"),
        (8192, torch.float32, "act_grad", "sm_80"),
        (16384, torch.float32, "l2", "sm_90"),
        (65536, torch.float64, "act_grad", "sm_100"),
    ],
    ids=str,
)
def test_no_spills(width: int, dtype: torch.dtype, statistic: str, target: str) -> None:
    """Where a tile is as large as it gets, and most is asked for."""
    x, mask = torch.ones(4, width, dtype=dtype, requires_grad=True), torch.ones(4, width, dtype=torch.bool)
    want = ro.Stats(statistic, "amax", grad=True)
    op = softmax if statistic == "l2" else log_softmax
    dy = torch.ones(4, width, dtype=dtype)
    for report in static_report(lambda: op(x, 0.5, mask, True, retain=ro.Retained(scaled=want)).backward(dy), target):
        assert (report.spill_stores, report.spill_loads) == (0, 0), str(report)


@pytest.mark.parametrize("width", [1024, 8192])
def test_each_tensor_is_moved_once(width: int) -> None:
    """A whole row: x or y and dy are read once and y or dx is written once, 128 bits at a time, and one point is one
    store more."""
    x = torch.ones(4, width, dtype=torch.bfloat16, requires_grad=True)

    def run(retain: ro.Retained | None) -> None:
        y = softmax(x, retain=retain)
        torch.autograd.grad(y, x, torch.ones_like(y))

    forward, backward = static_report(lambda: run(None))
    retaining = static_report(lambda: run(ro.Retained("scaled")))[-1]
    elements = width * max(2048 // width, 1) / (32 * forward.num_warps)
    once = elements * 2 // 16  # of 2 bytes
    assert to_global(forward) == {"LDG.128": once, "STG.128": once}
    assert to_global(backward) == {"LDG.128": 2 * once, "STG.128": once}
    assert to_global(retaining) == {"LDG.128": 2 * once, "STG.128": 2 * once}


def to_global(report: KernelReport) -> dict[str, int]:
    """What a warp executes for a whole tile, without shared memory."""
    return {name: times for name, times in report.whole_tile.items() if name.startswith(("LDG", "STG"))}
