"""Which of its instructions a kernel executes for a tile that lies inside the tensor.

A kernel that says `if whole: x = tl.load(p) else: x = tl.load(p, mask=...)` holds both bodies, and a warp runs one
of them; `tl.sin` holds a slow path that ordinary arguments never take. `whole_tile` follows the control flow of the
machine code and tells them apart, without executing anything.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from retainops.testing.predicates import Condition, guards
from retainops.testing.sass import Instruction


@dataclass(frozen=True)
class Step:
    """One instruction on a path.

    Attributes:
        instruction: it.
        active: False where its guard is known to be false on this path: it takes an issue slot and does nothing.
        loop: "memory" inside a loop that walks tensors, "table" inside one that reads only a constant table,
            "other" inside any other loop, "" outside loops. A path holds one trip of each loop.
    """

    instruction: Instruction
    active: bool = True
    loop: str = ""


def whole_tile(code: Sequence[Instruction], slow: bool = False) -> list[Step]:
    """What one warp executes when its whole tile lies inside the tensor.

    Of all ways from entry to exit it is the one that moves the most bytes (no early exit, no skipped access), among
    those the one with the fewest accesses (128-bit ones, not the masked elements of the tail), and among those the
    one with the fewest instructions (not the slow path of sin or of a division).

    Args:
        code: the kernel, from `sass.parse`.
        slow: take the way with the most instructions instead, for the cost of the slow paths.

    Raises:
        ValueError: the code has an indirect jump or several functions, which are not followed.

    Example:
        >>> [s.instruction.opcode for s in whole_tile(sass.parse(report.sass)) if s.instruction.is_global]
        ['LDG.E.128', 'LDG.E.128', 'STG.E.128', 'STG.E.128']
    """
    if any(b.address <= a.address for a, b in itertools.pairwise(code)):
        raise ValueError("flow.whole_tile: the cubin has several functions; calls between them are not followed")
    return _Flow(code, slow).path(code[0].address)


_Value = tuple[float, int, int]  # bytes moved, -accesses, -instructions: the largest wins
_Edge = tuple[int, int]  # from a block to a block; a block is named by the address of its first instruction
_Best = dict[int, tuple[_Value, int | None]]  # from a block on: the value, and the block to go on to, None at the end
_Loops = dict[int, set[int]]  # each loop's blocks, by its head
_Assumed = dict[Condition, bool]
_INDIRECT = ("BRX", "JMX", "JMP")
_ENDS = ("BRA", "EXIT", "RET", *_INDIRECT)  # of a block
_UNREACHABLE: _Value = (float("-inf"), 0, 0)


class _Flow:
    """The control-flow graph of one kernel."""

    def __init__(self, code: Sequence[Instruction], slow: bool) -> None:
        self.slow = slow
        starts = {code[0].address} | {i.target for i in code if i.base in ("BRA", "CALL")}
        starts |= {b.address for a, b in itertools.pairwise(code) if a.base in _ENDS}
        self.blocks: dict[int, list[Instruction]] = {}
        for i in code:
            start = i.address if i.address in starts else next(reversed(self.blocks))
            self.blocks.setdefault(start, []).append(i)
        self.following = dict(zip(self.blocks, list(self.blocks)[1:], strict=False))
        self.paths: dict[int, list[Step]] = {}  # by entry: the kernel's own, and one for each subroutine it calls

    def successors(self, block: int) -> list[int | None]:
        """Where control can go from a block; None is the end of the kernel or of a subroutine."""
        last = self.blocks[block][-1]
        onwards: list[int | None] = [self.following[block]] if block in self.following else []
        if last.base in _INDIRECT:
            raise ValueError(f"flow.whole_tile: `{last.opcode} {last.operands}` jumps indirectly; not followed")
        if last.base in ("EXIT", "RET"):
            return [None, *onwards] if last.condition else [None]
        if last.base != "BRA" or ".DIV" in last.opcode:  # BRA.DIV is taken only by a warp that has diverged
            return onwards
        return [last.target, *onwards] if last.condition else [last.target]

    def path(self, entry: int) -> list[Step]:
        """The best way from an entry to an end, every loop run once."""
        if entry not in self.paths:
            self.paths[entry] = _Ways(self, entry).steps()
        return self.paths[entry]


class _Ways:
    """All ways from one entry to an end."""

    def __init__(self, flow: _Flow, entry: int) -> None:
        self.flow, self.entry = flow, entry
        self.assumed: _Assumed = {}
        order, back = _depth_first(entry, flow.successors)
        self.loops = _loops(order, back, flow.successors)
        self.guards = guards(order[::-1], flow.blocks, flow.successors)
        self.order, cycles = _depth_first(entry, self.forwards)
        assert not cycles, "leaving loops instead of repeating them leaves no way round"

    def steps(self) -> list[Step]:
        """The instructions on the best way."""
        for condition in self._shared():
            values = {}
            for outcome in (True, False):
                self.assumed[condition] = outcome
                values[outcome] = self._best()[self.entry][0]
            self.assumed[condition] = values[True] > values[False]
        best = self._best()
        steps: list[Step] = []
        block: int | None = self.entry
        while block is not None:
            loop = self._kind([body for body in self.loops.values() if block in body])
            steps += [dataclasses.replace(step, loop=loop or step.loop) for step in self._steps(block)]
            block = best[block][1]
        return steps

    def _shared(self) -> list[Condition]:
        """The conditions on which both a jump and an access depend: `whole`, where accesses are predicated."""
        code = [i for block in self.order for i in self.flow.blocks[block] if i.address in self.guards]
        jumps = {self.guards[i.address][0] for i in code if i.base in ("BRA", "EXIT", "RET")}
        accesses = {self.guards[i.address][0] for i in code if i.is_global}
        return sorted(jumps & accesses)

    def _best(self) -> _Best:
        best: _Best = {}
        for block in self.order:  # a block comes after all that it leads to
            value = self._value(block)
            ways = [(best[s][0] if s is not None else (0, 0, 0), s) for s in self.forwards(block)]
            rest, successor = max(ways, key=lambda way: way[0], default=(_UNREACHABLE, None))
            best[block] = (value[0] + rest[0], value[1] + rest[1], value[2] + rest[2]), successor
        return best

    def successors(self, block: int) -> list[int | None]:
        """Where control can go from a block, as far as is assumed."""
        last, ahead = self.flow.blocks[block][-1], self.flow.successors(block)
        condition, wanted = self.guards.get(last.address, (None, True))
        if len(ahead) < 2 or condition not in self.assumed:
            return ahead
        return ahead[:1] if self.assumed[condition] == wanted else ahead[1:]

    def forwards(self, block: int) -> list[int | None]:
        """Successors, where the ways out of a loop stand for the jump back to its head."""
        ahead: list[int | None] = []
        for s in self.successors(block):
            ahead += self._exits(s) if s is not None and block in self.loops.get(s, ()) else [s]
        return list(dict.fromkeys(ahead))

    def _exits(self, head: int) -> Iterator[int | None]:
        for block in sorted(self.loops[head]):
            for s in self.successors(block):
                if s in self.loops[head]:
                    continue
                if s is not None and block in self.loops.get(s, ()):  # straight to the next trip of an outer loop
                    yield from self._exits(s)
                else:
                    yield s

    def _value(self, block: int) -> _Value:
        steps = self._steps(block)
        moving = [s.instruction.bits for s in steps if s.active and s.instruction.is_global]
        return sum(moving) // 8, -len(moving), len(steps) if self.flow.slow else -len(steps)

    def _steps(self, block: int) -> list[Step]:
        """A block's instructions, subroutines spliced in."""
        steps = []
        for i in self.flow.blocks[block]:
            condition, wanted = self.guards.get(i.address, (None, True))
            active = self.assumed.get(condition, wanted) == wanted if condition else True
            steps.append(Step(i, active))
            if i.base == "CALL" and active:
                steps += self.flow.path(i.target)
        return steps

    def _kind(self, around: list[set[int]]) -> str:
        inside = [i for body in around for block in body for i in self.flow.blocks[block]]
        if any(i.is_global for i in inside):
            return "memory"
        return "table" if any(i.is_constant_load for i in inside) else "other" if around else ""


def _depth_first(entry: int, successors: Callable[[int], list[int | None]]) -> tuple[list[int], list[_Edge]]:
    """Blocks in the order in which they are left (each after all that it leads to), and the edges that jump back."""
    order: list[int] = []
    back: list[_Edge] = []
    open_, seen = {entry}, {entry}

    def ahead_of(block: int) -> Iterator[int]:
        return (s for s in successors(block) if s is not None)

    stack = [(entry, ahead_of(entry))]
    while stack:
        block, ahead = stack[-1]
        s = next(ahead, None)
        if s is None:
            stack.pop()
            open_.discard(block)
            order.append(block)
        elif s in open_:
            back.append((block, s))
        elif s not in seen:
            seen.add(s)
            open_.add(s)
            stack.append((s, ahead_of(s)))
    return order, back


def _loops(blocks: Iterable[int], back: Iterable[_Edge], successors: Callable[[int], list[int | None]]) -> _Loops:
    """Each loop's blocks, by its head: those that reach a jump back to the head without passing the head."""
    before: dict[int, list[int]] = {}
    for block in blocks:
        for s in successors(block):
            if s is not None:
                before.setdefault(s, []).append(block)
    loops: _Loops = {}
    for end, head in back:
        body = loops.setdefault(head, {head})
        reached = [end]
        while reached:
            block = reached.pop()
            if block not in before:  # the entry: there is a way in beside the head
                raise ValueError("flow.whole_tile: the control flow has a cycle that is no loop; not followed")
            if block not in body:
                body.add(block)
                reached += before[block]
    return loops
