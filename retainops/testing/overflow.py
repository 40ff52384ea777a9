"""Which integers of a kernel may overflow, for any size of its tensors: found in Triton's IR, and nothing is run.

A size or a stride that fits into int32 is an int32 in a kernel, and so is the product of two of them: it wraps without
a word where a tensor is large enough, and the kernel reads or writes elsewhere. Such a tensor need not be made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from retainops.testing.driver import Launch, driver
from retainops.testing.frontend import ttir
from retainops.testing.ranges import NotFollowed, Range, Ranges, Value, bits_of, whole
from retainops.testing.ttir import Module

SIZES: Range = (0, 2**31 - 2**16)
"""What an int32 argument is taken to be, unless bounds are given: a size or a stride. Larger ones are int64 to Triton,
or (those that are less than 2**16 below 2**31) go to the reference path where a loop would step beyond them."""
ADDRESSES = 2**47
"""What an int64 argument is at most: no memory is larger."""


@dataclass(frozen=True)
class Overflow:
    """An operation whose result may not fit.

    Attributes:
        kernel: its name.
        operation: of Triton's IR, "arith.muli"; "scf.for" for a loop whose last step passes the largest integer.
        bits: that it has.
        lines: of source, "kernels/tiles.py:54", each called by the next.
        range: the least and the largest that it may be.
    """

    kernel: str
    operation: str
    bits: int
    lines: tuple[str, ...]
    range: tuple[float, float]

    def __str__(self) -> str:
        where = ", called from ".join(self.lines) or "an unknown line"
        most = max(self.range, key=abs)
        return f"{self.kernel}: {self.operation} of int{self.bits} may reach {most}, at {where}"


def overflows(
    call: Callable[[], Any], *, bounds: Mapping[str, Range] | None = None, target: str = "sm_90"
) -> list[Overflow]:
    """Integer arithmetic that may overflow, of each kernel that a call launches, in addresses, masks and loop bounds.

    The kernels are those that this call makes (what is None, 1 or compiled in stays so), and every other integer
    argument may be any size that fits its type, whatever it was in this call.

    Args:
        call: runs an op, forward and backward as it likes, on CPU tensors. Kernels are translated and not executed,
            so what they would have written holds anything.
        bounds: what int32 arguments can be, (least, largest), by patterns of their names as the kernel has them:
            "n", or "X.strides.*" of tuples; of several that fit the last counts. "program_id" and "num_programs" in
            the first dim of the grid are such names, too. Otherwise an argument is from 0 to 2**31 - 2**16, and
            programs are as many as a GPU takes.
        target: one of `retainops.testing.driver.TARGETS`.

    Returns:
        What may overflow, none twice. Values read from memory may be anything that fits their type; integers of 64
        bits, and what becomes of floats, are not looked at. An empty list is a proof within these terms. An entry need
        not be a fault, that `a // b * b` is no more than a is not known here, and may be no more than a consequence of
        the one before: what overflowed may be anything.

    Raises:
        ValueError: an unknown target, the call launched no kernel, an argument of this very call is outside its
            bounds, or a kernel has what is not followed: a `while` loop, an early return, functions that are not
            inlined, scans, gathers, atomics, tensor descriptors.

    Example:
        >>> overflows(lambda: ro.mul_sin(a, b).sum().backward())
        []
    """
    bounds = {"*": SIZES, "program_id": (0, 2**31 - 2), "num_programs": (1, 2**31 - 1), **(bounds or {})}
    programs = [_bound(bounds, name) for name in ("program_id", "num_programs")]
    modules: dict[Any, Module] = {}
    found: dict[Overflow, None] = {}

    def execute(launch: Launch) -> None:
        known = launch.kernel in modules
        module = modules[launch.kernel] = modules[launch.kernel] if known else Module(ttir(launch.kernel))
        arguments = _bounds(launch, module, bounds)
        if known:
            return
        try:
            found.update(dict.fromkeys(_overflows(launch.name, module, Ranges(module, arguments, *programs))))
        except NotFollowed as e:
            lines = ", called from ".join(module.where(e.operation.location)) or "an unknown line"
            raise ValueError(
                f"overflows: {launch.name} has {e.operation.name} at {lines}, which is not followed; see "
                "docs/verification.md"
            ) from None

    with driver(target, execute, compiles=False):
        call()
    if not modules:
        raise ValueError("overflows: the call launched no kernel; pass a callable that runs the kernels' path")
    return list(found)


def _bounds(launch: Launch, module: Module, bounds: Mapping[str, Range]) -> list[Range]:
    """What each argument of a kernel is taken to be, which those of this launch must be."""
    types, found = launch.kernel.src.signature, []
    pairs = zip(launch.fn.arg_names, launch.args, strict=True)
    flat = [each for name, x in pairs for each in _flat(name, x, types[name])]
    for (name, x), (_, type_) in zip(flat, module.arguments, strict=True):
        bits = bits_of(type_)
        if not isinstance(x, int) and bits:
            raise ValueError(f"overflows: {launch.name} got {name}, a {type(x).__name__}, which is not followed")
        low, high = _bound(bounds, name) if bits == 32 else (0, min(ADDRESSES, whole(bits)[1]))
        if bits and not low <= x <= high:
            raise ValueError(
                f"overflows: {launch.name} got {name} = {x}, taken to be from {low} to {high}; "
                f"pass bounds={{{name!r}: (least, largest)}}"
            )
        found.append((low, high))
    return found


def _bound(bounds: Mapping[str, Range], name: str) -> Range:
    return [bound for pattern, bound in bounds.items() if fnmatchcase(name, pattern)][-1]


def _flat(name: str, x: Any, type_: Any) -> Iterator[tuple[str, Any]]:
    """What a kernel gets of an argument, by name: not what is compiled in."""
    if isinstance(x, tuple):
        for field, item, of in zip(getattr(x, "_fields", range(len(x))), x, type_, strict=True):
            yield from _flat(f"{name}.{field}", item, of)
    elif type_ != "constexpr":
        yield name, x


def _overflows(kernel: str, module: Module, ranges: Ranges) -> list[Overflow]:
    found, seen, left = [], set[int](), list(ranges.steering)
    while left:
        value: Value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        left += value.made_of
        bits = min((v.bits for v in (value, *value.made_of) if v.bits > 1), default=64)
        if value.wide is not None and bits < 64 and value.operation is not None:
            lines = tuple(module.where(value.operation.location))
            found.append(Overflow(kernel, value.operation.name, bits, lines, value.wide))
    return found
