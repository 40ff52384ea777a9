"""The static report, on small kernels written for it: what it must see, and what it must tell apart."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton", reason="without triton there is no machine code to report on")
import triton.language as tl  # noqa: E402

from retainops.testing import sass, static_report  # noqa: E402
from retainops.testing.driver import driver  # noqa: E402
from retainops.testing.static import KernelReport, assemble  # noqa: E402

NVIDIA = ["sm_80", "sm_90", "sm_100", "sm_120"]
ALIGNED, RAGGED, BLOCK = 4096, 4099, 1024
SPILLING = {"sm_90": 8192, "gfx942": 32768}  # elements of a tile that one warp cannot hold: 256 and 512 a thread


@triton.jit
def double_kernel(X, Y, C, N, BLOCK: tl.constexpr):
    """y = 2x + 1, with c = 2x stored if anybody asks: unmasked where the tile is whole, masked at the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = tl.program_id(0) * BLOCK + BLOCK <= N
    if whole:
        x = tl.load(X + i)
    else:
        x = tl.load(X + i, mask=i < N, other=0.0)
    c = x.to(tl.float32) * 2
    y = (c + 1).to(Y.dtype.element_ty)
    if whole:
        tl.store(Y + i, y)
    else:
        tl.store(Y + i, y, mask=i < N)
    if C is not None:
        if whole:
            tl.store(C + i, c.to(C.dtype.element_ty))
        else:
            tl.store(C + i, c.to(C.dtype.element_ty), mask=i < N)


@triton.jit
def double_without_point_kernel(FROM, TO, LENGTH, BLOCK: tl.constexpr):
    """double_kernel as it would be if nobody had thought of c; other names, other lines."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = tl.program_id(0) * BLOCK + BLOCK <= LENGTH
    if whole:
        x = tl.load(FROM + i)
    else:
        x = tl.load(FROM + i, mask=i < LENGTH, other=0.0)

    c = x.to(tl.float32) * 2
    y = (c + 1).to(TO.dtype.element_ty)
    if whole:
        tl.store(TO + i, y)
    else:
        tl.store(TO + i, y, mask=i < LENGTH)


@triton.jit
def double_with_switch_kernel(X, Y, C, N, STORE: tl.constexpr, BLOCK: tl.constexpr):
    """The other way to make c optional: a flag beside a pointer that is always passed."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole = tl.program_id(0) * BLOCK + BLOCK <= N
    if whole:
        x = tl.load(X + i)
    else:
        x = tl.load(X + i, mask=i < N, other=0.0)
    c = x.to(tl.float32) * 2
    y = (c + 1).to(Y.dtype.element_ty)
    if whole:
        tl.store(Y + i, y)
    else:
        tl.store(Y + i, y, mask=i < N)
    if STORE:
        tl.store(C + i, c.to(C.dtype.element_ty), mask=i < N)


@triton.jit
def masked_sin_kernel(X, Y, N, BLOCK: tl.constexpr):
    """y = sin x, masked everywhere."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.sin(tl.load(X + i, mask=i < N).to(tl.float32))
    tl.store(Y + i, y.to(Y.dtype.element_ty), mask=i < N)


@triton.jit
def normalise_kernel(X, Y, BLOCK: tl.constexpr):
    """y = x / sum(x): every element lives until the sum is known."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, x / tl.sum(x))


@triton.jit
def add_kernel(X, Y, BY: tl.constexpr, BLOCK: tl.constexpr):
    """y = x + by."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i) + BY)


def tensors(n: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    return [torch.empty(n, dtype=dtype) for _ in range(count)]


def double(n: int, dtype: torch.dtype = torch.float32, retain: bool = False) -> Callable[[], object]:
    x, y, c = tensors(n, dtype, 3)
    return lambda: double_kernel[(triton.cdiv(n, BLOCK),)](x, y, c if retain else None, n, BLOCK=BLOCK)


def add(by: int) -> None:
    add_kernel[(1,)](*tensors(128, torch.float32, 2), BY=by, BLOCK=128)


def normalise(block: int, warps: int, **options: int) -> None:
    normalise_kernel[(1,)](*tensors(block, torch.float32, 2), BLOCK=block, num_warps=warps, **options)


def only(call: Callable[[], object], target: str = "sm_90") -> KernelReport:
    (report,) = static_report(call, target)
    return report


@pytest.mark.parametrize("n", [ALIGNED, RAGGED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_none_pointer_costs_nothing(target: str, dtype: torch.dtype, n: int) -> None:
    x, y = tensors(n, dtype, 2)
    grid = (triton.cdiv(n, BLOCK),)
    none = only(lambda: double_kernel[grid](x, y, None, n, BLOCK=BLOCK), target)
    never = only(lambda: double_without_point_kernel[grid](x, y, n, BLOCK=BLOCK), target)
    assert none.name != never.name
    assert none.machine_code == never.machine_code
    assert none.registers == never.registers


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_dummy_pointer_costs_something(target: str) -> None:
    x, y, c = tensors(RAGGED, torch.float32, 3)
    never = only(lambda: double_without_point_kernel[(5,)](x, y, RAGGED, BLOCK=BLOCK), target)
    dummy = only(lambda: double_with_switch_kernel[(5,)](x, y, c, RAGGED, STORE=False, BLOCK=BLOCK), target)
    assert dummy.stores == never.stores  # it stores no c ...
    assert dummy.machine_code != never.machine_code  # ... and is another kernel all the same


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_one_other_number_is_other_machine_code(target: str) -> None:
    one, other, again = (only(functools.partial(add, by), target) for by in (1, 2, 1))
    assert one.mix == other.mix
    assert one.machine_code != other.machine_code
    assert one.machine_code == again.machine_code


@pytest.mark.parametrize(
    ("dtype", "target"),
    [(torch.bfloat16, "sm_80"), (torch.float32, "sm_90"), (torch.float32, "sm_100"), (torch.bfloat16, "sm_120")],
)
def test_a_retained_output_is_one_more_store(dtype: torch.dtype, target: str) -> None:
    accesses = BLOCK * dtype.itemsize // (4 * 32 * 16)  # a tensor's 128-bit accesses a thread
    plain, kept = (only(double(RAGGED, dtype, retain), target) for retain in (False, True))
    assert plain.whole_tile == {"LDG.128": accesses, "STG.128": accesses}
    assert kept.whole_tile == {"LDG.128": accesses, "STG.128": 2 * accesses}
    assert {width: 2 * count for width, count in plain.stores.items()} == kept.stores
    assert plain.loads == kept.loads


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64], ids=str)
def test_a_whole_tile_is_wide_at_any_length_and_the_tail_is_counted_apart(dtype: torch.dtype) -> None:
    bits, elements = 8 * dtype.itemsize, BLOCK // 128
    report = only(double(RAGGED, dtype))
    assert report.narrowest == min(128, bits * elements)
    assert report.loads[f"LDG.{bits}"] == elements  # in the tail: one access an element
    assert report.whole_tile[f"LDG.{bits}"] == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_a_mask_makes_accesses_narrow_unless_the_length_is_aligned(target: str) -> None:
    x, y = tensors(RAGGED, torch.bfloat16, 2)
    aligned = only(lambda: masked_sin_kernel[(4,)](x, y, ALIGNED, BLOCK=BLOCK), target)
    ragged = only(lambda: masked_sin_kernel[(5,)](x, y, RAGGED, BLOCK=BLOCK), target)
    assert (aligned.loads, aligned.stores, aligned.narrowest) == ({"LDG.128": 1}, {"STG.128": 1}, 128)
    assert (ragged.loads, ragged.stores, ragged.narrowest) == ({"LDG.16": 8}, {"STG.16": 8}, 16)


@pytest.mark.parametrize("target", ["sm_90", "sm_120"])
def test_the_table_of_sin_is_no_load_of_a_tensor(target: str) -> None:
    x, y = tensors(ALIGNED, torch.float32, 2)
    report = only(lambda: masked_sin_kernel[(4,)](x, y, ALIGNED, BLOCK=BLOCK), target)
    assert report.accesses["LDG.CONSTANT.32"] == BLOCK // 128  # one slow path an element
    assert report.loads == {"LDG.128": 2}
    assert "LDG.CONSTANT.32" not in report.whole_tile
    assert (report.spill_stores, report.spill_loads) == (0, 0)  # a slow path's stack is no spill
    assert len(report.path) < report.instructions / 2


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_spills_are_seen(target: str) -> None:
    few = only(lambda: normalise(1024, 4), target)
    many = only(lambda: normalise(SPILLING[target], 1), target)
    assert (few.spill_stores, few.spill_loads, few.stack) == (0, 0, 0)
    assert many.spill_stores >= 4
    assert many.spill_loads >= 4
    assert many.stack > 0
    assert many.registers > few.registers
    assert "no spills" in str(few)
    assert f"SPILLS {many.spill_stores} B" in str(many)


def test_registers_and_spills_are_those_of_the_code_that_runs() -> None:
    """ptxas is asked a second time for its log: it must be about the same instructions."""

    def starved() -> None:
        normalise(2048, 1, maxnreg=32)

    report = only(starved)
    with driver("sm_90") as launches:
        starved()
    cubin, log = assemble(launches[0].kernel)
    assert sass.machine_code(cubin) == sass.machine_code(launches[0].kernel.asm["cubin"]) == report.machine_code
    assert report.registers == 32
    assert f"{report.spill_stores} bytes spill stores, {report.spill_loads} bytes spill loads" in log
    assert report.spill_stores != report.spill_loads


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_every_target_has_a_full_report(target: str) -> None:
    report = only(double(ALIGNED, torch.bfloat16, retain=True), target)
    assert (report.name, report.target, report.num_warps, report.shared) == ("double_kernel", target, 4, 0)
    assert 8 < report.registers < 64
    assert report.instructions == sum(report.mix.values()) > 20
    assert not {"NOP", "s_nop"} & set(report.mix)
    assert sum(report.mix[end] for end in ("EXIT", "s_endpgm")) > 0
    assert report.loads
    assert report.stores
    assert report.machine_code == only(double(ALIGNED, torch.bfloat16, retain=True), target).machine_code
    text = str(report)
    assert f"double_kernel for {target}: 4 warps" in text
    assert all(name in text for name in report.accesses)


def test_on_amd_a_thread_has_4_elements_and_its_accesses_have_their_own_names() -> None:
    report = only(double(ALIGNED, torch.float32), "gfx942")
    assert any(name.endswith("load_dwordx4") for name in report.loads)
    assert any(name.endswith("store_dwordx4") for name in report.stores)
    with pytest.raises(ValueError, match="followed for sm_"):
        _ = report.whole_tile


def test_shared_memory_is_counted() -> None:
    report = only(lambda: normalise(1024, 4))
    assert report.shared == 4 * 4  # the sums of 4 warps
    assert report.accesses["STS.32"] > 0


def test_each_compiled_kernel_is_listed_once_in_order_of_launch() -> None:
    def call() -> None:
        double(ALIGNED)()
        double(RAGGED)()
        double(2 * ALIGNED)()  # divisible by 16 too: the same specialisation
        double_without_point_kernel[(4,)](*tensors(ALIGNED, torch.float32, 2), ALIGNED, BLOCK=BLOCK)

    names = [r.name for r in static_report(call)]
    assert names == ["double_kernel", "double_kernel", "double_without_point_kernel"]


def test_nothing_is_executed() -> None:
    x, y = torch.ones(ALIGNED), torch.full((ALIGNED,), 7.0)
    static_report(lambda: double_kernel[(4,)](x, y, None, ALIGNED, BLOCK=BLOCK))
    assert (y == 7).all()


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"launched no kernel.*retainops\.explain"):
        static_report(lambda: torch.ones(3).sum())
    with pytest.raises(ValueError, match="unknown target 'sm_70'.*sm_90"):
        static_report(double(ALIGNED), "sm_70")


def test_fusion_is_on_and_chosen_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 warns when nobody chose; the driver chooses what a plain launch would get, and cleans up."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    said_once = getattr(triton._utils, "warn_once", None)  # triton 3.9
    if said_once is not None:
        said_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = only(double(ALIGNED))
    assert fused.mix["FFMA"] == BLOCK // 128
    assert "TRITON_DEFAULT_FP_FUSION" not in os.environ


def test_fusion_is_off_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    x, y = tensors(128, torch.float32, 2)
    with driver("sm_90") as launches:  # a block size of its own: the choice is no part of the key in memory
        double_without_point_kernel[(1,)](x, y, 128, BLOCK=128)
    assert launches[0].kernel.metadata.enable_fp_fusion is False
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "0"
