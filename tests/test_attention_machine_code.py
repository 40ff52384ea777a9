"""The machine code of attention's kernels: tensor cores, no spills, 128 bits at a time. No GPU is needed to read it."""

from __future__ import annotations

import pytest
import torch

from retainops.ops import _scores_kernels as kernels
from retainops.ops._scores import Scores, Wanted
from retainops.testing import static_report
from retainops.testing.static import KernelReport

PARTS = "sumsq", "sum", "abs_sum", "act_grad", "amax", "nonfinite"
SMALL_SHARED = 99 * 1024
"""Bytes that a program may have on sm_86, sm_89 and sm_120; on sm_80, sm_90 and sm_100 it is 163 KiB or more."""
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


def reports(target: str, dtype: torch.dtype, d: int, asked: str, bound: str = "") -> list[KernelReport]:
    """Of the kernels that answer, where lse and delta are given."""
    b, h, n = 1, 4, 1024
    q = torch.empty(b, h, n, d, dtype=dtype)
    lse = torch.empty(b, h, n)
    mask = torch.zeros(1, 1, n, n, dtype=dtype) if "mask" in bound else None
    scores = Scores(q, q, q, mask, q, None, lse, 0.3, "causal" in bound, (None, None), None, None, None, lse)
    scores = scores._replace(top=None if mask is None else lse)
    s = p = None
    if asked in ("s", "s and p"):
        s = Wanted(torch.empty(b, h, n, n, dtype=dtype))
    if asked in ("p", "s and p"):
        p = Wanted(torch.empty(b, h, n, n, dtype=dtype))
    if asked.startswith("statistics"):
        s = Wanted(parts=PARTS, over=asked.split()[-1])
    if asked in ("chefer", "attn_grad", "legrad"):
        p = Wanted(relevance=(asked,))
    return static_report(lambda: kernels.answer(scores, s, p), target)


def spills(report: KernelReport) -> int:
    return report.spill_stores + report.spill_loads


@pytest.mark.parametrize(
    ("target", "dtype", "d", "asked", "bound"),
    [
        ("sm_90", torch.bfloat16, 128, "chefer", "causal"),
        ("sm_90", torch.bfloat16, 128, "s and p", "causal"),
        ("sm_90", torch.bfloat16, 64, "statistics over queries", ""),
        ("sm_90", torch.float16, 80, "s", ""),
        ("sm_90", torch.float16, 256, "attn_grad", ""),
        ("sm_80", torch.bfloat16, 128, "chefer", ""),
        ("sm_80", torch.float16, 96, "legrad", ""),
        ("sm_100", torch.bfloat16, 128, "chefer", "causal"),
        ("sm_100", torch.float16, 64, "s and p", ""),
        ("sm_120", torch.bfloat16, 128, "chefer", "causal"),
        ("sm_120", torch.bfloat16, 128, "attn_grad", "causal, mask"),
        ("sm_120", torch.bfloat16, 72, "s", "causal"),
        ("sm_120", torch.bfloat16, 128, "statistics over keys", ""),
        ("sm_90", torch.bfloat16, 128, "s and p", "mask"),
        ("sm_80", torch.float32, 64, "s and p", "causal"),
        ("sm_90", torch.float32, 128, "chefer", ""),
        ("sm_90", torch.float32, 80, "statistics over queries", ""),
    ],
    ids=str,
)
def test_no_spills_and_tensor_cores_for_16_bits(
    target: str, dtype: torch.dtype, d: int, asked: str, bound: str
) -> None:
    """float32 goes without: tensor cores would round it to 10 bits."""
    for report in reports(target, dtype, d, asked, bound):
        assert spills(report) == 0, str(report)
        assert report.shared <= SMALL_SHARED or target != "sm_120"
        assert (report.mix[TENSOR_CORES[target]] > 0) == (dtype != torch.float32), str(report)


def test_lse_and_delta_where_they_are_made() -> None:
    q = torch.empty(1, 4, 1024, 128, dtype=torch.bfloat16)
    scores = Scores(q, q, q, None, q, q, None, 0.3, True, (None, None), None, None, None)
    lse, delta, _ = static_report(lambda: kernels.answer(scores, Wanted(parts=("sumsq",)), None))
    assert (lse.name, delta.name) == ("lse_kernel", "delta_kernel")
    assert spills(lse) == spills(delta) == 0
    assert set(delta.loads) == {"LDG.128"}


def test_one_more_store_for_one_more_point_and_none_for_none() -> None:
    """Loads are 128 bits wide, and so are stores. Where only p is asked for there is no exponential either."""
    (s,), (p,), (both,) = (reports("sm_90", torch.bfloat16, 128, asked) for asked in ("s", "p", "s and p"))
    assert s.stores == p.stores
    assert set(s.stores) == {"STG.128"}
    assert both.stores["STG.128"] == 2 * s.stores["STG.128"]
    assert s.accesses["LDGSTS.128"] == both.accesses["LDGSTS.128"] > 0
    assert not {name for name in s.accesses if name.startswith("LDGSTS") and name != "LDGSTS.128"}
    assert s.mix["MUFU"] - p.mix["MUFU"] == 128 * 128 // (32 * s.num_warps), "an exponential each, and p takes none"
    assert set(p.loads) == {"LDGSTS.128"}, "lse and delta are not read where nobody needs them"


def test_statistics_store_numbers_alone() -> None:
    (report,) = reports("sm_90", torch.bfloat16, 128, "statistics over queries")
    assert report.stores == {"STG.32": len(PARTS)}
    (legrad,) = reports("sm_90", torch.bfloat16, 128, "legrad")
    assert legrad.stores == {"STG.32": 1}


@pytest.mark.parametrize("asked", ["chefer", "s and p"])
def test_it_compiles_for_amd(asked: str) -> None:
    for report in reports("gfx942", torch.bfloat16, 128, asked):
        assert spills(report) == 0, str(report)
        assert report.shared <= 64 * 1024
        assert any("mfma" in name for name in report.mix)
