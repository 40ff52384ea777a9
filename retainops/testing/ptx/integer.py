"""Integer arithmetic, shifts and bit fields."""

from __future__ import annotations

import numpy as np

from retainops.testing.ptx.instructions import action, number, raw, register, value
from retainops.testing.ptx.machine import Lanes, Machine, Step
from retainops.testing.ptx.program import Instruction
from retainops.testing.ptx.types import TYPES, UNSIGNED, Array


@value("add.int")
def _add(op: Instruction, x: Array, y: Array) -> Array:
    return x + y


@value("sub.int")
def _sub(op: Instruction, x: Array, y: Array) -> Array:
    return x - y


@value("mul.lo")
def _mul_lo(op: Instruction, x: Array, y: Array) -> Array:
    return x * y


@value("mul.hi")
def _mul_hi(op: Instruction, x: Array, y: Array) -> Array:
    return _high(x, y)


@value("mul.wide", result="wide")
def _mul_wide(op: Instruction, x: Array, y: Array) -> Array:
    wide = TYPES[f"{op.type.kind}{op.type.bits * 2}"].number
    return x.astype(wide) * y.astype(wide)


@value("mad.lo")
def _mad_lo(op: Instruction, x: Array, y: Array, z: Array) -> Array:
    return x * y + z


@value("mad.hi")
def _mad_hi(op: Instruction, x: Array, y: Array, z: Array) -> Array:
    return _high(x, y) + z


@value("mad.wide", sources="type type wide", result="wide")
def _mad_wide(op: Instruction, x: Array, y: Array, z: Array) -> Array:
    return x.astype(z.dtype) * y.astype(z.dtype) + z


def _high(x: Array, y: Array) -> Array:
    """The upper half of the product."""
    bits = x.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
        return (x.astype(wide) * y.astype(wide) >> bits).astype(x.dtype)
    a, b = x.view(np.uint64), y.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, 0) - np.where(y < 0, a, 0)
    return high.view(x.dtype)


@action("add.cc sub.cc addc subc mad.lo.cc mad.hi.cc madc", modifiers="cc lo hi")
def _carrying(op: Instruction) -> Step:
    """Arithmetic wider than a register: `.cc` writes the carry flag, a name that ends in c reads it."""
    target, type_ = register(op.operands[0]), op.type
    reads = [number(o, type_) for o in op.operands[1:]]
    subtracts, reads_carry, writes_carry = op.name.startswith("sub"), op.name.endswith("c"), "cc" in op.modifiers

    def step(machine: Machine, lanes: Lanes) -> None:
        x, y, *z = (read(machine) for read in reads)
        if z:
            x, y = (_high(x, y) if "hi" in op.modifiers else x * y), z[0]
        x, y = x.view(type_.raw), y.view(type_.raw)
        carry = machine.carry.astype(type_.raw) if reads_carry else type_.raw.type(0)
        if subtracts:
            part = x - y
            result = part - carry
            out = (x < y) | (part < carry)
        else:
            part = x + y
            result = part + carry
            out = (part < x) | (result < part)
        machine.write(target, result, lanes)
        if writes_carry:
            machine.carry = np.where(lanes.mask, out, machine.carry)

    return step


@value("div.int")
def _div(op: Instruction, x: Array, y: Array) -> Array:
    quotient, _ = _divide(x, y)
    return quotient


@value("rem.int")
def _rem(op: Instruction, x: Array, y: Array) -> Array:
    _, remainder = _divide(x, y)
    return remainder


def _divide(x: Array, y: Array) -> tuple[Array, Array]:
    """Truncating division. By zero PTX leaves it open; NVIDIA's give all ones, and the dividend as remainder."""
    x, y = np.broadcast_arrays(x, y)
    unsigned = UNSIGNED[x.dtype.itemsize * 8]
    a, b = np.where(x < 0, -x, x).view(unsigned), np.where(y < 0, -y, y).view(unsigned)
    q = a // np.where(b == 0, 1, b).astype(unsigned)
    r = a - q * b
    quotient = np.where((x < 0) != (y < 0), -q, q).view(x.dtype)
    remainder = np.where(x < 0, -r, r).view(x.dtype)
    zero = y == 0
    ones = np.invert(np.zeros_like(x))
    return np.where(zero, ones, quotient), np.where(zero, x, remainder)


@value("min.int")
def _min(op: Instruction, x: Array, y: Array) -> Array:
    return np.minimum(x, y)


@value("max.int")
def _max(op: Instruction, x: Array, y: Array) -> Array:
    return np.maximum(x, y)


@value("abs.int")
def _abs(op: Instruction, x: Array) -> Array:
    return np.abs(x)


@value("neg.int")
def _neg(op: Instruction, x: Array) -> Array:
    return -x


@value("shl", sources="type u32")
def _shl(op: Instruction, x: Array, n: Array) -> Array:
    return shift_left(x, n)


@value("shr", sources="type u32")
def _shr(op: Instruction, x: Array, n: Array) -> Array:
    return shift_right(x, n)


def shift_left(x: Array, n: Array) -> Array:
    """x << n, with 0 for shifts of the width and more."""
    bits = x.dtype.itemsize * 8
    return np.where(n < bits, x << np.minimum(n, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: Array, n: Array) -> Array:
    """x >> n, with the sign (of signed x) or 0 for shifts of the width and more."""
    bits = x.dtype.itemsize * 8
    shifted = x >> np.minimum(n, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(n < bits, shifted, x.dtype.type(0))


@value("shf.l shf.r", modifiers="wrap clamp")
def _funnel(op: Instruction, low: Array, high: Array, n: Array) -> Array:
    n = (n & np.uint32(31) if "wrap" in op.modifiers else np.minimum(n, 32)).astype(np.uint64)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return both << n >> np.uint64(32) if "l" in op.modifiers else both >> n


@value("bfe", sources="type u32 u32")
def _bfe(op: Instruction, x: Array, position: Array, length: Array) -> Array:
    bits = op.type.bits
    position, length = position.astype(np.int64) & 0xFF, length.astype(np.int64) & 0xFF
    spare = bits - np.minimum(position + length, bits)  # bits above the field
    field = shift_right(shift_left(x, spare), spare + position)
    return np.where(length == 0, x.dtype.type(0), field)


@value("bfi", sources="type type u32 u32")
def _bfi(op: Instruction, x: Array, into: Array, position: Array, length: Array) -> Array:
    position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
    ones = shift_left(np.ones_like(into), length) - into.dtype.type(1)
    mask = shift_left(ones, position)
    return into & ~mask | shift_left(x, position) & mask


@value("clz", result="u32")
def _clz(op: Instruction, x: Array) -> Array:
    return op.type.bits - _bit_length(x)


@value("bfind.int", modifiers="shiftamt", result="u32")
def _bfind(op: Instruction, x: Array) -> Array:
    length = _bit_length(np.where(x < 0, ~x, x).view(op.type.raw))
    found = op.type.bits - length if "shiftamt" in op.modifiers else length - 1
    return np.where(length == 0, 0xFFFFFFFF, found)


def _bit_length(x: Array) -> Array:
    if x.dtype.itemsize < 8:
        return np.frexp(x.astype(np.float64))[1].astype(np.int64)
    high, low = x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)
    return np.where(high > 0, 32 + _bit_length(high.astype(np.uint32)), _bit_length(low.astype(np.uint32)))


@value("popc", result="u32")
def _popc(op: Instruction, x: Array) -> Array:
    return np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1).sum(axis=1)


@value("brev")
def _brev(op: Instruction, x: Array) -> Array:
    bits = np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype).reshape(-1)


@value("prmt", sources="b32 b32 b32")
def _prmt(op: Instruction, x: Array, y: Array, selector: Array) -> Array:
    both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result: Array = np.zeros(1, np.uint64)
    for i in range(4):
        choice = selector.astype(np.uint64) >> np.uint64(4 * i)
        byte = both >> np.uint64(8) * (choice & np.uint64(7)) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        result = result | np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return result


@action("lop3")
def _lop3(op: Instruction) -> Step:
    """Any function of three bits, given by its truth table."""
    target, table = register(op.operands[0]), op.operands[4]
    reads = [raw(o, 32) for o in op.operands[1:4]]
    read_table = raw(table, 32)

    def step(machine: Machine, lanes: Lanes) -> None:
        truth = int(read_table(machine)[0])
        x, y, z = (read(machine) for read in reads)
        result = np.zeros_like(x & y & z)
        for row in range(8):
            if truth >> row & 1:
                result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        machine.write(target, result, lanes)

    return step
