"""Loads, stores and copies, with their checks: alignment, bounds, and how well global accesses coalesce."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retainops.testing.ptx.control import whole_warps
from retainops.testing.ptx.instructions import Read, action, raw, value
from retainops.testing.ptx.machine import Lanes, Machine, Step
from retainops.testing.ptx.program import WINDOW, Address, Immediate, Instruction, Operand, Register, Vector
from retainops.testing.ptx.types import UNSIGNED, Array, PTXError

_SPACES = ("global", "shared", "local", "param", "const")
_HINTS = """shared::* param::* nc v2 v4 v8 weak relaxed volatile acquire release gpu sys cta cluster
    L1::* L2::* ca cg cs lu cv wb wt"""


def _space(op: Instruction) -> str:
    bases = (m.partition("::")[0] for m in op.modifiers)
    return next((base for base in bases if base in _SPACES), "generic")


def _address(operand: Operand) -> Read:
    """A function that reads a memory operand as one uint64 a lane."""
    if not isinstance(operand, Address):
        raise PTXError(f"operand {operand} is not an address")
    bits = operand.base.bits if isinstance(operand.base, Register) else 64
    read, offset = raw(operand.base, bits), np.uint64(operand.offset % (1 << 64))
    mask = np.uint64((1 << bits) - 1)

    def address(machine: Machine) -> Array:
        found = (read(machine).astype(np.uint64) + offset) & mask
        return found if len(found) == machine.count else np.full(machine.count, found[0])

    return address


def _check(machine: Machine, space: str, lanes: Array, addresses: Array, size: int) -> None:
    """Raises for the first of these lanes whose access of `size` bytes is misaligned or out of bounds."""
    bad = addresses % np.uint64(size) != 0
    fault = f"is not aligned to {size} bytes, as the kernel was compiled to assume"
    if not bad.any():
        bad = ~machine.spaces[space].inside(addresses, size)
        fault = "is out of bounds"
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        what = machine.spaces[space].describe(int(addresses[first]))
        raise PTXError(
            f"{space} memory access {fault}, in {int(bad.sum())} threads: "
            f"{machine.describe(lanes[first])} touches {size} bytes at {what}"
        )


def _places(machine: Machine, space: str, addresses: Array) -> list[tuple[str, Array | slice]]:
    """The state spaces an access goes to, and which of the lanes go there: one, unless addresses are generic."""
    if space != "generic":
        return [(space, slice(None))]
    return [(name, chosen) for name, chosen in machine.space_of(addresses).items() if chosen.any()]


def _offset(space: str, addresses: Array, generic: bool) -> Array:
    return addresses & np.uint64((1 << WINDOW) - 1) if generic and space in ("local", "shared") else addresses


@action("ld ldu", modifiers=" ".join(_SPACES) + " " + _HINTS)
def _ld(op: Instruction) -> Step:
    """Loads one number, or the elements of a vector, a lane."""
    target, source, *_ = op.operands  # what follows is a cache policy
    targets = target.items if isinstance(target, Vector) else (target,)
    address, bits, space = _address(source), op.type.bits, _space(op)
    width, signed = bits // 8, op.type.kind == "s"

    def step(machine: Machine, lanes: Lanes) -> None:
        addresses = address(machine)[lanes.index]
        words = np.empty((len(targets), len(addresses)), UNSIGNED[bits])
        for name, chosen in _places(machine, space, addresses):
            who, where = lanes.index[chosen], _offset(name, addresses[chosen], space == "generic")
            _check(machine, name, who, where, width * len(targets))
            if name == "global":
                machine.counters.request(who, where, width * len(targets), stored=False)
            for i in range(len(targets)):
                rows = machine.row[name][who]
                words[i, chosen] = machine.spaces[name].load(rows, where + np.uint64(i * width), bits)
        for into, word in zip(targets, words, strict=True):
            if isinstance(into, Register):
                machine.write_active(into, word, lanes, signed)

    return step


@action("st", modifiers=" ".join(_SPACES) + " " + _HINTS)
def _st(op: Instruction) -> Step:
    """Stores one number, or the elements of a vector, a lane."""
    target, source, *_ = op.operands
    sources = source.items if isinstance(source, Vector) else (source,)
    address, bits, space = _address(target), op.type.bits, _space(op)
    width, reads = bits // 8, [raw(item, bits) for item in sources]

    def step(machine: Machine, lanes: Lanes) -> None:
        addresses = address(machine)[lanes.index]
        words = [active(read(machine), lanes) for read in reads]
        for name, chosen in _places(machine, space, addresses):
            who, where = lanes.index[chosen], _offset(name, addresses[chosen], space == "generic")
            _check(machine, name, who, where, width * len(words))
            if name == "global":
                machine.counters.request(who, where, width * len(words), stored=True)
            for i, word in enumerate(words):
                rows = machine.row[name][who]
                machine.spaces[name].store(rows, where + np.uint64(i * width), word[chosen])

    return step


def active(values: Array, lanes: Lanes) -> Array:
    """A register's or constant's entries for these lanes only."""
    return values[lanes.index] if len(values) > 1 else np.repeat(values, len(lanes.index))


@dataclass
class _Copy:
    """A cp.async under way: what will be in shared memory once its lane has waited for its group."""

    lanes: Array
    groups: Array
    addresses: Array
    words: list[Array]

    def arrive(self, machine: Machine, due: Array) -> None:
        rows = machine.row["shared"][self.lanes[due]]
        for i, word in enumerate(self.words):
            machine.spaces["shared"].store(rows, self.addresses[due] + np.uint64(4 * i), word[due])

    def without(self, due: Array) -> _Copy:
        keep = ~due
        return _Copy(self.lanes[keep], self.groups[keep], self.addresses[keep], [word[keep] for word in self.words])


@action("cp.async", modifiers="ca cg shared shared::* global L2::*")
def _cp_async(op: Instruction) -> Step:
    """Copies to shared memory in the background. It arrives as late as allowed, so that a missing wait shows."""
    target, source, size_operand, *rest = op.operands
    assert isinstance(size_operand, Immediate)
    size = size_operand.value
    if "L2::cache_hint" in op.modifiers:
        rest = rest[:-1]
    to, origin = _address(target), _address(source)
    read_size = raw(rest[0], 32) if rest else None

    def step(machine: Machine, lanes: Lanes) -> None:
        who = lanes.index
        goes_to, comes_from = to(machine)[who], origin(machine)[who]
        taken = active(read_size(machine), lanes) if read_size else np.full(len(who), size, np.uint32)
        if not ((taken == 0) | (taken == size)).all():
            raise PTXError("cp.async of a part of its bytes is not emulated")
        some = taken > 0
        _check(machine, "shared", who, goes_to, size)
        _check(machine, "global", who[some], comes_from[some], size)
        words = [np.zeros(len(who), np.uint32) for _ in range(size // 4)]
        if some.any():
            machine.counters.request(who[some], comes_from[some], size, stored=False)
            for i, word in enumerate(words):
                word[some] = machine.spaces["global"].load(who[some], comes_from[some] + np.uint64(4 * i), 32)
        machine.copies.append(_Copy(who, machine.commits[who], goes_to, words))

    return step


@action("cp.async.commit_group")
def _commit(op: Instruction) -> Step:
    def step(machine: Machine, lanes: Lanes) -> None:
        machine.commits = machine.commits + lanes.mask

    return step


@action("cp.async.wait_group cp.async.wait_all")
def _wait(op: Instruction) -> Step:
    """Waits until all but the newest n groups have arrived (`wait_all`: everything, committed or not)."""
    newest = op.operands[0].value if op.operands and isinstance(op.operands[0], Immediate) else -1

    def step(machine: Machine, lanes: Lanes) -> None:
        left = []
        for copy in machine.copies:
            due = lanes.mask[copy.lanes] & (copy.groups < machine.commits[copy.lanes] - newest)
            copy.arrive(machine, due)
            if not due.all():
                left.append(copy.without(due))
        machine.copies = left

    return step


@value("createpolicy", modifiers="fractional L2::*")
def _createpolicy(op: Instruction, fraction: Array) -> Array:
    return np.zeros(1, np.uint64)  # a cache policy changes no result


def _tiles(machine: Machine, lanes: Lanes, starts: Array, j: int, transposed: bool) -> list[Array]:
    """Where each lane's part of the j-th 8x8 matrix of 16-bit elements lies; lanes 8j to 8j+7 have its rows' starts.

    Lane t holds elements 2(t % 4) and the next of row t // 4: one address for both, or one each if transposed.
    """
    _check(machine, "shared", lanes.index, starts[lanes.index], 16)
    t = np.arange(machine.count) % 32
    rows = starts[np.arange(machine.count) - t + 8 * j + (2 * (t % 4) if transposed else t // 4)]
    if not transposed:
        return [rows + (4 * (t % 4)).astype(np.uint64)]
    following = starts[np.arange(machine.count) - t + 8 * j + 2 * (t % 4) + 1]
    column = (2 * (t // 4)).astype(np.uint64)
    return [rows + column, following + column]


@action("ldmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::*", ready=whole_warps)
def _ldmatrix(op: Instruction) -> Step:
    target, source = op.operands
    assert isinstance(target, Vector)
    address, transposed = _address(source), "trans" in op.modifiers

    def step(machine: Machine, lanes: Lanes) -> None:
        starts, rows, shared = address(machine), machine.row["shared"], machine.spaces["shared"]
        for j, into in enumerate(target.items):
            places = _tiles(machine, lanes, starts, j, transposed)
            parts = [shared.load(rows[lanes.index], p[lanes.index], 32 // len(places)) for p in places]
            if isinstance(into, Register):
                machine.write_active(into, np.stack(parts, axis=1).reshape(-1).view(np.uint32), lanes)

    return step


@action("stmatrix", modifiers="sync aligned m8n8 x1 x2 x4 trans shared shared::*", ready=whole_warps)
def _stmatrix(op: Instruction) -> Step:
    target, source = op.operands
    assert isinstance(source, Vector)
    address, transposed = _address(target), "trans" in op.modifiers
    reads = [raw(item, 32) for item in source.items]

    def step(machine: Machine, lanes: Lanes) -> None:
        starts, rows, shared = address(machine), machine.row["shared"], machine.spaces["shared"]
        for j, read in enumerate(reads):
            places = _tiles(machine, lanes, starts, j, transposed)
            parts = active(read(machine), lanes).view(UNSIGNED[32 // len(places)]).reshape(-1, len(places))
            for i, p in enumerate(places):
                shared.store(rows[lanes.index], p[lanes.index], np.ascontiguousarray(parts[:, i]))

    return step
