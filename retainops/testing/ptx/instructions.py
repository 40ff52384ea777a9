"""The instruction table: an opcode's name to the function that executes it.

To add an instruction, write a small function in the module of its group (`integer`, `floating`, `logic`, `convert`,
`memory`, `control`) under one of two decorators:

    @value("min.int")                      # numbers in, number out: most instructions
    def _(op, x, y):
        return np.minimum(x, y)

    @action("bar barrier", modifiers="sync")    # anything that touches the machine; bound once, before execution
    def _(op):
        def step(machine, lanes): ...
        return step

A name is an opcode, an opcode with a modifier that makes another instruction of it ("mul.wide", "add.cc"), or an
opcode with a family of types ("min.int", "min.float", "and.pred"). Modifiers that a function does not list make the
instruction unsupported, so that nothing is executed without its rounding mode, say, being looked at.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retainops.testing.ptx import numerics
from retainops.testing.ptx.counters import WARP
from retainops.testing.ptx.machine import Decoded, Lanes, Machine, Ready, Step
from retainops.testing.ptx.program import Immediate, Instruction, Negated, Operand, Register, Special, Variable
from retainops.testing.ptx.types import TYPES, UNSIGNED, Array, PTXError, Type, resize

Read = Callable[[Machine], Array]
_Bind = Callable[[Instruction], Step]
_Compute = Callable[..., Array]


@dataclass(frozen=True)
class _Entry:
    bind: Callable[[Instruction], Step]
    modifiers: frozenset[str]
    ready: Callable[[Instruction], Ready] | None = None


_TABLE: dict[str, _Entry] = {}
_signature = functools.cache(inspect.signature)


def action(
    names: str, modifiers: str = "", ready: Callable[[Instruction], Ready] | None = None
) -> Callable[[_Bind], _Bind]:
    """Registers `bind(op) -> step(machine, lanes)` for instructions that touch the machine.

    Args:
        names: the table's keys, separated by spaces.
        modifiers: those it understands; "L1::*" stands for all that start so.
        ready: for instructions that synchronise: `ready(op)(machine, lanes)` is a mask of the lanes that may go on.
    """

    def enter(bind: _Bind) -> _Bind:
        for name in names.split():
            _TABLE[name] = _Entry(bind, frozenset(modifiers.split()), ready)
        return bind

    return enter


def value(names: str, modifiers: str = "", sources: str = "", result: str = "type") -> Callable[[_Compute], _Compute]:
    """Registers `f(op, *numbers) -> numbers` for instructions that compute one number from others.

    Args:
        names: the table's keys, separated by spaces.
        modifiers: those it understands. "ftz" and "sat" are carried out here, not by the function.
        sources: the type of each source operand: "type" (the opcode's last, which is the default for all), "wide"
            (twice as many bits), "first" (the opcode's first) or a PTX type.
        result: the type of the result, in the same way.
    """

    def enter(compute: _Compute) -> _Compute:
        action(names, modifiers)(lambda op: bind_value(op, compute, sources, result))
        return compute

    return enter


def bind_value(op: Instruction, compute: _Compute, sources: str = "", result: str = "type") -> Step:
    """The step of an instruction that computes one number from others; arguments as those of `value`."""
    first, *operands = op.operands
    target, roles = register(first), sources.split() or ["type"] * len(operands)
    try:
        _signature(compute).bind(op, *roles)
    except TypeError:
        raise PTXError(f"{op.opcode} with {len(operands)} sources is not emulated") from None
    types = [_role(op, role) for role in roles]
    reads = [number(operand, type_) for operand, type_ in zip(operands, types, strict=True)]
    if "ftz" in op.modifiers:
        reads = [_flushed(read) if type_.kind == "f" else read for read, type_ in zip(reads, types, strict=True)]
    type_ = _role(op, result)
    finish = _finish(op, type_)
    signed = type_.kind == "s"

    def step(machine: Machine, lanes: Lanes) -> None:
        numbers = finish(compute(op, *[read(machine) for read in reads]))
        machine.write(target, type_.encode(numbers), lanes, signed)

    return step


def _role(op: Instruction, role: str) -> Type:
    if role == "type":
        return op.type
    if role == "first":
        return op.types[0]
    if role == "wide":
        return TYPES[f"{op.type.kind}{op.type.bits * 2}"]
    return TYPES[role]


def _flushed(read: Read) -> Read:
    return lambda machine: numerics.flush(read(machine))


def _finish(op: Instruction, type_: Type) -> Callable[[Array], Array]:
    """What `.sat` and `.ftz` do to a floating-point result."""
    flush = "ftz" in op.modifiers and type_.kind == "f"
    saturate = "sat" in op.modifiers and type_.family == "float"

    def finish(numbers: Array) -> Array:
        if saturate:
            numbers = np.where(np.isnan(numbers), 0, np.clip(numbers, 0, 1)).astype(numbers.dtype)
        return numerics.flush(numbers.astype(type_.number, copy=False)) if flush else numbers

    return finish if flush or saturate else lambda numbers: numbers


def register(operand: Operand | None) -> Register:
    """The operand, which has to be a register."""
    if not isinstance(operand, Register):
        raise PTXError(f"operand {operand} in the place of a register")
    return operand


def raw(operand: Operand | None, bits: int) -> Read:
    """A function that reads an operand's bits, cut or zero-extended to `bits`."""
    if isinstance(operand, Register):
        slot = operand.slot
        if operand.bits == bits:
            return lambda machine: machine.registers[slot]
        return lambda machine: resize(machine.registers[slot], bits)
    if isinstance(operand, Negated):
        slot = operand.register.slot
        return lambda machine: ~machine.registers[slot]
    if isinstance(operand, (Immediate, Variable)):
        constant = operand.value if isinstance(operand, Immediate) else operand.address
        bits_of = np.array([bool(constant)]) if bits == 1 else np.array([constant % (1 << bits)], UNSIGNED[bits])
        return lambda machine: bits_of
    if isinstance(operand, Special):
        special = _special(operand.name)
        return lambda machine: special(machine).astype(UNSIGNED[bits])
    raise PTXError(f"operand {operand} cannot be read")


def number(operand: Operand | None, type_: Type) -> Read:
    """A function that reads an operand as numbers of a type."""
    read = raw(operand, type_.bits)
    if type_.kind in "ub" or type_.kind == "pred":
        return read
    return lambda machine: type_.decode(read(machine))


def _special(name: str) -> Read:
    base, _, axis = name.partition(".")
    i = "xyz".index(axis or "x")
    table: dict[str, Read] = {
        "%tid": lambda m: m.thread if i == 0 else np.zeros(m.count, np.int64),
        "%ntid": lambda m: np.full(m.count, m.threads if i == 0 else 1),
        "%ctaid": lambda m: m.coordinates[m.cta, i],
        "%nctaid": lambda m: np.full(m.count, m.job.grid[i]),
        "%laneid": lambda m: m.thread % WARP,
        "%warpid": lambda m: m.thread // WARP,
        "%lanemask_lt": lambda m: (1 << m.thread % WARP) - 1,
    }
    if base not in table:
        raise PTXError(f"special register {name} is not emulated; add it to _special in {__name__}")
    return table[base]


def decode(op: Instruction) -> Decoded:
    """Binds an instruction to its operands. What cannot be executed raises when it is reached, not here."""
    try:
        entry = _lookup(op)
        return Decoded(op, entry.bind(op), entry.ready(op) if entry.ready else None)
    except (PTXError, ValueError) as error:  # ValueError: another number of operands than it unpacks
        message = f"{op.opcode}: {error}" if isinstance(error, ValueError) else str(error)

        def unsupported(machine: Machine, lanes: Lanes) -> None:
            raise PTXError(message)

        return Decoded(op, unsupported)


_OUTSIDE = {
    "mma": "tensor cores", "wgmma": "tensor cores", "tcgen05": "tensor cores", "wmma": "tensor cores",
    "atom": "atomics", "red.": "atomics", "mbarrier": "asynchronous barriers", "cp.async.bulk": "TMA",
}  # fmt: skip


def _lookup(op: Instruction) -> _Entry:
    family = f".{op.types[-1].family}" if op.types else ""
    keys = [f"{op.name}.{'.'.join(op.modifiers)}", *(f"{op.name}.{m}" for m in op.modifiers)]
    for key in [*keys, op.name + family, op.name]:
        entry = _TABLE.get(key)
        if entry is None:
            continue
        known = entry.modifiers | set(key.split(".")[1:])
        if all(m in known or f"{m.partition('::')[0]}::*" in known for m in op.modifiers):
            return entry
    for prefix, what in _OUTSIDE.items():
        if op.opcode.startswith(prefix):
            raise PTXError(
                f"unsupported instruction {op.opcode}: {what} are outside what the PTX emulator covers; "
                "run this kernel in Triton's interpreter instead"
            )
    raise PTXError(
        f"unsupported instruction {op.opcode}; to add it, register a function for it in a module of "
        "retainops/testing/ptx, as the docstring of instructions.py there says"
    )
