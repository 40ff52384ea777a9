"""Branches, calls, barriers, and the exchange between the threads of a warp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from retainops.testing.ptx.counters import WARP
from retainops.testing.ptx.instructions import action, number, raw, register
from retainops.testing.ptx.machine import EXIT, Jump, Lanes, Machine, Ready, Step
from retainops.testing.ptx.program import Function, Instruction, Register, Target, Variable, Vector
from retainops.testing.ptx.spaces import Rows
from retainops.testing.ptx.types import Array, PTXError


@action("bra", modifiers="uni")
def _bra(op: Instruction) -> Step:
    target = op.operands[0]
    assert isinstance(target, Target)
    return lambda machine, lanes: {target.pc: lanes.mask}


@action("exit")
def _exit(op: Instruction) -> Step:
    return lambda machine, lanes: {EXIT: lanes.mask}


def _copy_params(machine: Machine, lanes: Lanes, sources: tuple[Variable, ...], targets: tuple[Variable, ...]) -> None:
    memory = machine.spaces["param"]
    assert isinstance(memory, Rows)
    for source, target in zip(sources, targets, strict=True):
        there, here = (slice(v.address, v.address + v.size) for v in (target, source))
        memory.bytes[lanes.index, there] = memory.bytes[lanes.index, here]


def _variables(operand: object) -> tuple[Variable, ...]:
    items = operand.items if isinstance(operand, Vector) else ()
    return tuple(item for item in items if isinstance(item, Variable))


def _called(op: Instruction) -> tuple[tuple[Variable, ...], Function, tuple[Variable, ...]]:
    """Where a call wants the result, whom it calls, and with what."""
    at = next((i for i, o in enumerate(op.operands) if isinstance(o, Function)), None)
    if at is None:
        raise PTXError("a call through a function pointer is not emulated")
    function = op.operands[at]
    assert isinstance(function, Function)
    return _variables(op.operands[0]) if at else (), function, _variables(op.operands[-1])


@action("call", modifiers="uni")
def _call(op: Instruction) -> Step:
    _, function, arguments = _called(op)

    def step(machine: Machine, lanes: Lanes) -> Jump:
        if function.pc is None:
            raise PTXError(f"a call of {function.name}, which is not in this PTX (a failed assertion, or a print)")
        callers = machine.callers.setdefault(function.name, np.full(machine.count, -1))
        if (callers[lanes.index] >= 0).any():
            raise PTXError(f"recursion of {function.name} is not emulated")
        callers[lanes.index] = op.pc
        _copy_params(machine, lanes, arguments, function.params)
        return {function.pc: lanes.mask}

    return step


@action("ret", modifiers="uni")
def _ret(op: Instruction) -> Step:
    def step(machine: Machine, lanes: Lanes) -> Jump:
        if op.function is machine.program.kernel:
            return {EXIT: lanes.mask}
        callers = machine.callers[op.function.name]
        jump = {}
        for pc in np.unique(callers[lanes.index]):
            mask = lanes.mask & (callers == pc)
            results, function, _ = _called(machine.program.code[pc])
            _copy_params(machine, Lanes(mask), function.returns, results)
            jump[int(pc) + 1] = mask
        callers[lanes.index] = -1
        return jump

    return step


@action("trap brkpt")
def _trap(op: Instruction) -> Step:
    def step(machine: Machine, lanes: Lanes) -> None:
        raise PTXError(f"{op.name}: {machine.describe(lanes.index[0])} stops the kernel (a failed assertion)")

    return step


@action("fence membar", modifiers="proxy async async::* shared::* global alias sc acq_rel cta gl cluster gpu sys")
@action("griddepcontrol", modifiers="wait launch_dependents")
@action("prefetch prefetchu", modifiers="global local L1 L2 L2::*")
def _nothing(op: Instruction) -> Step:
    """Orders or hints: instructions are executed in order here, and there is no cache."""
    return lambda machine, lanes: None


def _whole_ctas(op: Instruction) -> Ready:
    """A barrier lets the lanes of a CTA go on when all that have not ended are there."""
    if len(op.operands) > 1:
        raise PTXError("a barrier for a part of the CTA is not emulated")

    def ready(machine: Machine, lanes: Lanes) -> Array:
        if lanes.full:
            return lanes.mask
        here = np.logical_and.reduce((lanes.mask | ~machine.live).reshape(-1, machine.threads), axis=1)
        return lanes.mask & here[machine.cta]

    return ready


@action("bar barrier", modifiers="sync aligned cta", ready=_whole_ctas)
def _bar(op: Instruction) -> Step:
    return lambda machine, lanes: None


def whole_warps(op: Instruction) -> Ready:
    """An `.aligned` instruction lets a warp go on when all its lanes are there."""

    def ready(machine: Machine, lanes: Lanes) -> Array:
        return lanes.mask & np.repeat(lanes.mask.reshape(-1, WARP).all(axis=1), WARP)

    return ready


def _members(op: Instruction) -> Ready:
    """A warp's instruction lets a lane go on when all that its member mask (the last operand) names are there."""
    read = raw(op.operands[-1], 32)

    def ready(machine: Machine, lanes: Lanes) -> Array:
        if lanes.full:
            return lanes.mask
        there = np.packbits(lanes.mask.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
        return lanes.mask & (read(machine) & ~np.repeat(there.reshape(-1), WARP) == 0)

    return ready


@action("bar.warp", modifiers="sync", ready=_members)
def _bar_warp(op: Instruction) -> Step:
    return lambda machine, lanes: None


@action("shfl", modifiers="sync up down bfly idx", ready=_members)
def _shfl(op: Instruction) -> Step:
    """Each lane takes another lane's value, or keeps its own where that one is out of its segment."""
    target, *sources = op.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    read, read_by, read_bounds = (raw(o, 32) for o in sources[:3])
    mode = next(m for m in op.modifiers if m != "sync")

    def step(machine: Machine, lanes: Lanes) -> None:
        lane = machine.thread % WARP
        by, bounds = read_by(machine).astype(np.int64) & 31, read_bounds(machine).astype(np.int64)
        segment, clamp = bounds >> 8 & 31, bounds & 31
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
        valid = source >= high if mode == "up" else source <= high
        source = np.arange(machine.count) - lane + np.where(valid, source, lane)
        if not lanes.full and not lanes.mask[source[lanes.index]].all():
            raise PTXError("a shuffle reads from a thread that does not take part")
        for into, result in zip(targets, (read(machine), valid), strict=False):
            if isinstance(into, Register):
                taken = result if result is valid or len(result) == 1 else result[source]
                machine.write(into, taken, lanes)

    return step


def _teams(lanes: Lanes, members: Array) -> Iterator[Lanes]:
    """The lanes by their member mask: almost always one team, the whole warp."""
    if len(members) == 1:
        yield lanes
        return
    for mask in np.unique(members[lanes.index]):
        yield Lanes(lanes.mask & (members == mask))


_REDUCE: dict[str, tuple[np.ufunc, Callable[[Any], Any]]] = {  # the function, and its neutral element for a dtype
    "add.int": (np.add, lambda t: 0),
    "or.int": (np.bitwise_or, lambda t: 0),
    "xor.int": (np.bitwise_xor, lambda t: 0),
    "and.int": (np.bitwise_and, lambda t: np.iinfo(t).max),  # unsigned: all ones
    "min.int": (np.minimum, lambda t: np.iinfo(t).max),
    "max.int": (np.maximum, lambda t: np.iinfo(t).min),
    "min.float": (np.fmin, lambda t: np.nan),
    "max.float": (np.fmax, lambda t: np.nan),
    "min.NaN.float": (np.minimum, lambda t: np.inf),
    "max.NaN.float": (np.maximum, lambda t: -np.inf),
}


@action("redux", modifiers="sync add min max and or xor NaN", ready=_members)
def _redux(op: Instruction) -> Step:
    first, source, members = op.operands
    target = register(first)
    read, read_members = number(source, op.type), raw(members, 32)
    name = ".".join([*(m for m in op.modifiers if m != "sync"), op.type.family])
    if name not in _REDUCE:
        raise PTXError(f"unsupported instruction {op.opcode}")
    reduce, neutral = _REDUCE[name]
    dtype = op.type.number

    def step(machine: Machine, lanes: Lanes) -> None:
        for team in _teams(lanes, read_members(machine)):
            values = np.where(team.mask, read(machine), dtype.type(neutral(dtype)))
            result = reduce.reduce(values.reshape(-1, WARP), axis=1, dtype=dtype)
            machine.write(target, op.type.encode(np.repeat(result, WARP)), team)

    return step


@action("vote", modifiers="sync ballot any all uni", ready=_members)
def _vote(op: Instruction) -> Step:
    first, source, members = op.operands
    target = register(first)
    read, read_members = raw(source, 1), raw(members, 32)
    mode = next(m for m in op.modifiers if m != "sync")

    def step(machine: Machine, lanes: Lanes) -> None:
        for team in _teams(lanes, read_members(machine)):
            yes = (read(machine) & team.mask).reshape(-1, WARP)
            no = (~read(machine) & team.mask).reshape(-1, WARP)
            result = {
                "ballot": np.packbits(yes, axis=1, bitorder="little").view(np.uint32).reshape(-1),
                "any": yes.any(axis=1),
                "all": ~no.any(axis=1),
                "uni": ~(yes.any(axis=1) & no.any(axis=1)),
            }[mode]
            machine.write(target, np.repeat(result, WARP), team)

    return step


@action("activemask")
def _activemask(op: Instruction) -> Step:
    target = register(op.operands[0])

    def step(machine: Machine, lanes: Lanes) -> None:
        there = np.packbits(lanes.mask.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)
        machine.write(target, np.repeat(there.reshape(-1), WARP), lanes)

    return step
