"""Correctly rounded floating point that numpy lacks: fused multiply-add, directed rounding, bf16.

numpy's own +, -, *, / and sqrt round to nearest even, as PTX's `.rn` does. The rest is built from them with
error-free transformations: `two_sum` and `two_product` give a result and what rounding took away from it.
An intermediate that is rounded *to odd* can be rounded again, to any precision at least two bits shorter and in any
direction, as if the first rounding had not happened (Boldo and Melquiond, 2008).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum, and the exact error of that rounding (NaN where the sum is not finite)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _split(x: Array) -> tuple[Array, Array]:
    """A float64 as the exact sum of two numbers of 26 bits (Veltkamp)."""
    scaled = x * 134217729.0  # 2**27 + 1
    high = scaled - (scaled - x)
    return high, x - high


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded float64 product, and the exact error of that rounding (Dekker); no over- or underflow allowed."""
    product = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def to_odd(total: Array, error: Array) -> Array:
    """`total + error` rounded to odd, for a float64 `total` that was rounded to nearest with that error."""
    bits = total.view(np.int64)
    change = ((error > 0) | (error < 0)) & ((bits & 1) == 0)  # false where the error is NaN
    away = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(change, away, 0)).view(np.float64)


def directed(nearest: Array, error: Array, mode: str) -> Array:
    """Turns a result rounded to nearest into one rounded in direction `mode`.

    Args:
        nearest: the rounded results.
        error: of each, a number with the sign of (exact - nearest).
        mode: "rn" to nearest even, "rz" toward zero, "rm" toward minus infinity, "rp" toward plus infinity.
    """
    if mode == "rn":
        return nearest
    toward = nearest.dtype.type({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])
    below, above = error < 0, error > 0
    beyond = {"rz": below & (nearest > 0) | above & (nearest < 0), "rm": below, "rp": above}[mode]
    return np.where(beyond, np.nextafter(nearest, toward), nearest)


def narrow(x: Array, dtype: Any, mode: str) -> Array:
    """A float array rounded once to a shorter floating-point dtype, in direction `mode`."""
    nearest = x.astype(dtype)
    return nearest if mode == "rn" else directed(nearest, np.sign(x - nearest.astype(x.dtype)), mode)


def add(x: Array, y: Array, mode: str = "rn") -> Array:
    """x + y, rounded in direction `mode`."""
    if mode == "rn":
        return x + y
    total, error = two_sum(x.astype(np.float64), y.astype(np.float64))
    return directed(total, error, mode) if x.dtype == np.float64 else narrow(to_odd(total, error), x.dtype, mode)


def mul(x: Array, y: Array, mode: str = "rn") -> Array:
    """x * y, rounded in direction `mode`."""
    if mode == "rn":
        return x * y
    if x.dtype == np.float64:
        return directed(*two_product(x, y), mode)
    return narrow(x.astype(np.float64) * y.astype(np.float64), x.dtype, mode)  # the product of two float32 is exact


def fma(x: Array, y: Array, z: Array, mode: str = "rn") -> Array:
    """x * y + z of float32 or float64 numbers rounded once, as the hardware does.

    In float64 to nearest even only. For float16 and bf16 (which is held in float32) see `fma_short`.
    """
    if x.dtype == np.float64:
        return _fma64(x, y, z)
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    # Rounding twice differs from rounding once only where the first result is a midpoint of the second's grid:
    # the low 29 bits are 100...0, or the result is subnormal.
    midpoint = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if mode != "rn" or (midpoint | (np.abs(total) < 1.2e-38) & (total != 0)).any():
        total = to_odd(*two_sum(product, addend))
    return narrow(total, x.dtype, mode)


def fma_short(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float16 or bf16 numbers, as a float64 rounded to odd: rounding it to either type is exact."""
    return to_odd(*two_sum(x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)))


def _fma64(x: Array, y: Array, z: Array) -> Array:
    x, y, z = np.broadcast_arrays(x, y, z)
    product, low = two_product(x, y)
    high, rest = two_sum(z, low)
    total, tail = two_sum(product, high)
    fused = total + to_odd(*two_sum(tail, rest))
    plain = np.where(np.isinf(z) & np.isfinite(x) & np.isfinite(y), z, x * y + z)  # x * y may overflow on the way
    ordinary = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    size = np.abs(product)
    extreme = (np.abs(x) > 1e299) | (np.abs(y) > 1e299) | (np.abs(z) > 1e306) | (size > 1e306)
    extreme |= (size < 1e-270) & (x != 0) & (y != 0)  # the product's error would underflow
    result = np.where(ordinary & ~extreme & (fused != 0), fused, plain)
    for i in np.flatnonzero(ordinary & extreme):
        result[i] = _exact(x[i], y[i], z[i], plain[i])
    return result


def _exact(x: Any, y: Any, z: Any, plain: Any) -> float:
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    try:
        return float(exact) or float(np.copysign(0.0, plain if exact == 0 else float(exact > 0) - 0.5))
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def flush(x: Array) -> Array:
    """Subnormal numbers to zero, keeping the sign (`.ftz`)."""
    return x * (np.abs(x) >= np.finfo(x.dtype).tiny)  # NaN * 0 is NaN


def bf16_to_f32(bits: Array) -> Array:
    """bf16 bits as the float32 numbers they stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(x: Array) -> Array:
    """Float32 or float64 numbers rounded once, to nearest even, to bf16 bits; NaN as 0x7fff."""
    if x.dtype == np.float64:
        single = x.astype(np.float32)
        wide = single.astype(np.float64)
        grew = np.abs(wide) > np.abs(x)
        bits = single.view(np.uint32) - grew.astype(np.uint32)  # truncated, then the last bit set: rounded to odd
        bits |= (wide != x).astype(np.uint32)
    else:
        bits = x.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))
