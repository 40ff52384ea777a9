"""Arithmetic of a GPU that numpy lacks: bfloat16, fused multiply-add, TF32, marked lanes.

Triton's interpreter keeps bfloat16 values as uint16. `widen` makes float32 of them and `narrow` rounds back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# What masked-off lanes hold: a quiet NaN whose top six payload bits are 010101. Arithmetic and conversions hand
# it on, so that a store can tell it from the NaN of 0 / 0 (payload 0). A float's width: bits to look at, their value.
_POISON = {2: (0x7FF8, 0x7EA8), 4: (0x7FFF0000, 0x7FD50000), 8: (0x7FFFE00000000000, 0x7FFAA00000000000)}
_POISON_BFLOAT16 = (0x7FFF, 0x7FD5)


def widen(bits: Array) -> Array:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: Array) -> Array:
    """The bfloat16 bits of float values: rounded once, to nearest even."""
    single = _to_odd_float32(x) if x.dtype == np.float64 else np.asarray(x, np.float32)
    u = np.ascontiguousarray(single).reshape(single.shape).view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    kept = (u >> np.uint32(16)) | np.uint32(0x40)  # a NaN keeps its payload, and rounding must not make it Inf
    return np.where(np.isnan(single), kept, rounded).astype(np.uint16)


def _to_odd_float32(x: Array) -> Array:
    """Float64 values as float32 rounded to odd, so that rounding once more is as good as rounding once."""
    near = x.astype(np.float32)
    u = near.view(np.uint32)
    u = u - (np.abs(near.astype(np.float64)) > np.abs(x))  # back towards zero
    return np.where(near == x, near, (u | np.uint32(1)).astype(np.uint32).view(np.float32))


def round_to(x: Array, dtype: np.dtype[Any], bfloat16: bool) -> Array:
    """Values of a wider type rounded once to a float type; bfloat16 as its bits."""
    return narrow(x) if bfloat16 else x.astype(dtype, copy=False)


def to_integers(x: Array, dtype: np.dtype[Any]) -> Array:
    """Floats cut to integers: NaN is 0, what is out of range is the nearest there is, and of marked lanes `poison`.

    8 bits are cut from 16, of which 300 is one: there it is 44.
    """
    if dtype.itemsize == 1:
        wide = to_integers(x, np.dtype(np.int16 if dtype.kind == "i" else np.uint16)).astype(dtype)
        return np.where(is_poison(x), poison(dtype, False), wide).astype(dtype)
    least, most = (dtype.type(n) for n in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    low, high = float(least), float(most)
    y = np.where((x > low) & (x < high), x, 0).astype(dtype)
    y = np.where(x >= high, most, np.where(x <= low, least, y))
    return np.where(is_poison(x), poison(dtype, False), y).astype(dtype)


_libm_fma = ctypes.CDLL(None).fma
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, (ctypes.c_double,) * 3
_fma_float64 = np.frompyfunc(_libm_fma, 3, 1)


def fma(x: Array, y: Array, z: Array) -> Array:
    """x * y + z, for the caller to round once: in float64, rounded to odd for narrower types."""
    if z.dtype == np.float64:
        return np.asarray(_fma_float64(x, y, z)).astype(np.float64)
    product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)  # the product is exact
    near = np.asarray(product + z)
    of_z = near - product
    error = (product - (near - of_z)) + (z - of_z)  # exact (Knuth's two-sum)
    bits = near.view(np.int64)
    away = np.where((error > 0) == (near > 0), 1, -1)
    odd = np.where(bits & 1 == 0, bits + away, bits).view(np.float64)
    return np.where(np.isfinite(near) & (error != 0), odd, near)


def tf32(x: Array) -> Array:
    """Float32 values as the tensor cores read them when `input_precision` is "tf32": the low 13 bits are ignored."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def poison(dtype: np.dtype[Any], bfloat16: bool) -> Any:
    """What a masked-off lane holds: a marked NaN, the largest integer, or True."""
    if bfloat16:
        return np.uint16(_POISON_BFLOAT16[1])
    if dtype.kind == "f":
        return np.dtype(f"u{dtype.itemsize}").type(_POISON[dtype.itemsize][1]).view(dtype)
    return np.bool_(True) if dtype.kind == "b" else np.iinfo(dtype).max


def is_poison(x: Array, bfloat16: bool = False) -> Array:
    """Which values come from a masked-off lane; integers never tell."""
    if bfloat16 or x.dtype.kind == "f":
        look, mark = _POISON_BFLOAT16 if bfloat16 else _POISON[x.dtype.itemsize]
        unsigned = np.dtype(f"u{x.dtype.itemsize}")
        return (np.ascontiguousarray(x).reshape(x.shape).view(unsigned) & unsigned.type(look)) == unsigned.type(mark)
    return np.zeros(x.shape, bool)


def keep_poison(op: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """An extremum that drops NaN, as the GPU's does, but not that of a masked-off lane: it would hide a fault."""

    def extremum(x: Array, y: Array) -> Array:
        return np.where(is_poison(x), x, np.where(is_poison(y), y, op(x, y)))

    return extremum


def in_float64(op: Callable[..., Array], *args: Array) -> Array:
    """Evaluate an elementwise function in float64. A result of NaN is that of the arguments, payload and all."""
    wide = [x.astype(np.float64) for x in args]
    y = np.asarray(op(*wide))
    for x in wide if y.dtype.kind == "f" else ():
        y = np.where(np.isnan(x) & np.isnan(y), x, y)  # 1 ** nan is 1
    return y
