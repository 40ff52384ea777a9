"""What values the integers of a kernel can have, from what its arguments can: interval arithmetic on Triton's IR."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from retainops.testing.ttir import Block, Module, Operation

Range = tuple[int, int]


@dataclass(eq=False)
class Value:
    """An integer, or a tensor of them: its bits (0: none is an integer), and the least and the largest it can be.

    `wide` is what they were if it had bits enough, where it may not fit; `made_of` are the values it was made of.
    """

    bits: int
    range: Range
    made_of: tuple[Value, ...] = ()
    operation: Operation | None = None
    wide: tuple[float, float] | None = None


class NotFollowed(Exception):
    """An operation of which it is not known what it makes of integers."""

    def __init__(self, op: Operation) -> None:
        super().__init__(op.name)
        self.operation = op


NOT_FOLLOWED = ("cf.", "tt.call", "tt.atomic", "tt.descriptor", "tt.make_tensor_descriptor", "tt.gather", "tt.scan")
"""How those begin: early returns, functions that are not inlined, and what touches memory otherwise."""
_BRANCHING = ("scf.for", "scf.if")
_REDUCING = ("tt.reduce",)
_CHOOSING = {f"arith.{name}" for name in ("maxsi", "minsi", "select", "cmpf")}
"""Whose results, if they are integers, are some of the operands."""
_UNSIGNED = ("arith.divui", "arith.remui", "arith.shrui", "arith.extui", "arith.maxui", "arith.minui")


def whole(bits: int) -> Range:
    """What fits into so many bits, with a sign; booleans are 0 and 1."""
    return (0, bits) if bits <= 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def bits_of(type_: str) -> int:
    """Of an integer's type or of a tensor's of them; 0 for any other."""
    found = re.fullmatch(r"(?:tensor<[\dx]*x?)?(?:i(\d+)|index)>?", type_)
    return int(found[1] or 64) if found else 0


class Ranges:
    """Every integer of a kernel. `steering` are those that addresses, masks, loops and branches are made of.

    Args:
        module: the kernel.
        arguments: what each of its arguments can be, if it is an integer.
        program_id, num_programs: what these can be in the first dim of the grid.
    """

    def __init__(self, module: Module, arguments: Sequence[Range], program_id: Range, num_programs: Range) -> None:
        self.steering: list[Value] = []
        self._programs = {"tt.get_program_id": program_id, "tt.get_num_programs": num_programs}
        self._values = {
            f"%{name}": Value(bits_of(type_), range_)
            for (name, type_), range_ in zip(module.arguments, arguments, strict=True)
        }
        self._block(module.body)

    def _of(self, names: Iterable[str]) -> tuple[Value, ...]:
        return tuple(self._values[name] for name in names)

    def _block(self, block: Block) -> tuple[Value, ...]:
        """Evaluate; what the block hands on."""
        handed_on: tuple[Value, ...] = ()
        for op in block.operations:
            if op.name.endswith((".yield", ".return")):
                handed_on = self._of(op.operands)
                continue
            results = list(self._results(op))
            if len(results) < len(op.results) or any(name not in self._values for name in op.operands if not op.blocks):
                raise NotFollowed(op)
            self._values.update(zip(op.results, results, strict=False))
        return handed_on

    def _results(self, op: Operation) -> Iterable[Value]:
        if op.name.startswith(NOT_FOLLOWED) or (op.blocks and op.name not in (*_BRANCHING, *_REDUCING)):
            raise NotFollowed(op)
        if op.name == "scf.for":
            return self._loop(op)
        values = self._of(op.operands)
        self.steering += _steers(op, values)
        if op.name == "scf.if":
            return [_union(op, each) for each in zip(*(self._block(b) for b in op.blocks), strict=True)]
        if op.blocks:
            return self._reduced(op, values)
        return [self._value(op, type_, values) for type_ in op.types]

    def _reduced(self, op: Operation, values: tuple[Value, ...]) -> list[Value]:
        """Of a sum so many times what one element can be; of a maximum what one can be; of another any number."""
        (block,) = op.blocks
        names = {each.name for each in block.operations[:-1] if each.types != ["i1"]}
        results = []
        for type_, value in zip(op.types, values, strict=True):
            result = Value(bits_of(type_), whole(bits_of(type_)), values, op)
            low: float
            high: float
            low, high = value.range
            if names == {"arith.addi"}:
                low, high = low * op.elements, high * op.elements
            elif not names <= _CHOOSING:
                low, high = -math.inf, math.inf
            if result.bits > 1:
                _settle(result, (low, high))
            results.append(result)
        return results

    def _value(self, op: Operation, type_: str, values: tuple[Value, ...]) -> Value:
        bits = bits_of(type_)
        value, found = Value(bits, whole(bits), values, op), None
        if op.name in self._programs:
            found = self._programs[op.name] if "x" in op.text.split() else (0, 65535)
        elif bits and op.name in _RULES:
            found = _RULES[op.name](op, *(v.range for v in values))
        unsigned = op.name in _UNSIGNED or op.text.startswith("arith.cmpi u")
        if unsigned and any(v.range[0] < 0 for v in values if v.bits > 1):
            value.wide = (0, 2 ** max(v.bits for v in values) - 1)  # a negative number is read as a large one
        elif found and bits > 1:
            _settle(value, found)
        return value

    def _loop(self, op: Operation) -> list[Value]:
        """What is carried from step to step is what it began with, if steps keep to that, or else anything."""
        if "unsigned" in op.text:
            raise NotFollowed(op)
        counter, first, end, step, *carried = op.operands
        names, begun = carried[::2], self._of(carried[1::2])
        start, stop, by = self._of((first, end, step))
        self.steering += (start, stop, by)
        last = max(stop.range[1] - 1, start.range[0])
        i = Value(start.bits, (start.range[0], last), (start, stop, by), op)
        if last + by.range[1] > whole(i.bits)[1]:
            i.wide = (start.range[0], last + by.range[1])  # the step past the end, after which the loop ends
        self.steering.append(i)
        current, before = [_union(op, (v,)) for v in begun], len(self.steering)
        while True:
            del self.steering[before:]
            self._values |= {counter: i, **dict(zip(names, current, strict=True))}
            handed_on = self._block(op.blocks[0])
            grown = [_union(op, pair) for pair in zip(begun, handed_on, strict=True)]
            for g, c in zip(grown, current, strict=True):
                c.made_of = g.made_of
            keeps = [_hull(op, g.range, c.range) == c.range for g, c in zip(grown, current, strict=True)]
            if all(keeps):
                return grown
            current = [
                c if kept else Value(c.bits, whole(c.bits), (), op) for c, kept in zip(current, keeps, strict=True)
            ]


def _settle(value: Value, found: tuple[float, float]) -> None:
    """Give a value its range, if that fits."""
    low, high = whole(value.bits)
    if low <= found[0] and found[1] <= high:
        value.range = int(found[0]), int(found[1])
    else:
        value.wide = found


def _steers(op: Operation, values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Those operands of an operation that decide where memory is touched, or whether."""
    if op.name in ("tt.load", "tt.store"):  # a pointer is made of its offsets, and of what chose it
        return values[:1] + tuple(v for v in values[1 if op.name == "tt.load" else 2 :] if v.bits == 1)
    return values[:1] if op.name == "scf.if" else ()


def _union(op: Operation, values: tuple[Value, ...]) -> Value:
    return Value(values[0].bits, _hull(op, *(v.range for v in values)), values, op)


def _hull(_: Operation, *ranges: Range) -> Range:
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _corners(of: Callable[[int, int], int]) -> Callable[..., Range]:
    def rule(_: Operation, a: Range, b: Range) -> Range:
        every = [of(x, y) for x, y in product(a, b)]
        return min(every), max(every)

    return rule


def _divided(_: Operation, a: Range, b: Range) -> Range | None:
    divisors = {y for y in (*b, 1, -1) if b[0] <= y <= b[1] and y}
    every = [int(math.copysign(1, x) * math.copysign(1, y)) * (abs(x) // abs(y)) for x, y in product(a, divisors)]
    return (min(every), max(every)) if every else None


def _remainder(_: Operation, a: Range, b: Range) -> Range:
    most = max(abs(b[0]), abs(b[1])) - 1
    return max(min(a[0], 0), -most), min(max(a[1], 0), most)


def _constant(op: Operation, *_: Range) -> Range | None:
    found = re.match(r"arith\.constant (?:dense<)?(-?\d+)[> ]", op.text)
    return (int(found[1]), int(found[1])) if found else None


def _numbered(op: Operation, *_: Range) -> Range:
    bounds = {name: int(n) for name, n in re.findall(r"(start|end) = (\d+)", op.text)}
    return bounds["start"], bounds["end"] - 1


def _both(_: Operation, *ranges: Range) -> Range | None:
    positive = [r[1] for r in ranges if r[0] >= 0]
    return (0, min(positive)) if positive else None


def _shifted(of: Callable[[int, int], int]) -> Callable[..., Range]:
    def rule(_: Operation, a: Range, b: Range) -> Range:
        every = [of(x, min(max(y, 0), 64)) for x, y in product(a, b)]  # what else it is shifted by is undefined
        return min(every), max(every)

    return rule


def _unsigned(of: Callable[..., Range | None]) -> Callable[..., Range | None]:
    """A rule for numbers that are not negative; of others see `_UNSIGNED`."""
    return lambda op, *ranges: of(op, *ranges) if all(r[0] >= 0 for r in ranges) else None


_RULES: dict[str, Callable[..., Range | None]] = {
    "arith.constant": _constant,
    "tt.make_range": _numbered,
    "arith.addi": lambda _, a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda _, a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": _corners(operator.mul),
    "arith.divsi": _divided,
    "arith.remsi": _remainder,
    "arith.minsi": _corners(min),
    "arith.maxsi": _corners(max),
    "arith.andi": _both,
    "arith.shli": _shifted(operator.lshift),
    "arith.shrsi": _shifted(operator.rshift),
    "arith.extui": _unsigned(_hull),
    "arith.divui": _unsigned(_divided),
    "arith.remui": _unsigned(_remainder),
    "arith.shrui": _unsigned(_shifted(operator.rshift)),
    "arith.select": lambda op, _, a, b: _hull(op, a, b),
    **dict.fromkeys(
        ("arith.extsi", "arith.trunci", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"), _hull
    ),
}
"""The range of a result, from those of the operands; None, or no rule: anything that fits."""
