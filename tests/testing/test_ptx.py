"""The PTX emulator on Triton's kernels: results against float64, and counters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import retainops as ro  # noqa: E402
from retainops.testing.driver import driver  # noqa: E402
from retainops.testing.ptx import Counters, Emulator, PTXError, run  # noqa: E402
from tests.testing.ptx_kernels import (  # noqa: E402
    assembly_kernel,
    column_sum_kernel,
    copy_kernel,
    cos,
    divide_kernel,
    erf,
    exp,
    extremes_kernel,
    log,
    mixed_kernel,
    pipelined_kernel,
    rms_norm_kernel,
    rsqrt,
    run_all,
    scan_kernel,
    sin,
    sqrt,
    strided_kernel,
    tanh,
    transpose_kernel,
    unary,
)

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [FP32, FP64, FP16, BF16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def ulps(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error in units in the last place of the result; not-finite results have to agree."""
    rounded = exact.to(got.dtype)
    finite = rounded.isfinite()
    assert torch.equal(got[~finite].nan_to_num(12345.0), rounded[~finite].nan_to_num(12345.0))
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(exact[finite].abs().clamp(min=info.tiny))[1] - 1
    ulp = info.eps * torch.exp2(exponent.double())
    return float(((got[finite].double() - exact[finite]).abs() / ulp).max())


def spread(low: float, high: float, n: int = 3000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(n, generator=generator, dtype=FP64) * (high - low) + low


EDGES = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e38, 105615.0, 1e6, math.pi, -math.pi / 2]
TRIG = torch.cat([spread(-8, 8, 900), spread(-1e3, 1e3, 900), spread(1e5, 1e6, 200), torch.tensor(EDGES, dtype=FP64)])

# The bounds of libdevice (CUDA's programming guide), and for what Triton lowers to ex2.approx and lg2.approx the error
# that follows from the fp32 product before it.
ACCURACY = [
    (sin, torch.sin, FP32, TRIG, 1.5),
    (cos, torch.cos, FP32, TRIG, 1.5),
    (sin, torch.sin, FP64, torch.cat([TRIG, torch.tensor([1e300, -1e22], dtype=FP64)]), 1.5),
    (cos, torch.cos, FP64, torch.cat([TRIG, torch.tensor([1e300, -1e22], dtype=FP64)]), 1.5),
    (exp, torch.exp, FP32, spread(-10, 10), 9),
    (exp, torch.exp, FP64, spread(-700, 700), 1.5),
    (log, torch.log, FP32, torch.cat([spread(1e-3, 1e3), torch.tensor([0.0, math.inf, -1.0])]), 1),
    (log, torch.log, FP64, spread(1e-3, 1e3), 1.5),
    (sqrt, torch.sqrt, FP32, spread(0, 1e3), 0.5),
    (rsqrt, torch.rsqrt, FP32, spread(1e-3, 1e3), 0.5),
    (erf, torch.erf, FP32, spread(-4, 4), 1.5),
    (tanh, torch.tanh, FP32, spread(-10, 10), 2),
    (tanh, torch.tanh, FP64, spread(-10, 10), 1.5),
]


@pytest.mark.parametrize(("f", "exact", "dtype", "x", "bound"), ACCURACY)
def test_functions_are_within_their_bounds_of_float64(f, exact, dtype, x, bound):
    x = x.to(dtype)
    assert ulps(unary(f, x), exact(x.double())) <= bound


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("f", "exact"), [(sin, torch.sin), (cos, torch.cos), (sqrt, torch.sqrt)])
def test_short_types_are_rounded_correctly(f, exact, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    normal = every.abs() > 1e-37  # tl.sin and the like flush subnormal fp32 numbers
    x = every[every.isnan() | (every == 0) | normal & (every.abs() <= 6e4)][::7].contiguous()
    got, expected = unary(f, x), exact(x.double()).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 1000, 1024, 2049])
def test_a_masked_tail_is_left_alone(dtype, n):
    x, y = torch.randn(4096).to(dtype), torch.full((4096,), 7.0).to(dtype)
    run_all(copy_kernel, (4,), x, y, n, 1, BLOCK=1024)
    assert torch.equal(y, torch.where(torch.arange(4096) < n, x, torch.tensor(7.0, dtype=dtype)))


@pytest.mark.parametrize(("dtype", "bound"), [(FP32, 4), (FP16, 0.501), (BF16, 0.501)])
@pytest.mark.parametrize("n", [60, 1000, 2048])
def test_row_reduction(dtype, bound, n):
    x, w, y = (torch.randn(5, n).to(dtype), torch.randn(n).to(dtype), torch.empty(5, n, dtype=dtype))
    run_all(rms_norm_kernel, (5,), x, w, y, n, 1e-5, BLOCK=triton.next_power_of_2(n))
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    assert ulps(y, exact) <= bound


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("warps", [1, 4])
def test_column_reduction_through_shared_memory(dtype, warps):
    x, y = torch.randn(77, 61).to(dtype), torch.empty(61)
    launch, counters = run_all(column_sum_kernel, (2,), x, y, 77, 61, BM=16, BN=32, num_warps=warps)
    torch.testing.assert_close(y.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    assert warps == 1 or (launch.kernel.metadata.shared > 0 and counters.count("bar.sync") > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_moves_every_element(dtype):
    x, y = torch.randn(64, 32).to(dtype), torch.empty(32, 64, dtype=dtype)
    run_all(transpose_kernel, (1,), x, y, M=64, N=32)
    assert torch.equal(y, x.t())


@pytest.mark.parametrize("n", [8192, 5000])
def test_pipelined_loop_copies_asynchronously(n):
    x, y = torch.randn(n), torch.empty(n)
    launch, counters = run_all(pipelined_kernel, (3,), x, y, n, BLOCK=1024)
    assert torch.equal(y, x * 2)
    assert counters.count("cp.async.c") > 0
    unwaited = launch.kernel.asm["ptx"].replace("cp.async.wait_group", "// ")
    emulator = Emulator(unwaited)
    emulator.launch(launch.grid, 128, [x, y, n], launch.kernel.metadata.shared)
    assert y.isnan().any()  # shared memory before the copies arrive


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_kernels(dtype):
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max, (1000,), generator=torch.Generator().manual_seed(1)).to(dtype)
    y, z = torch.empty_like(x), torch.empty(4, dtype=torch.int64)
    run_all(scan_kernel, (1,), x, y, 1000, BLOCK=1024)
    assert torch.equal(y, x.cumsum(0).to(dtype))
    run_all(extremes_kernel, (1,), x, z, 1000, BLOCK=1024)
    total = x.sum().to(torch.int32 if dtype.itemsize < 8 else dtype)
    assert z.tolist() == [total, x.max(), x.min(), x.argmax()]
    for d in (7, -3):
        q = torch.div(x.long(), d, rounding_mode="trunc")
        run_all(divide_kernel, (1,), x.long(), z := torch.empty_like(x.long()), 1000, d, BLOCK=1024)
        assert torch.equal(z, q * 1000 + (x.long() - q * d))


def test_addresses_beyond_31_bits():
    step = 2**30 + 16
    x = torch.empty(2 * step + 64, dtype=torch.int8)  # its pages are never touched, but for the few below
    view = x.as_strided((3, 64), (step, 1))
    view.copy_(torch.arange(192, dtype=torch.int8).reshape(3, 64))
    y = torch.empty(3, 64, dtype=torch.int8)
    run_all(strided_kernel, (3,), view, y, 3, 64, step, 1, WIDE=True, BLOCK=64)
    assert torch.equal(y, view)
    with pytest.raises(PTXError, match=r"out of bounds, in \d+ threads: thread \d+ of CTA \(2, 0, 0\).*\n.*load|ld"):
        run_all(strided_kernel, (3,), view, y, 3, 64, step, 1, WIDE=False, BLOCK=64)


def test_views_keep_their_strides_and_bounds():
    base = torch.randn(40, 50)
    for view in (base.t(), base[3:30:2, 5:45:3], base[:, :1].expand(40, 20)):
        m, n = view.shape
        y = torch.empty(m, n)
        run_all(strided_kernel, (m,), view, y, m, n, *view.stride(), WIDE=True, BLOCK=64)
        assert torch.equal(y, view)
    view = base[10:20]
    with pytest.raises(PTXError, match="byte 2000 of X, which has 2000 bytes"):  # inside base, beyond the view
        run_all(strided_kernel, (11,), view, torch.empty(11, 50), 11, 50, 50, 1, WIDE=True, BLOCK=64)


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("second", [None, "tensor"])
def test_arguments_are_flattened_by_the_signature(dtype, second):
    x, z, y = (torch.randn(100, dtype=dtype) for _ in range(3))
    xs = Pair(x, (2.5, None if second is None else z))
    for flag in (True, False):
        run_all(mixed_kernel, (1,), xs, y, 1, flag, 0.5, 2**40, 100, BLOCK=128)
        inner = (x if second is None else x + z) * 2.5 + 1
        torch.testing.assert_close(y, (inner * 0.5 if flag else inner) + 2**40)


def test_nothing_to_do():
    empty = torch.empty(0)
    _, counters = run_all(copy_kernel, (1,), empty, torch.empty(0), 0, 1, BLOCK=128)
    assert (counters.bytes_loaded, counters.bytes_stored, counters.sectors) == (0, 0, 0)
    with pytest.raises(PTXError, match="of X, which has 0 bytes"):
        run_all(copy_kernel, (1,), empty, torch.empty(0), 1, 1, BLOCK=128)
    _, counters = run_all(copy_kernel, (0,), empty, torch.empty(0), 0, 1, BLOCK=128)
    assert counters == Counters()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_whole_op_runs_through_its_ptx(dtype):
    a, b, dy = (torch.randn(7, 33, dtype=FP64).to(dtype).requires_grad_() for _ in range(3))
    kept = ro.Retained("c")
    with driver("sm_90", execute=run):
        y = ro.mul_sin(a, b, retain=kept)
        y.backward(dy.detach())
    x, w = a.detach().double(), b.detach().double()
    dc = dy.detach().double() * torch.cos(x * w)
    results: list[Any] = [y, kept.c.grad, a.grad, b.grad]
    for got, exact in zip(results, (torch.sin(x * w), dc, dc * w, dc * x), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_inline_assembly_has_registers_of_its_own():
    x, y = torch.randint(-(2**31), 2**31, (128,), dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    run_all(assembly_kernel, (1,), x, y, BLOCK=128)
    swapped = x.numpy().byteswap()
    assert np.array_equal(y.numpy(), swapped ^ x.numpy())


# Counters


def test_coalesced_copies_touch_the_fewest_sectors():
    x, y = torch.randn(4096), torch.empty(4096)
    _, counters = run_all(copy_kernel, (4,), x, y, 4096, 1, BLOCK=1024)
    assert counters.bytes_loaded == counters.bytes_stored == 4096 * 4
    assert counters.sectors == counters.ideal_sectors == 2 * 4096 * 4 // 32
    assert counters.count("ld.global.v4.b32") == counters.count("ld.global") == 2 * 4 * 4  # a thread, a CTA: 2


def test_strided_copies_touch_a_sector_an_element():
    x, y = torch.randn(32 * 256), torch.empty(32 * 256)
    _, counters = run_all(copy_kernel, (1,), x, y, 256, 32, BLOCK=256)
    assert torch.equal(x[::32], y[::32])
    assert counters.bytes_loaded == counters.bytes_stored == 256 * 4
    assert (counters.sectors, counters.ideal_sectors) == (2 * 256, 2 * 256 * 4 // 32)
    assert (counters + counters).sectors == 2 * counters.sectors
