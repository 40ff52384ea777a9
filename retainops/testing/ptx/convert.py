"""Conversions between types, and between addresses of a state space and generic ones."""

from __future__ import annotations

import numpy as np

from retainops.testing.ptx import numerics
from retainops.testing.ptx.floating import rounding
from retainops.testing.ptx.instructions import action, bind_value, number, raw, register
from retainops.testing.ptx.machine import Lanes, Machine, Step
from retainops.testing.ptx.program import Instruction
from retainops.testing.ptx.spaces import LOCAL_WINDOW, SHARED_WINDOW, WINDOW
from retainops.testing.ptx.types import TYPES, Array, PTXError, Type

_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@action("cvt", modifiers="rn rz rm rp rni rzi rmi rpi ftz sat")
def _cvt(op: Instruction) -> Step:
    return _pair(op) if len(op.operands) == 3 else bind_value(op, _convert, result="first")


def _convert(op: Instruction, x: Array) -> Array:
    source, target = op.type, op.types[0]
    to_integer = next((_TO_INTEGER[m] for m in op.modifiers if m in _TO_INTEGER), None)
    if source.family == "int":
        return _from_integer(op, x, target)
    if target.family == "int":
        if to_integer is None:
            raise PTXError(f"{op.opcode} names no rounding to an integer")
        return _saturate(to_integer(x), target)
    return _shorten(x if to_integer is None else to_integer(x), target, rounding(op))


def _shorten(x: Array, target: Type, mode: str) -> Array:
    """A floating-point number in another format; what `Type.encode` rounds to nearest is left to it."""
    if mode == "rn" or target.bits > x.dtype.itemsize * 8:
        return x
    if target.kind == "f":
        return numerics.narrow(x, target.number, mode)
    if mode != "rz":
        raise PTXError(f"cvt.{mode} to {target.name} is not emulated")
    single = numerics.narrow(x, np.dtype(np.float32), "rz")
    return np.where(np.isnan(single), single, (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def _from_integer(op: Instruction, x: Array, target: Type) -> Array:
    if target.family == "int":
        return _limit(x, target) if "sat" in op.modifiers else x
    if op.type.bits == 64 and target.bits == 64 and rounding(op) == "rn":
        return x.astype(np.float64)
    return _shorten(_float64_to_odd(x), target, rounding(op))


def _float64_to_odd(x: Array) -> Array:
    """Integers as float64 numbers: exact up to 53 bits, rounded to odd beyond, so that they can be rounded again."""
    if x.dtype.itemsize < 8:
        return x.astype(np.float64)
    low = x & x.dtype.type(0xFFFFFFFF)
    return numerics.to_odd(*numerics.two_sum((x - low).astype(np.float64), low.astype(np.float64)))


def _limit(x: Array, target: Type) -> Array:
    """Integers clamped to the range of a type."""
    low, high = np.iinfo(target.number).min, np.iinfo(target.number).max
    have = np.iinfo(x.dtype)
    return np.clip(x, max(low, have.min), min(high, have.max))


def _saturate(whole: Array, target: Type) -> Array:
    """Whole floating-point numbers as integers, clamped to the range of the type; NaN becomes 0."""
    low, high = np.iinfo(target.number).min, np.iinfo(target.number).max
    wide = whole.astype(np.float64)
    inside = (wide > float(low)) & (wide < float(high))
    result = np.where(inside, wide, 0).astype(target.number)
    result = np.where(wide <= float(low), target.number.type(low), result)
    return np.where(wide >= float(high), target.number.type(high), result)


def _pair(op: Instruction) -> Step:
    """cvt.rn.f16x2.f32 d, a, b: two numbers rounded into one register, the first in its upper half."""
    first, high, low = op.operands
    target = register(first)
    read_high, read_low = number(high, op.type), number(low, op.type)

    def step(machine: Machine, lanes: Lanes) -> None:
        both = np.broadcast_arrays(read_low(machine), read_high(machine))
        machine.write(target, op.types[0].encode(np.stack(both, axis=1)), lanes)

    return step


@action("cvta", modifiers="to global local shared const param")
def _cvta(op: Instruction) -> Step:
    """To a generic address, or (`.to`) back from one; those of global memory are the same."""
    target = register(op.operands[0])
    window = {"local": LOCAL_WINDOW, "shared": SHARED_WINDOW}
    offset = next((np.uint64(window[m] << WINDOW) for m in op.modifiers if m in window), np.uint64(0))
    if "to" in op.modifiers:
        offset = np.uint64(0) - offset
    read = raw(op.operands[1], TYPES["u64"].bits)
    return lambda machine, lanes: machine.write(target, read(machine) + offset, lanes)
