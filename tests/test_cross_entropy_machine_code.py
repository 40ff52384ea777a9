"""What cross_entropy costs: its launches, and the machine code of its kernels."""

from __future__ import annotations

import itertools

import pytest
import torch

import retainops as ro
from retainops.ops.cross_entropy import cross_entropy
from tests.conftest import GPU
from tests.cross_entropy_cases import drawn, targets
from tests.triton_version import IS_OLDEST


@pytest.mark.skipif(GPU, reason="counts the launches of the simulated GPU")
def test_one_kernel_each_way() -> None:
    from retainops.testing import simulated_gpu

    x, t = drawn(4, 6).requires_grad_(), targets(6, 4)
    with simulated_gpu(compiles=False) as launches:
        cross_entropy(x, t, label_smoothing=0.1, retain=ro.Retained("logits", "p")).backward()
    assert [launch.name.split("_")[2] for launch in launches] == ["fwd", "mean", "bwd"]


OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
SPILLS = [
    *(("sm_90", torch.bfloat16, n) for n in (1, 100, 256, 50257)),
    *(("sm_90", torch.float64, n) for n in (256, 500)),
    ("sm_80", torch.float32, 131072),
    ("sm_100", torch.float32, 2048),
    ("sm_120", torch.bfloat16, 100),
]
KNOWN = (
    {
        ("sm_80", torch.float64, 256): 4,
        ("sm_90", torch.bfloat16, 100): 4,
        ("sm_90", torch.float32, 100): 4,
        ("sm_120", torch.float64, 256): 4,
    }
    if IS_OLDEST
    else {("sm_80", torch.bfloat16, 100): 4, ("sm_120", torch.bfloat16, 17): 16, ("sm_120", torch.bfloat16, 100): 12}
)
"""Bytes that are known to spill: a few registers a thread, where ptxas stops at 80 or 96 of them.

The oldest Triton writes other PTX, whose spills are others: one register, where ptxas stops at 64, 72 or 128.
"""
KNOWN_WITH_ALL = (
    {
        ("sm_90", torch.bfloat16, 64): 8,
        ("sm_90", torch.bfloat16, 100): 12,
        ("sm_90", torch.float32, 100): 12,
        ("sm_90", torch.float32, 2048): 8,
        ("sm_90", torch.float32, 4096): 8,
        ("sm_90", torch.float64, 50257): 4,
    }
    if IS_OLDEST
    else {}
)
"""The same with all options and nearly all statistics at once: up to three registers, of 96, 128, 168 or 255."""
EVERY = itertools.product(
    ["sm_80", "sm_90", "sm_100", "sm_120"],
    [torch.bfloat16, torch.float32, torch.float64],
    [1, 2, 17, 64, 100, 256, 500, 1000, 2048, 4096, 50257],
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A kernel is compiled for each power of two, and for widths that divide by 16 or not: all with --every-target."""
    if "target" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-target")
        metafunc.parametrize(("target", "dtype", "n"), list(EVERY) if every else SPILLS, ids=str)


def test_no_spills(target: str, dtype: torch.dtype, n: int) -> None:
    """With all options and nearly all statistics at once, too, on sm_90; elsewhere a few registers do."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    rows = max(4096 // n, 8)  # more than a tile's
    x, t = torch.empty(rows, n, dtype=dtype, requires_grad=True), torch.zeros(rows, dtype=torch.int64)
    kept = ro.Retained("p", logits=ro.Stats("l2", "sum", "amax", "act_grad", over="rows", grad=True))
    weight = torch.ones(n, dtype=dtype)
    known = KNOWN.get((target, dtype, n), 0)
    with_all = KNOWN_WITH_ALL.get((target, dtype, n), 0) if target == "sm_90" else 32
    for most, call in (
        (known, lambda: cross_entropy(x, t)),
        (known, lambda: cross_entropy(x, t, retain=ro.Retained("logits", "p"))),
        (with_all, lambda: cross_entropy(x, t, weight, retain=kept, **OPTIONS)),
    ):
        for report in static_report(lambda call=call: call().backward(), target):
            assert report.spill_stores <= most, str(report)


@pytest.mark.parametrize("n", [1024, 8192, 65536], ids=["one tile a row", "several", "several, of several warps"])
def test_one_read_of_the_logits_each_way_and_one_write(n: int) -> None:
    """Of a tile, 128 bits at a time. What is narrower is of rows: a few numbers each."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    x, t = torch.empty(512, n, dtype=torch.bfloat16, requires_grad=True), torch.zeros(512, dtype=torch.int64)

    def wide_accesses(retain: ro.Retained | None) -> list[tuple[int, int]]:
        forward, _mean, backward = static_report(lambda: cross_entropy(x, t, retain=retain).backward())
        return [(report.whole_tile["LDG.128"], report.whole_tile["STG.128"]) for report in (forward, backward)]

    forward, backward = (32 if n <= 8192 else 16) * 2 // 16, 16 * 2 // 16  # elements a thread, of two bytes
    assert wide_accesses(None) == [(forward, 0), (backward, backward)]
    points = backward + 2 * backward  # p is in float32
    assert wide_accesses(ro.Retained("logits", "p")) == [(forward, 0), (backward, backward + points)]
