"""The machine: lanes, registers, control flow.

One numpy operation executes one instruction for all the threads that are at it, over a batch of CTAs at once: a lane
is a thread of one of them. Threads that branch apart form groups; the group with the lowest program counter goes
first, so that groups meet again where their paths join. An instruction that synchronises (a barrier, a shuffle) lets
its threads wait until all that it names are there; if no group can go on, that is a `PTXError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from retainops.testing.ptx.counters import WARP, Counters
from retainops.testing.ptx.program import Instruction, Program, Register
from retainops.testing.ptx.spaces import LOCAL_WINDOW, SHARED_WINDOW, WINDOW, Global, Rows
from retainops.testing.ptx.types import UNSIGNED, Array, PTXError, resize

EXIT = -1  # the program counter of threads that have ended


class Lanes:
    """A set of lanes, as a mask."""

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.full = bool(mask.all())

    @cached_property
    def index(self) -> Array:
        """The lanes' numbers."""
        return np.flatnonzero(self.mask)

    @cached_property
    def warps(self) -> int:
        """How many warps have a lane here."""
        return int(np.count_nonzero(self.mask.reshape(-1, WARP).any(axis=1)))


Jump = dict[int, Array]  # where to go next: program counter -> mask of the lanes that go there
Step = Callable[["Machine", Lanes], "Jump | None"]
Ready = Callable[["Machine", Lanes], Array]


@dataclass(frozen=True)
class Decoded:
    """An instruction bound to its operands: what the machine runs."""

    instruction: Instruction
    step: Step  # executes it; None means: go on with the next
    ready: Ready | None = None  # which of the lanes here may go on (a synchronising instruction)


@dataclass(frozen=True)
class Job:
    """What all CTAs of a launch share."""

    program: Program
    code: Sequence[Decoded]
    memory: Global
    params: Array  # the bytes of the kernel's parameters
    grid: tuple[int, int, int]
    threads: int  # in a CTA
    shared: int  # bytes of dynamic shared memory
    counters: Counters = field(default_factory=Counters)


class Machine:
    """A batch of CTAs in execution.

    Args:
        job: what they execute.
        ctas: their coordinates, of shape (CTAs, 3).

    Attributes:
        registers: one array of raw bits a register, one entry a lane; never changed in place.
        carry: the carry flag (`add.cc`), one a lane.
        live: lanes that have not ended.
        spaces: memory by state space.
        row: for each space, the row of each lane (its CTA for shared memory, itself for local memory).
        callers: for each function that was called, each lane's calling instruction (-1 outside a call).
        commits: for cp.async, how many groups each lane has committed.
        copies: for cp.async, what has not arrived yet.
    """

    def __init__(self, job: Job, ctas: Array) -> None:
        self.job, self.program, self.counters = job, job.program, job.counters
        self.threads, self.count = job.threads, len(ctas) * job.threads
        self.cta = np.repeat(np.arange(len(ctas)), job.threads)
        self.thread = np.tile(np.arange(job.threads), len(ctas))
        self.coordinates = ctas
        sizes, lane = job.program.sizes, np.arange(self.count)
        params = Rows(self.count, sizes["param"])
        params.bytes[:, : len(job.params)] = job.params
        self.spaces: dict[str, Global | Rows] = {
            "global": job.memory,
            "const": job.memory,
            "shared": Rows(len(ctas), sizes["shared"] + job.shared),
            "local": Rows(self.count, sizes["local"]),
            "param": params,
        }
        self.row = {"shared": self.cta, "local": lane, "param": lane, "global": lane, "const": lane}
        unset = {bits: np.full(self.count, -1).astype(dtype) for bits, dtype in UNSIGNED.items()}
        unset[1] = np.zeros(self.count, bool)
        self.registers = [unset[bits] for bits in job.program.registers]
        self.carry = np.zeros(self.count, bool)
        self.live = np.ones(self.count, bool)
        self.callers: dict[str, Array] = {}
        self.commits = np.zeros(self.count, np.int64)
        self.copies: list[Any] = []
        self._groups: dict[int, Lanes] = {}  # by program counter

    def run(self) -> None:
        """Executes the kernel until every lane has ended."""
        code = self.job.code
        issued = [0] * len(code)
        self._go(self.program.kernel.pc or 0, Lanes(self.live.copy()))
        while self._groups:
            pc, lanes = self._next()
            issued[pc] += lanes.warps
            try:
                self._execute(pc, lanes, code[pc])
            except PTXError as error:
                where = code[pc].instruction.where
                raise PTXError(f"{self.program.kernel.name}: {error}\n  at {where}") from None
        for decoded, times in zip(code, issued, strict=True):
            if times:
                self.counters.instructions[decoded.instruction.opcode] += times

    def _execute(self, pc: int, lanes: Lanes, decoded: Decoded) -> None:
        guard = decoded.instruction.guard
        active = lanes
        if guard is not None:
            predicate = self.registers[guard.slot]
            active = Lanes(lanes.mask & (~predicate if decoded.instruction.guard_negated else predicate))
        jump = decoded.step(self, active) if guard is None or active.full or active.mask.any() else None
        if jump is None:
            self._go(pc + 1, lanes)
            return
        for target, mask in jump.items():
            if mask.any():
                self._go(target, Lanes(mask))
        rest = lanes.mask & ~active.mask
        if rest.any():
            self._go(pc + 1, Lanes(rest))

    def _go(self, pc: int, lanes: Lanes) -> None:
        if pc == EXIT:
            self.live &= ~lanes.mask
            return
        waiting = self._groups.get(pc)
        self._groups[pc] = lanes if waiting is None else Lanes(waiting.mask | lanes.mask)

    def _next(self) -> tuple[int, Lanes]:
        """Takes the group that goes on."""
        for pc in sorted(self._groups) if len(self._groups) > 1 else self._groups:
            lanes, ready = self._groups[pc], self.job.code[pc].ready
            if ready is None:
                del self._groups[pc]
                return pc, lanes
            mask = ready(self, lanes)
            if mask.any():
                rest = lanes.mask & ~mask
                if rest.any():
                    self._groups[pc] = Lanes(rest)
                    return pc, Lanes(mask)
                del self._groups[pc]
                return pc, lanes
        waits = "".join(
            f"\n  {len(lanes.index)} threads wait at {self.job.code[pc].instruction.where}; "
            f"the first is {self.describe(lanes.index[0])}"
            for pc, lanes in sorted(self._groups.items())
        )
        raise PTXError(f"{self.program.kernel.name}: divergence: threads wait for others that never come{waits}")

    def write(self, register: Register, raw: Array, lanes: Lanes, signed: bool = False) -> None:
        """Writes a register in these lanes; `raw` has one entry, or one for each lane of the machine."""
        if len(raw) != self.count:
            raw = np.full(self.count, raw[0], raw.dtype)
        raw = resize(raw, register.bits, signed)
        if lanes.full:
            self.registers[register.slot] = np.ascontiguousarray(raw)
        else:
            self.registers[register.slot] = np.where(lanes.mask, raw, self.registers[register.slot])

    def write_active(self, register: Register, raw: Array, lanes: Lanes, signed: bool = False) -> None:
        """Writes a register in these lanes; `raw` has one entry for each of them only."""
        raw = resize(raw, register.bits, signed)
        if not lanes.full:
            old = self.registers[register.slot].copy()
            old[lanes.index] = raw
            raw = old
        self.registers[register.slot] = raw

    def describe(self, lane: int) -> str:
        """For an error: which thread a lane is."""
        x, y, z = (int(c) for c in self.coordinates[self.cta[lane]])
        return f"thread {int(self.thread[lane])} of CTA ({x}, {y}, {z})"

    def space_of(self, addresses: Array) -> dict[str, Array]:
        """Which state space each generic address lies in, as masks."""
        windows = addresses >> np.uint64(WINDOW)
        local, shared = windows == LOCAL_WINDOW, windows == SHARED_WINDOW
        return {"local": local, "shared": shared, "global": ~(local | shared)}
