"""Comparison, selection and bitwise logic, on numbers and on predicates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from retainops.testing.ptx import numerics
from retainops.testing.ptx.instructions import action, number, raw, register, value
from retainops.testing.ptx.machine import Lanes, Machine, Step
from retainops.testing.ptx.program import Instruction, Register, Vector
from retainops.testing.ptx.types import TYPES, Array, PTXError


@value("and and.pred")
def _and(op: Instruction, x: Array, y: Array) -> Array:
    return x & y


@value("or or.pred")
def _or(op: Instruction, x: Array, y: Array) -> Array:
    return x | y


@value("xor xor.pred")
def _xor(op: Instruction, x: Array, y: Array) -> Array:
    return x ^ y


@value("not not.pred")
def _not(op: Instruction, x: Array) -> Array:
    return ~x


@value("cnot")
def _cnot(op: Instruction, x: Array) -> Array:
    return x == 0


@value("selp", sources="type type pred")
def _selp(op: Instruction, x: Array, y: Array, chosen: Array) -> Array:
    return np.where(chosen, x, y)


@value("testp", modifiers="finite infinite number notanumber normal subnormal", result="pred")
def _testp(op: Instruction, x: Array) -> Array:
    normal = np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny)
    return {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": normal,
        "subnormal": np.isfinite(x) & ~normal & (x != 0),
    }[op.modifiers[0]]


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": lambda x, y: (x < y) | (x > y), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)), "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}  # fmt: skip
_INVERSE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(name: str) -> Callable[[Array, Array], Array]:
    """The comparison of that name; with NaN the plain ones are false and those that end in u are true."""
    if name in _INVERSE:
        ordered = _ORDERED[_INVERSE[name]]
        return lambda x, y: ~ordered(x, y)
    return _ORDERED[_UNSIGNED.get(name, name)]


@action("setp", modifiers=" ".join([*_ORDERED, *_INVERSE, *_UNSIGNED, *_COMBINE, "ftz"]))
def _setp(op: Instruction) -> Step:
    """p|q = compare(x, y), then its negation; with `.and` and the like both are combined with a third operand."""
    target, first, second, *third = op.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    compare = _compare(op.modifiers[0])
    reads = [number(first, op.type), number(second, op.type)]
    combine = next((_COMBINE[m] for m in op.modifiers if m in _COMBINE), None)
    if (combine is None) != (not third):
        raise PTXError("setp combines with a third operand only with .and, .or or .xor")
    read_third = raw(third[0], 1) if third else None

    def step(machine: Machine, lanes: Lanes) -> None:
        x, y = (read(machine) for read in reads)
        if "ftz" in op.modifiers:
            x, y = numerics.flush(x), numerics.flush(y)
        result = compare(x, y)
        results = [result[:, 0], result[:, 1]] if op.type.pack == 2 else [result, ~result]
        for into, found in zip(targets, results, strict=False):
            if combine is not None and read_third is not None:
                found = combine(found, read_third(machine))
            if isinstance(into, Register):
                machine.write(into, found, lanes)

    return step


@action("mov")
def _mov(op: Instruction) -> Step:
    """Copies, or packs a vector into a wider register, or takes it apart."""
    target, source = op.operands
    bits = op.type.bits
    if isinstance(source, Vector):
        return _pack(register(target), source, bits)
    if isinstance(target, Vector):
        return _unpack(target, raw(source, bits), bits)
    read, into = raw(source, bits), register(target)
    return lambda machine, lanes: machine.write(into, read(machine), lanes)


def _pack(target: Register, source: Vector, bits: int) -> Step:
    part = bits // len(source.items)
    reads = [raw(item, part) for item in source.items]

    def step(machine: Machine, lanes: Lanes) -> None:
        parts = np.broadcast_arrays(*(read(machine) for read in reads))
        machine.write(target, np.stack(parts, axis=1).reshape(-1).view(TYPES[f"b{bits}"].raw), lanes)

    return step


def _unpack(target: Vector, read: Callable[[Machine], Array], bits: int) -> Step:
    part = TYPES[f"b{bits // len(target.items)}"].raw

    def step(machine: Machine, lanes: Lanes) -> None:
        parts = read(machine).view(part).reshape(-1, len(target.items))
        for i, into in enumerate(target.items):
            if isinstance(into, Register):
                machine.write(into, parts[:, i], lanes)

    return step
