"""The PTX emulator: Triton's kernels through it against float64, its faults, its counters, and planted errors."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import libdevice  # noqa: E402

from retainops.testing.driver import Launch, driver  # noqa: E402
from retainops.testing.ptx import Counters, Emulator, PTXError, numerics, run  # noqa: E402
from retainops.testing.ptx.types import TYPES, Type  # noqa: E402

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES = [FP32, FP64, FP16, BF16]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    assert Emulator(PTX.replace("BODY", "")).launch((0,), 32, [empty, empty]).instructions == {}


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


# Faults


def test_out_of_bounds_names_argument_thread_and_line():
    x, y = torch.randn(1000), torch.empty(1000)
    with pytest.raises(PTXError) as error:
        run_all(copy_kernel, (1,), x, y, 1024, 1, BLOCK=1024)
    for part in (
        "copy_kernel",
        "byte 4000 of X, which has 4000 bytes",
        "of CTA (0, 0, 0)",
        "ld.global",
        "test_ptx.py:",
    ):
        assert part in str(error.value)


def test_a_misaligned_pointer_where_alignment_was_compiled_in():
    x, y = torch.randn(1025), torch.zeros(1024)
    launch, _ = run_all(copy_kernel, (1,), x, y, 1024, 1, BLOCK=1024)
    emulator = Emulator(launch.kernel.asm["ptx"])
    emulator.launch((1,), 128, [x, y, 1024])
    with pytest.raises(PTXError, match=r"argument 0|not aligned to 16 bytes, as the kernel was compiled to assume"):
        emulator.launch((1,), 128, [x[1:], y, 1024])
    run_all(copy_kernel, (1,), x[1:], y, 1024, 1, BLOCK=1024)  # Triton compiles another kernel for it
    assert torch.equal(y, x[1:])


def test_unsupported_instructions_say_what_to_do():
    a, c = torch.randn(64, 64).to(BF16), torch.empty(64, 64)
    with pytest.raises(PTXError, match=r"unsupported instruction wgmma.*tensor cores are outside.*interpreter"):
        run_all(dot_kernel, (1,), a, a, c, M=64)
    with pytest.raises(PTXError, match=r"(?s)unsupported instruction frob.rn.f32; to add it, register.*PTX line 15"):
        execute("frob.rn.f32 %r3, %r1, %r2;", 1, 2)
    with pytest.raises(PTXError, match=r"unsupported instruction add.rna.f32"):  # a rounding mode nobody looked at
        execute("add.rna.f32 %r3, %r1, %r2;", 1, 2)
    execute("@!%p0 bra DONE; frob.rn.f32 %r3, %r1, %r2; DONE:", 1, 2)  # not reached


PTX = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 .ptr .global .align 8 X, .param .u64 .ptr .global .align 8 Y)
{
    .reg .pred %p<4>; .reg .b16 %rs<4>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd7, [X];
    ld.param.b64 %rd8, [Y];
    ld.global.v2.b64 {%rd1, %rd2}, [%rd7];
    ld.global.b64 %rd3, [%rd7+16];
    cvt.u32.u64 %r1, %rd1; cvt.u32.u64 %r2, %rd2; cvt.u32.u64 %r3, %rd3; cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2;
    mov.b64 %rd4, 0; mov.b32 %r4, 0; mov.u32 %r0, %tid.x; setp.eq.b32 %p0, %r0, 9999;
    { .reg .b32 %r1; mov.b32 %r1, 7; }
    BODY
    st.global.b64 [%rd8], %rd4;
    ret;
}
"""


def execute(body: str, *inputs: int, threads: int = 32, module: str = PTX) -> int:
    """Runs instructions on inputs in %rd1 to %rd3 (%r1.., %rs1..: their lower bits); the result is taken from %rd4."""
    numbers = [n % 2**64 for n in (*inputs, 0, 0, 0)[:3]]
    x = torch.from_numpy(np.array([*numbers, 0], np.uint64).view(np.int64))
    y = torch.zeros(1, dtype=torch.int64)
    Emulator(module.replace("BODY", body)).launch((1,), threads, [x, y])
    return int(y[0]) % 2**64


MODULE = (
    PTX.replace(
        ".visible .entry",
        """
.extern .func missing(.param .b32 a);
.func (.param .b64 result) twice(.param .b64 a);
.const .align 8 .b64 table[3] = {5, 7, -9};
.global .align 4 .b32 word = 11;
.shared .align 8 .b8 kept[64];
.visible .entry""",
    )
    + """
.func (.param .b64 result) twice(.param .b64 a)
{
    .reg .b64 %rd<3>;
    ld.param.b64 %rd1, [a];
    add.s64 %rd2, %rd1, %rd1;
    st.param.b64 [result], %rd2;
    ret;
}
"""
)
CALL = """{ .param .b64 a; .param .b64 r; st.param.b64 [a], %rd1;
    call.uni (r), twice, (a); ld.param.b64 %rd4, [r]; }"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("ld.const.b64 %rd4, [table+16];", -9),
        ("mov.b64 %rd5, table; ld.const.b64 %rd4, [%rd5+8];", 7),
        ("ld.global.s32 %rd4, [word];", 11),
        (CALL, 42),
        ("setp.eq.u32 %p1, %r0, 0; mov.b64 %rd4, 1; @%p1 bra C; bra E; C: " + CALL + " E:", 42),  # of one thread
        (".local .align 8 .b8 own[16]; mov.b64 %rd5, own; cvta.local.u64 %rd6, %rd5; st.b32 [%rd6+4], %r1; "
         "ld.local.s32 %rd4, [own+4];", 21),
        ("cvt.u64.u32 %rd5, %r0; mov.b64 %rd6, kept; mad.lo.s64 %rd5, %rd5, 2, %rd6; cvta.shared.u64 %rd5, %rd5; "
         "cvt.u16.u32 %rs1, %r0; st.b16 [%rd5], %rs1; bar.warp.sync -1; ld.shared.u16 %rd4, [kept+34];", 17),
        ("cvta.to.global.u64 %rd5, %rd7; ld.b64 %rd4, [%rd5];", 21),
    ],
)  # fmt: skip
def test_functions_tables_and_generic_addresses(body, expected):
    assert execute(body, 21, module=MODULE) == expected % 2**64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{ .param .b32 a; st.param.b32 [a], 1; call.uni missing, (a); }", "missing, which is not in this PTX"),
        ("st.const.b64 [table], %rd1;", "a store to the constant table table"),
        ("ld.const.b64 %rd4, [table+24];", "byte 24 of table, which has 24 bytes"),
        ("call.uni (%r4), %rd4, (%r1);", "function pointer"),
    ],
)
def test_faults_in_functions_and_tables(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body, module=MODULE)


def test_divergence_at_a_barrier_and_at_a_shuffle():
    with pytest.raises(PTXError, match=r"divergence.*\n.*32 threads wait at bar.sync 0.*thread 32 of CTA"):
        execute("setp.lt.u32 %p1, %r0, 32; @%p1 bra B; bar.sync 0; bra E; B: bar.sync 1; E:", threads=64)
    with pytest.raises(PTXError, match=r"divergence.*\n.*16 threads wait at shfl"):
        execute("setp.lt.u32 %p1, %r0, 16; @%p1 bra E; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; E:")
    # Where the paths meet again nobody waits, whichever way the code is laid out.
    execute("setp.lt.u32 %p1, %r0, 16; @%p1 bra F; B: shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; bra E; F: bra B; E:")
    # Threads that have ended are not waited for at a barrier.
    execute("setp.lt.u32 %p1, %r0, 16; @%p1 ret; bar.sync 0;", threads=64)
    with pytest.raises(PTXError, match="a shuffle reads from a thread that does not take part"):
        execute("setp.lt.u32 %p1, %r0, 16; @!%p1 bra E; shfl.sync.idx.b32 %r4, %r1, 20, 31, 0xffff; E:")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r4, [%rd4];", "belongs to no argument"),
        ("ld.shared.b32 %r4, [%r4];", "out of bounds"),
        ("trap;", "failed assertion"),
        ("mov.u32 %r4, %clock;", "special register %clock"),
        ("atom.global.add.u32 %r4, [%rd8], 1;", "atomics"),
        ("mov.b32 %r4, %unknown;", "special register %unknown"),
    ],
)
def test_faults(body, message):
    with pytest.raises(PTXError, match=message):
        execute(body)


def test_misuse():
    with pytest.raises(PTXError, match="no .entry"):
        Emulator(".version 8.0\n")
    with pytest.raises(PTXError, match="unknown name 'nonsense' in PTX line 15: mov.b32 %r1, nonsense"):
        execute("mov.b32 %r1,\n nonsense;")
    with pytest.raises(PTXError, match="cannot read PTX line"):
        Emulator(PTX.replace("BODY", "#define"))
    with pytest.raises(PTXError, match="has 2 parameters; 3 were passed"):
        Emulator(PTX.replace("BODY", "")).launch((1,), 32, [1, 2, 3])
    with pytest.raises(PTXError, match="48 threads in a CTA; expected a multiple of 32"):
        Emulator(PTX.replace("BODY", "")).launch((1,), 48, [1, 2])


# Single instructions: (instructions, inputs, what is left in %rd4)

F32 = {x: int(np.float32(x).view(np.uint32)) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, -1.0, math.inf, -math.inf, 1e30)}
NAN, MINUS_ZERO, TINY = 0x7FC00000, 0x80000000, 0x00000001
INT_MIN = 2**31


def r4(instruction: str) -> str:
    return f"{instruction}; cvt.u64.u32 %rd4, %r4"


INSTRUCTIONS = [
    ("mul.hi.u64 %rd4, %rd1, %rd2", (2**64 - 3, 2**63 + 12345), (2**64 - 3) * (2**63 + 12345) >> 64),
    ("mul.hi.s64 %rd4, %rd1, %rd2", (-3, 2**62 + 5), (-3 * (2**62 + 5)) >> 64),
    (r4("mul.hi.s32 %r4, %r1, %r2"), (-7, 2**30 + 3), (-7 * (2**30 + 3)) >> 32 & 0xFFFFFFFF),
    ("mul.wide.s32 %rd4, %r1, %r2", (-7, 2**30), -7 * 2**30),
    ("mad.wide.u32 %rd4, %r1, %r2, %rd3", (2**32 - 1, 2**32 - 1, 5), (2**32 - 1) ** 2 + 5),
    ("mad.lo.s64 %rd4, %rd1, %rd2, %rd3", (-5, 2**40, 1), -5 * 2**40 + 1),
    ("add.cc.u32 %r4, %r1, %r2; addc.u32 %r5, %r3, 0; mov.b64 %rd4, {%r4, %r5}", (2**32 - 1, 2, 7), 8 << 32 | 1),
    ("sub.cc.u32 %r4, %r1, %r2; subc.u32 %r5, %r3, 0; mov.b64 %rd4, {%r4, %r5}", (1, 2, 7), 6 << 32 | 2**32 - 1),
    (
        "mad.lo.cc.u32 %r4, %r1, %r2, %r3; madc.hi.u32 %r5, %r1, %r2, 0; mov.b64 %rd4, {%r4, %r5}",
        (2**32 - 1, 2**32 - 1, 2**32 - 1),
        (2**32 - 1) ** 2 + 2**32 - 1,
    ),
    ("div.s64 %rd4, %rd1, %rd2", (-7, 2), -3),
    ("rem.s64 %rd4, %rd1, %rd2", (-7, 2), -1),
    (r4("div.u32 %r4, %r1, %r2"), (5, 0), 2**32 - 1),
    (r4("rem.u32 %r4, %r1, %r2"), (5, 0), 5),
    (r4("div.s32 %r4, %r1, %r2"), (INT_MIN, -1), INT_MIN),
    (r4("shl.b32 %r4, %r1, %r2"), (1, 32), 0),
    (r4("shr.s32 %r4, %r1, %r2"), (-8, 40), 2**32 - 1),
    (r4("shr.u32 %r4, %r1, %r2"), (2**31, 31), 1),
    (r4("shf.l.wrap.b32 %r4, %r1, %r2, %r3"), (0x80000001, 0x12345678, 36), 0x23456788),
    (r4("shf.r.clamp.b32 %r4, %r1, %r2, %r3"), (1, 0x12345678, 99), 0x12345678),
    (r4("bfe.u32 %r4, %r1, 4, 8"), (0xABCDE,), 0xCD),
    (r4("bfe.s32 %r4, %r1, 4, 8"), (0xABCDE,), 0xFFFFFFCD),
    (r4("bfe.s32 %r4, %r1, 28, 8"), (0x90000000,), 0xFFFFFFF9),
    (r4("bfe.u32 %r4, %r1, 4, 0"), (0xABCDE,), 0),
    (r4("bfi.b32 %r4, %r1, %r2, 8, 8"), (0x1AB, 0x12345678), 0x1234AB78),
    (r4("clz.b32 %r4, %r1"), (0,), 32),
    (r4("clz.b64 %r4, %rd1"), (2**33,), 30),
    (r4("popc.b64 %r4, %rd1"), (2**64 - 2,), 63),
    (r4("brev.b32 %r4, %r1"), (0b1011,), 0b1101 << 28),
    (r4("bfind.s32 %r4, %r1"), (-5,), 2),
    (r4("bfind.u32 %r4, %r1"), (0,), 2**32 - 1),
    (r4("prmt.b32 %r4, %r1, %r2, 0x7C20"), (0x33221100, 0x778899AA), 0x77FF2200),
    (r4("bfind.shiftamt.u32 %r4, %r1"), (1,), 31),
    ("mad.hi.s64 %rd4, %rd1, %rd2, %rd3", (-3, 2**62, 10), (-3 * 2**62 >> 64) + 10),
    ("cnot.b64 %rd4, %rd1", (0,), 1),
    ("mov.b64 %rd4, {%r2, %r1}", (1, 2), 1 << 32 | 2),
    (r4("cvt.sat.u8.s32 %r4, %r1"), (300,), 255),
    ("cvt.u64.u32 %rd4, %laneid", (), 31),
    (
        r4("mov.b32 %r5, -1; setp.lt.u32 %p1, %r0, 3; @!%p1 bra E; activemask.b32 %r5; E: redux.sync.min.u32 %r4, %r5, -1"),
        (),
        7,
    ),
    (r4("lop3.b32 %r4, %r1, %r2, %r3, 0xE8"), (0b1100, 0b1010, 0b0110), 0b1110),
    (r4("min.s32 %r4, %r1, %r2"), (-1, 1), 2**32 - 1),
    (r4("min.u32 %r4, %r1, %r2"), (-1, 1), 1),
    ("cvt.s64.s16 %rd4, %rs1", (0x8000,), -0x8000),
    ("cvt.u64.u16 %rd4, %rs1", (0x8000,), 0x8000),
    ("cvt.s64.s8 %rd4, %r1", (0x80,), -128),
    (r4("min.f32 %r4, %r1, %r2"), (MINUS_ZERO, 0), MINUS_ZERO),
    (r4("max.f32 %r4, %r1, %r2"), (MINUS_ZERO, 0), 0),
    (r4("max.f32 %r4, %r1, %r2"), (NAN, F32[1.0]), F32[1.0]),
    (r4("max.NaN.f32 %r4, %r1, %r2"), (NAN, F32[1.0]), NAN),
    (r4("max.f32 %r4, %r1, %r2, %r3"), (F32[1.0], F32[3.0], F32[2.0]), F32[3.0]),
    (r4("min.xorsign.abs.f32 %r4, %r1, %r2"), (F32[-1.0], F32[3.0]), F32[-1.0]),
    (r4("add.ftz.f32 %r4, %r1, %r2"), (TINY, TINY), 0),
    (r4("add.f32 %r4, %r1, %r2"), (TINY, TINY), 2),
    (r4("mul.ftz.f32 %r4, %r1, %r2"), (0x80800000, F32[0.5]), MINUS_ZERO),
    (r4("add.sat.f32 %r4, %r1, %r2"), (F32[1.0], F32[1.0]), F32[1.0]),
    (r4("add.rz.f32 %r4, %r1, %r2"), (F32[1.0], 0xB3000000 - 2**23), 0x3F7FFFFF),  # 1 - 2**-26
    (r4("add.rp.f32 %r4, %r1, %r2"), (F32[1.0], TINY), 0x3F800001),
    (r4("add.rm.f32 %r4, %r1, %r2"), (F32[-1.0], 0x80000001), 0xBF800001),
    (r4("mul.rz.f32 %r4, %r1, %r2"), (0x7F7FFFFF, F32[2.0]), 0x7F7FFFFF),
    (r4("div.approx.f32 %r4, %r1, %r2"), (F32[1.0], 0x7F000000), 0),
    (r4("div.full.f32 %r4, %r1, %r2"), (F32[-1.0], 0), F32[-math.inf]),
    (r4("rcp.approx.ftz.f32 %r4, %r1"), (MINUS_ZERO,), F32[-math.inf]),
    (r4("copysign.f32 %r4, %r1, %r2"), (F32[-1.0], F32[3.0]), F32[3.0] | MINUS_ZERO),
    (r4("cvt.rzi.s32.f32 %r4, %r1"), (F32[-math.inf],), INT_MIN),
    (r4("cvt.rzi.u32.f32 %r4, %r1"), (F32[-1.0],), 0),
    (r4("cvt.rzi.s32.f32 %r4, %r1"), (NAN,), 0),
    ("cvt.rzi.s64.f32 %rd4, %r1", (F32[1e30],), 2**63 - 1),
    (r4("cvt.rni.s32.f32 %r4, %r1"), (F32[0.5],), 0),
    (r4("cvt.rni.s32.f32 %r4, %r1"), (F32[1.5],), 2),
    (r4("cvt.rn.f32.s64 %r4, %rd1"), (2**24 + 1 + 2**40,), int(np.float32(2**24 + 1 + 2**40).view(np.uint32))),
    (r4("cvt.rn.f32.u64 %r4, %rd1"), (2**63 + 2**39 + 1,), 0x5F000001),  # rounding to double first would tie
    ("cvt.rn.bf16.f64 %rs3, %rd1; cvt.u64.u16 %rd4, %rs3", (0x3FF0100000000001,), 0x3F81),  # and here
    ("cvt.rz.bf16.f32 %rs3, %r1; cvt.u64.u16 %rd4, %rs3", (0x3F80FFFF,), 0x3F80),
    (r4("cvt.rn.bf16x2.f32 %r4, %r1, %r2"), (F32[1.0], F32[2.0]), 0x3F804000),
    (r4("cvt.rn.f16x2.f32 %r4, %r1, %r2"), (F32[1.0], F32[2.0]), 0x3C004000),
    (r4("fma.rn.bf16x2 %r4, %r1, %r2, %r3"), (0x3F804000, 0x40404040, 0x3F803F80), 0x408040E0),
    (r4("max.bf16x2 %r4, %r1, %r2"), (0x3F80C000, 0x40403F80), 0x40403F80),
    ("setp.gtu.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 1),
    ("setp.gt.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 2),
    ("setp.ne.f32 %p1, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (NAN, 0), 2),
    ("setp.nan.f32 %p1|%p2, %r1, %r2; selp.b64 %rd4, 1, 2, %p2", (NAN, 0), 2),
    ("setp.lt.and.s32 %p1, %r1, %r2, !%p0; selp.b64 %rd4, 1, 2, %p1", (-1, 1), 1),
    ("setp.lt.xor.s32 %p1|%p2, %r1, %r2, %p0; selp.b64 %rd4, 1, 2, %p2", (-1, 1), 2),
    ("setp.gt.bf16x2 %p1|%p2, %r1, %r2; selp.b64 %rd4, 1, 2, %p1", (0x3F80C000, 0x3F003F00), 2),
    ("testp.subnormal.f32 %p1, %r1; selp.b64 %rd4, 1, 2, %p1", (TINY,), 1),
    ("vote.sync.ballot.b32 %r4, %p0, -1; cvt.u64.u32 %rd4, %r4", (), 0),
    ("setp.gt.u32 %p1, %r0, 29; vote.sync.ballot.b32 %r4, %p1, -1; cvt.u64.u32 %rd4, %r4", (), 3 << 30),
    (r4("redux.sync.add.s32 %r4, %r0, -1"), (), 31 * 16),
    (r4("shfl.sync.up.b32 %r5|%p1, %r0, 1, 0, -1; redux.sync.add.s32 %r4, %r5, -1"), (), 30 * 31 // 2),
    (r4("shfl.sync.down.b32 %r5, %r0, 1, 31, -1; redux.sync.add.s32 %r4, %r5, -1"), (), 31 * 16 + 31),
    (r4("shfl.sync.idx.b32 %r5, %r0, 5, 0x181f, -1; redux.sync.max.u32 %r4, %r5, -1"), (), 29),
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "expected"), INSTRUCTIONS, ids=[row[0][:40] for row in INSTRUCTIONS])
def test_instruction(body, inputs, expected):
    assert execute(body + ";", *inputs) == expected % 2**64


# Arithmetic that numpy does not have, against exact fractions


def nearest(exact: Fraction, type_: Type) -> int:
    """The bits of the number of this type nearest to a positive fraction; ties to even."""
    guess = int(type_.encode(np.array([float(exact)]))[0])
    values = {
        bits: Fraction(float(type_.decode(np.array([bits], type_.raw))[0])) for bits in (guess - 1, guess, guess + 1)
    }
    return min(values, key=lambda bits: (abs(values[bits] - exact), bits % 2))


@pytest.mark.parametrize("name", ["f64", "f32", "f16", "bf16"])
def test_fma_rounds_once(name):
    type_ = TYPES[name]
    precision = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}[name]
    rng = np.random.default_rng(0)
    x, y, z = (type_.decode(type_.encode(rng.uniform(1, 2, 300))) for _ in range(3))
    z = type_.decode(type_.encode(z.astype(np.float64) * 2.0 ** rng.integers(-60 if name != "f16" else -14, 10, 300)))
    # A product exactly between two numbers, and an addend far below it that decides.
    x[:4] = y[:4] = 1 + 2.0 ** -(precision // 2)
    z[:4] = np.array([1, -1, 0, 1]) * 2.0 ** (-14 if name == "f16" else -80)
    fused = numerics.fma_short if type_.bits == 16 else numerics.fma
    got = type_.encode(fused(x, y, z))
    for i in range(300):
        exact = Fraction(float(x[i])) * Fraction(float(y[i])) + Fraction(float(z[i]))
        assert got[i] == nearest(exact, type_), (x[i], y[i], z[i])


def test_fma_at_the_ends_of_float64():
    inf, nan, tiny, huge = math.inf, math.nan, 5e-324, 1.7976931348623157e308
    rows = [  # x, y, z, x * y + z
        (1e200, 1e200, -inf, -inf), (1e200, 1e200, 0, inf), (huge, 2, -huge, huge), (-huge, 2, huge, -huge),
        (tiny, 0.5, 0, 0), (tiny, 0.5, tiny, 2 * tiny), (-tiny, 0.5, -0.0, -0.0), (1e-200, 1e-200, 1, 1),
        (0.0, -1.0, -0.0, -0.0), (0.0, 1.0, -0.0, 0.0), (0.0, inf, 1, nan), (inf, 1, 1, inf), (3, 2, -6, 0.0),
    ]  # fmt: skip
    x, y, z, exact = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    with np.errstate(all="ignore"):
        got = numerics.fma(x, y, z)
    np.testing.assert_array_equal(got, exact)
    np.testing.assert_array_equal(np.signbit(got)[exact == 0], np.signbit(exact)[exact == 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("function", "operation"), [(numerics.add, "__add__"), (numerics.mul, "__mul__")])
def test_directed_rounding_brackets_the_exact_result(dtype, function, operation):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=200) * 2.0 ** rng.integers(-40, 40, 200)).astype(dtype)
    y = rng.normal(size=200).astype(dtype)
    down, up, zero = (function(x, y, mode) for mode in ("rm", "rp", "rz"))
    for i in range(200):
        exact = getattr(Fraction(float(x[i])), operation)(Fraction(float(y[i])))
        assert Fraction(float(down[i])) <= exact <= Fraction(float(up[i]))
        assert up[i] == down[i] == exact or up[i] == np.nextafter(down[i], dtype(np.inf))
        assert zero[i] == (down[i] if exact > 0 else up[i])


def test_bf16_rounding_is_that_of_torch():
    bits = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int32)
    x = bits.view(FP32)
    got = torch.from_numpy(numerics.bf16_bits(x.numpy()).view(np.int16)).view(BF16)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.nan_to_num(), x.to(BF16).nan_to_num())


# Errors planted in compiled code: what the emulator computes depends on every instruction


@pytest.mark.parametrize(
    ("f", "before", "after"),
    [
        (sin, "0fBFC90FDA", "0f3FC90FDA"),  # the sign of pi/2 in the range reduction
        (sin, "0fB3A22168", "0f33A22168"),  # and of what its second word adds to it
        (sin, "cvt.rni", "cvt.rzi"),
        (fast_sin, "sin.approx", "cos.approx"),
        (exp, "ex2.approx", "lg2.approx"),
        (sqrt, "sqrt.approx", "rsqrt.approx"),
    ],
)
def test_a_changed_instruction_changes_the_result(f, before, after):
    x = torch.linspace(0.1, 50, 1024)
    right, wrong = torch.empty(1024), torch.empty(1024)
    launch, _ = run_all(unary_kernel, (1,), x, right, 1024, F=f, BLOCK=1024)
    text = launch.kernel.asm["ptx"]
    assert before in text
    Emulator(text.replace(before, after)).launch((1,), 128, [x, wrong, 1024])
    exact = {sin: torch.sin, fast_sin: torch.sin, exp: torch.exp, sqrt: torch.sqrt}[f](x.double())
    error, planted = (((y - exact).abs() / exact.abs().clamp(min=1)).max() for y in (right, wrong))
    assert error < 1e-5
    assert planted > 10 * error


def test_a_mask_that_lets_one_more_through_is_out_of_bounds():
    x, y = torch.randn(1001), torch.empty(1001)
    launch, _ = run_all(copy_kernel, (1,), x, y, 1001, 1, BLOCK=1024)
    text = launch.kernel.asm["ptx"]
    assert "setp.lt.s32" in text
    with pytest.raises(PTXError, match="byte 4004 of argument 0, which has 4004 bytes"):
        Emulator(text.replace("setp.lt.s32", "setp.le.s32")).launch((1,), 128, [x, y, 1001])


def test_a_reduction_that_skips_a_shuffle_is_wrong():
    x, w, y = torch.randn(1, 1000), torch.ones(1000), torch.empty(1, 1000)
    launch, _ = run_all(rms_norm_kernel, (1,), x, w, y, 1000, 1e-5, BLOCK=1024)
    text, exact = launch.kernel.asm["ptx"], x / x.square().mean().sqrt()
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)
    first = next(line for line in text.splitlines() if "shfl.sync.bfly.b32" in line)
    target, source = first.split()[1].rstrip(","), first.split()[2].rstrip(",")
    broken = text.replace(first, f"mov.b32 {target}, {source};", 1)
    Emulator(broken).launch((1,), 128, [x, w, y, 1000, 1e-5], launch.kernel.metadata.shared)
    assert (y - exact).abs().max() > 1e-3
