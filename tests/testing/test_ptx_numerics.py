"""The PTX emulator's floating-point arithmetic against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from retainops.testing.ptx import numerics
from retainops.testing.ptx.types import TYPES, Type


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
    x = bits.view(torch.float32)
    got = torch.from_numpy(numerics.bf16_bits(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got.nan_to_num(), x.to(torch.bfloat16).nan_to_num())
