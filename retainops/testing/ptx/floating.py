"""Floating-point arithmetic.

Everything PTX defines exactly is exact. The `.approx` instructions give the correctly rounded result; a GPU's differ
from it by up to the errors in the PTX manual: for most a unit or two in the last place, for tanh 2**-11. sin and cos
model the hardware's range reduction, which is what makes them wrong for large arguments, but not the error of its
table, about 2**-21 absolute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from retainops.testing.ptx import numerics
from retainops.testing.ptx.instructions import value
from retainops.testing.ptx.program import Instruction
from retainops.testing.ptx.types import Array, PTXError

_MODES = "rn rz rm rp"


def rounding(op: Instruction) -> str:
    """The instruction's rounding mode; to nearest even if it names none."""
    return next((m for m in op.modifiers if m in _MODES.split()), "rn")


@value("add.float", modifiers=f"{_MODES} ftz sat")
def _add(op: Instruction, x: Array, y: Array) -> Array:
    return numerics.add(x, y, rounding(op))


@value("sub.float", modifiers=f"{_MODES} ftz sat")
def _sub(op: Instruction, x: Array, y: Array) -> Array:
    return numerics.add(x, -y, rounding(op))


@value("mul.float", modifiers=f"{_MODES} ftz sat")
def _mul(op: Instruction, x: Array, y: Array) -> Array:
    return numerics.mul(x, y, rounding(op))


@value("fma mad.float", modifiers="rn ftz sat")
def _fma(op: Instruction, x: Array, y: Array, z: Array) -> Array:
    return numerics.fma_short(x, y, z) if op.type.bits // op.type.pack == 16 else numerics.fma(x, y, z)


@value("fma.rz fma.rm fma.rp", modifiers="ftz")
def _fma_directed(op: Instruction, x: Array, y: Array, z: Array) -> Array:
    if op.type.name != "f32":
        raise PTXError(f"{op.opcode} is emulated in fp32 only")
    return numerics.fma(x, y, z, rounding(op))


@value("div.float", modifiers="rn full ftz")
def _div(op: Instruction, x: Array, y: Array) -> Array:
    return x / y


@value("div.approx", modifiers="ftz")
def _div_approx(op: Instruction, x: Array, y: Array) -> Array:
    """x * (1 / y), whose reciprocal is flushed to zero beyond 2**126."""
    return np.where((np.abs(y) > 2.0**126) & np.isfinite(y), x * np.copysign(np.float32(0), y), x / y)


@value("rcp", modifiers="rn approx ftz")
def _rcp(op: Instruction, x: Array) -> Array:
    if op.type.bits == 64 and "approx" in op.modifiers:
        return _upper_word(1 / _upper_word(x))
    return 1 / x


@value("rsqrt", modifiers="approx ftz")
def _rsqrt(op: Instruction, x: Array) -> Array:
    if op.type.bits == 64:
        return _upper_word(1 / np.sqrt(_upper_word(x))) if "ftz" in op.modifiers else 1 / np.sqrt(x)
    return 1 / np.sqrt(x.astype(np.float64))


def _upper_word(x: Array) -> Array:
    """The `.approx.ftz.f64` instructions see and produce only the upper 32 bits."""
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF_00000000)).view(np.float64)


@value("sqrt", modifiers="rn approx ftz")
def _sqrt(op: Instruction, x: Array) -> Array:
    return np.sqrt(x)


@value("ex2", modifiers="approx ftz")
def _ex2(op: Instruction, x: Array) -> Array:
    return np.exp2(x.astype(np.float64))


@value("lg2", modifiers="approx ftz")
def _lg2(op: Instruction, x: Array) -> Array:
    return np.log2(x.astype(np.float64))


@value("sin", modifiers="approx ftz")
def _sin(op: Instruction, x: Array) -> Array:
    return np.sin(2 * np.pi * _turns(x))


@value("cos", modifiers="approx ftz")
def _cos(op: Instruction, x: Array) -> Array:
    return np.cos(2 * np.pi * _turns(x))


def _turns(x: Array) -> Array:
    """The angle in turns, as the hardware gets it: one fp32 multiplication, rounded toward zero."""
    return numerics.mul(x, np.full(1, 1 / (2 * np.pi), np.float32), "rz").astype(np.float64)


@value("tanh", modifiers="approx ftz")
def _tanh(op: Instruction, x: Array) -> Array:
    return np.tanh(x.astype(np.float64))


@value("min.float", modifiers="ftz NaN xorsign abs")
def _min(op: Instruction, *numbers: Array) -> Array:
    def smaller(x: Array, y: Array) -> Array:
        found = np.minimum(x, y) if "NaN" in op.modifiers else np.fmin(x, y)
        return np.where(x == y, np.where(np.signbit(x), x, y), found)  # -0 < +0

    return _extreme(op, numbers, smaller)


@value("max.float", modifiers="ftz NaN xorsign abs")
def _max(op: Instruction, *numbers: Array) -> Array:
    def larger(x: Array, y: Array) -> Array:
        found = np.maximum(x, y) if "NaN" in op.modifiers else np.fmax(x, y)
        return np.where(x == y, np.where(np.signbit(x), y, x), found)

    return _extreme(op, numbers, larger)


def _extreme(op: Instruction, numbers: tuple[Array, ...], pick: Callable[[Array, Array], Array]) -> Array:
    """`pick` of all; with `.abs` of their magnitudes, with `.xorsign` under the sign of their product."""
    result = functools.reduce(pick, [np.abs(x) for x in numbers] if "abs" in op.modifiers else numbers)
    if "xorsign" not in op.modifiers:
        return result
    negative = functools.reduce(np.logical_xor, [np.signbit(x) for x in numbers])
    return np.where(negative, -np.abs(result), np.abs(result))


@value("abs.float", modifiers="ftz")
def _abs(op: Instruction, x: Array) -> Array:
    return np.abs(x)


@value("neg.float", modifiers="ftz")
def _neg(op: Instruction, x: Array) -> Array:
    return -x


@value("copysign")
def _copysign(op: Instruction, sign: Array, magnitude: Array) -> Array:
    return np.copysign(magnitude, sign)
