"""Numbers in the interpreter are those of a GPU: each gap of Triton's own, against PyTorch or exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice

from retainops.testing.simulated import simulated_gpu


@pytest.fixture(autouse=True)
def gpu():
    torch.manual_seed(0)
    with simulated_gpu():
        yield


@triton.jit
def cast_kernel(X, Y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def unary_kernel(X, Y, MODULE: tl.constexpr, NAMES: tl.constexpr, BLOCK: tl.constexpr):
    """A row of y for each function named."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    for k in tl.static_range(len(NAMES)):
        if MODULE == "tl":
            y = getattr(tl, NAMES[k])(x)
        else:
            y = getattr(cuda_libdevice, NAMES[k])(x)
        tl.store(Y + k * BLOCK + i, y)


@triton.jit
def arithmetic_kernel(X, Y, NUMBERS, FLAGS, BLOCK: tl.constexpr):
    """A row for each operation."""
    i = tl.arange(0, BLOCK)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(NUMBERS + i, x + y)
    tl.store(NUMBERS + BLOCK + i, x - y)
    tl.store(NUMBERS + 2 * BLOCK + i, x * y)
    tl.store(NUMBERS + 3 * BLOCK + i, x / y)
    tl.store(NUMBERS + 4 * BLOCK + i, -x)
    tl.store(NUMBERS + 5 * BLOCK + i, tl.abs(x))
    tl.store(NUMBERS + 6 * BLOCK + i, tl.where(x > y, x, y))
    tl.store(FLAGS + i, x < y)
    tl.store(FLAGS + BLOCK + i, x == y)


@triton.jit
def extrema_kernel(X, Y, Z, BLOCK: tl.constexpr):
    """A row for each operation."""
    i = tl.arange(0, BLOCK)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Z + i, tl.minimum(x, y))
    tl.store(Z + BLOCK + i, tl.maximum(x, y))
    tl.store(Z + 2 * BLOCK + i, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(Z + 3 * BLOCK + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    low, high = tl.full((BLOCK,), -0.5, x.dtype), tl.full((BLOCK,), 0.5, x.dtype)
    tl.store(Z + 4 * BLOCK + i, tl.clamp(x, low, high))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(x: torch.Tensor, y: torch.Tensor) -> None:
    """Equal to the last bit, signs of zeros included; one NaN is as good as another."""
    assert x.dtype == y.dtype
    assert torch.equal(x.isnan(), y.isnan())
    assert torch.equal(bits(x)[~x.isnan()], bits(y)[~y.isnan()])


def every_kind_of_float(dtype: torch.dtype, n: int = 4096, seed: int = 0) -> torch.Tensor:
    """Random bits: every exponent, denormals, infinities, NaN."""
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(wide)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(info.min, info.max, (n,), dtype=wide, generator=generator).view(dtype)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")], dtype=dtype)
    return x


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_casts_round_to_nearest_even(dtype, to):
    x = every_kind_of_float(dtype, 1 << 16)
    x[4:5000] = torch.randn(4996).to(dtype)  # of usual size, where float16 neither overflows nor vanishes
    if dtype == torch.float32:
        ties = torch.arange(0x3F80, 0x3F80 + 1000, dtype=torch.int32) << 16 | 0x8000
        x[5000:6000] = ties.view(torch.float32)
    y = torch.empty(1 << 16, dtype=to)
    cast_kernel[(16,)](x, y, BLOCK=4096)
    same_bits(y, x.to(to))


def test_float64_becomes_bfloat16_in_one_rounding():
    tie, little = 1 + 2**-8, 2**-40  # float32 has no bits for the little
    x = torch.tensor([tie + little, tie, tie - little, -tie - little, 3.4e38, 1e300, 1e-300, 0], dtype=torch.float64)
    y = torch.empty(8, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, BLOCK=8)
    assert y.tolist() == [1 + 2**-7, 1, 1, -1 - 2**-7, math.inf, math.inf, 0, 0]


def test_integers_become_bfloat16_and_back():
    x = torch.tensor([-7, 2**24 + 1, 2**31 - 1, 0x01018000], dtype=torch.int32)
    y, back = torch.empty(4, dtype=torch.bfloat16), torch.empty(4, dtype=torch.int32)
    cast_kernel[(1,)](x, y, BLOCK=4)
    same_bits(y, x.bfloat16())
    cast_kernel[(1,)](y[:2], back, BLOCK=2)
    assert back[:2].tolist() == [-7, 2**24]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("to", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_floats_that_are_no_integer_of_the_type_become_the_nearest(dtype, to):
    """As the compiled code makes them; nan becomes 0."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e20, -1e20, 2.0**31, -1.5, 99.5], dtype=dtype)
    found = []
    for engine in ("interpreter", "ptx"):
        with simulated_gpu(engine=engine):
            cast_kernel[(1,)](x, y := torch.empty(8, dtype=to), BLOCK=8)
        found.append(y.tolist())
    least, most = torch.iinfo(to).min, torch.iinfo(to).max
    assert found[0] == found[1] == [0, most, least, most, least, min(2**31, most), max(-1, least), 99]


@pytest.mark.parametrize("to", [torch.uint8, torch.int8], ids=str)
def test_eight_bits_are_cut_from_sixteen(to):
    x = torch.tensor([300.0, -300.0, 70000.0, 200.0, -129.0, math.nan, -math.inf, 5.5])
    found = []
    for engine in ("interpreter", "ptx"):
        with simulated_gpu(engine=engine):
            cast_kernel[(1,)](x, y := torch.empty(8, dtype=to), BLOCK=8)
        found.append(y.tolist())
    assert found[0] == found[1]
    assert found[0][0] == 44


def test_bfloat16_arithmetic():
    x, y = every_kind_of_float(torch.bfloat16), every_kind_of_float(torch.bfloat16, seed=1)
    x[100:3000], y[100:3000] = torch.randn(2, 2900).bfloat16()
    y[200:300] = x[200:300]
    numbers, flags = torch.empty(7, 4096, dtype=torch.bfloat16), torch.empty(2, 4096, dtype=torch.bool)
    arithmetic_kernel[(1,)](x, y, numbers, flags, BLOCK=4096)
    numbers[4] += 0.0  # triton 3.6 compiles -x as 0 - x: no negative zeros
    same_bits(numbers, torch.stack([x + y, x - y, x * y, x / y, -x + 0.0, x.abs(), torch.where(x > y, x, y)]))
    assert torch.equal(flags, torch.stack([x < y, x == y]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extrema_drop_nan_unless_asked(dtype):
    nan = float("nan")
    x = torch.tensor([1.0, nan, 1.0, nan, 3.0, -1.0, 0.5, 2.0], dtype=dtype)
    y = torch.tensor([2.0, 1.0, nan, nan, 1.0, -2.0, 0.5, nan], dtype=dtype)
    z = torch.empty(5, 8, dtype=dtype)
    extrema_kernel[(1,)](x, y, z, BLOCK=8)
    clamped = x.nan_to_num(-0.5).clamp(-0.5, 0.5)  # a clamp takes NaN to the lower end
    expected = [torch.fmin(x, y), torch.fmax(x, y), torch.minimum(x, y), torch.maximum(x, y), clamped]
    same_bits(z, torch.stack(expected))


LANGUAGE = ["sin", "cos", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "erf", "floor", "ceil", "abs"]
LIBDEVICE = [
    *["sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "exp", "exp2"],
    *["expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "erfinv", "sqrt", "rsqrt", "trunc", "rint", "lgamma"],
]
FAST = ["fast_sinf", "fast_cosf", "fast_tanf", "fast_expf", "fast_logf", "fast_log2f", "fast_log10f"]
ULPS = {"lgamma": 1, "erfinv": 1}  # where PyTorch's own float64 is not the last word


@pytest.mark.parametrize(
    ("module", "names", "dtype"),
    [
        *[("tl", LANGUAGE, dtype) for dtype in (torch.float32, torch.float64)],
        *[("libdevice", LIBDEVICE, dtype) for dtype in (torch.float32, torch.float64)],
        ("libdevice", FAST, torch.float32),
    ],
)
def test_functions_are_exact_but_for_the_last_rounding(module, names, dtype):
    x = torch.cat([torch.randn(60, dtype=dtype) * 3, torch.tensor([0.0, -0.5, math.inf, math.nan], dtype=dtype)])
    y = torch.empty(len(names), 64, dtype=dtype)
    unary_kernel[(1,)](x, y, MODULE=module, NAMES=tuple(names), BLOCK=64)
    for name, got in zip(names, y, strict=True):
        oracle = name.removeprefix("fast_").removesuffix("f") if names is FAST else {"rint": "round"}.get(name, name)
        expected = getattr(torch, oracle)(x.double()).to(dtype)
        ulps = 4 if dtype == torch.float64 else ULPS.get(name, 0)
        torch.testing.assert_close(
            got, expected, rtol=ulps * torch.finfo(dtype).eps, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@triton.jit
def libdevice_kernel(X, Y, P, R, FLAGS, F, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(P + i, libdevice.pow(x, y))
    tl.store(R + i, libdevice.div_rn(x, y) + libdevice.tanh(0.25) + tl.extra.cuda.libdevice.atan2(x, 2.0))
    tl.store(FLAGS + i, libdevice.isnan(x).to(tl.int32))
    tl.store(F + i, libdevice.fma(x, y, x))


def test_libdevice_by_its_usual_name():
    x, y = torch.rand(64), torch.randn(64)
    x[3] = float("nan")
    p, r, f = torch.empty(3, 64)
    flags = torch.empty(64, dtype=torch.int32)
    libdevice_kernel[(1,)](x, y, p, r, flags, f, BLOCK=64)
    same_bits(p, torch.pow(x.double(), y.double()).float())
    two = torch.tensor(2.0, dtype=torch.float64)
    quarter = torch.tanh(torch.tensor(0.25, dtype=torch.float64)).float()
    torch.testing.assert_close(r, x / y + quarter + torch.atan2(x.double(), two).float(), equal_nan=True)
    assert torch.equal(flags, x.isnan().int())
    torch.testing.assert_close(f, x * y + x, equal_nan=True)


def test_an_unknown_function_of_libdevice_says_what_to_do():
    x = torch.randn(8)
    with pytest.raises(NotImplementedError, match=r'no __nv_sinpif; use .*engine="ptx"'):
        unary_kernel[(1,)](x, x, MODULE="libdevice", NAMES=("sinpi",), BLOCK=8)


@triton.jit
def fma_kernel(X, Y, Z, OUT, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(OUT + i, tl.fma(tl.load(X + i), tl.load(Y + i), tl.load(Z + i)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fma_rounds_once(dtype):
    x, y, z = (torch.randn(512).to(dtype) for _ in range(3))
    z[:256] = -(x * y)[:256]  # all that is left is the rounding error of the product
    u = 2.0**-23  # the sum in float64 would be a tie in float32, and is a little less
    x[256], y[256], z[256] = (t.to(dtype) for t in torch.tensor([2.0**-24 * (1 + u), 1 - u, 1 + u]))
    out = torch.empty(512, dtype=dtype)
    fma_kernel[(1,)](x, y, z, out, BLOCK=512)
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(*(t.tolist() for t in (x, y, z)), strict=True)]
    ends = torch.tensor([[-math.inf], [math.inf]], dtype=dtype)
    for got, neighbours, e in zip(out.tolist(), torch.nextafter(out, ends).T.tolist(), exact, strict=True):
        assert all(abs(Fraction(got) - e) <= abs(Fraction(n) - e) for n in neighbours)
    if dtype == torch.float32:
        assert out[256].item() == 1 + u


@triton.jit
def dot_kernel(A, B, C, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(A + at), tl.load(B + at), input_precision=PRECISION)
    tl.store(C + at, c.to(C.dtype.element_ty))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "tf32"), (torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")],
)
def test_dot(dtype, precision):
    a, b = torch.randn(2, 32, 32).to(dtype)
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, N=32, PRECISION=precision)
    if dtype == torch.float32 and precision == "tf32":
        assert (c - a @ b).abs().max() > 1e-4
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_nothing_warns():
    x = torch.tensor([0.0, -1.0, 1e38, math.inf, -math.inf, math.nan, 1e-45, 3.0])
    flags = torch.empty(2, 8, dtype=torch.bool)
    arithmetic_kernel[(1,)](x, x.flip(0), torch.empty(7, 8), flags, BLOCK=8)
    unary_kernel[(1,)](x, torch.empty(4, 8), MODULE="tl", NAMES=("log", "rsqrt", "exp", "sin"), BLOCK=8)
    cast_kernel[(1,)](x, torch.empty(8, dtype=torch.int32), BLOCK=8)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        np.divide(1.0, 0.0)  # numpy's own settings are as they were
