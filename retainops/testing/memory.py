"""Memory of the simulated GPU: which argument an address belongs to, its bounds, and who touched it.

Each tensor argument is given a window of addresses of its own, terabytes wide, with the tensor in the middle. So an
address names its argument however far out of bounds it is, and never runs into a neighbouring tensor by chance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from retainops.testing.races import MANY, Shadow

Array = np.ndarray[Any, Any]

_WINDOW = 1 << 44
_FIRST = 1 << 8  # the first window lies above every address a process can have
_KEPT = 4095  # a window address keeps these low bits of the real one, so alignment is the same


class KernelFault(AssertionError):
    """A kernel did what no kernel may do on a GPU; the message says where, and what to do about it."""


@dataclass(frozen=True, eq=False)
class Argument:
    """A tensor argument of a launch: its name in the signature, the tensor, and where its window is."""

    name: str
    tensor: torch.Tensor
    window: int

    @functools.cached_property
    def real(self) -> int:
        """The tensor's address."""
        return self.tensor.data_ptr()

    @functools.cached_property
    def base(self) -> int:
        """The address that the kernel is given."""
        return (_FIRST + self.window) * _WINDOW + _WINDOW // 2 + (self.real & _KEPT)

    @functools.cached_property
    def shift(self) -> np.uint64:
        """What takes an address in the window to the real one (modulo 2^64)."""
        return np.uint64((self.real - self.base) % 2**64)

    @functools.cached_property
    def steps(self) -> list[tuple[int, int]]:
        """(stride, size) of each dim in which the tensor moves, outermost first."""
        dims = zip(self.tensor.stride(), self.tensor.shape, strict=True)
        return sorted(((s, n) for s, n in dims if s and n > 1), reverse=True)

    @functools.cached_property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if not self.tensor.numel():
            return 0
        return (1 + sum((n - 1) * s for s, n in self.steps)) * self.tensor.element_size()

    @functools.cached_property
    def gaps(self) -> bool:
        """Whether there is memory between elements that belongs to none (and dims do not overlap)."""
        inner = 1
        for stride, size in reversed(self.steps):
            if stride < inner:
                return False
            inner = (size - 1) * stride + inner
        return inner > math.prod(size for _, size in self.steps)

    def elements(self, offsets: Array) -> Array:
        """Which byte offsets inside the extent are elements of the tensor, not gaps between them."""
        rest = offsets // self.tensor.element_size()
        ok = np.ones(rest.shape, bool)
        for stride, size in self.steps:
            ok &= rest // stride < size
            rest = rest % stride
        return ok & (rest == 0)

    def __str__(self) -> str:
        shape, strides = tuple(self.tensor.shape), self.tensor.stride()
        return f"{self.name} has {self.tensor.numel()} elements (shape {shape}, strides {strides})"


class Memory:
    """The tensors of one launch, and a log of every access to them.

    Args:
        kernel: the kernel's name.
        grid: the launch's grid.
        where: says which line of the kernel is running.
    """

    def __init__(self, kernel: str, grid: tuple[int, int, int], where: Callable[[], str]) -> None:
        self.kernel, self.grid, self.where = kernel, grid, where
        self.arguments: list[Argument] = []

    def add(self, name: str, tensor: torch.Tensor) -> int:
        """Make room for a tensor; returns the address to give to the kernel."""
        self.arguments.append(Argument(name, tensor, len(self.arguments)))
        return self.arguments[-1].base

    def argument(self, address: int) -> Argument | None:
        """The argument in whose window an address is."""
        window = address // _WINDOW - _FIRST
        return self.arguments[window] if 0 <= window < len(self.arguments) else None

    def access(self, kind: str, addresses: Array, mask: Array, size: int, program: int) -> Array:
        """Check an access of `size` bytes a lane and log it.

        Args:
            kind: "load", "store" or "atomic" (whose bounds are checked, and nothing else).
            addresses: in the windows, uint64.
            mask: bool, of the same shape; masked-off lanes touch nothing.
            size: bytes a lane.
            program: linear index.

        Returns:
            The real addresses.

        Raises:
            KernelFault: out of bounds; a race with another program; two lanes stored to one element.
        """
        lanes = (addresses if mask.all() else addresses[mask]).reshape(-1)
        if not lanes.size:
            return addresses
        low, high = int(lanes.min()), int(lanes.max())
        if low // _WINDOW == high // _WINDOW:
            argument = self._check(kind, lanes, low, high, size, program)
            return addresses + argument.shift
        real, windows = addresses.copy(), addresses // np.uint64(_WINDOW)
        for window in np.unique(windows[mask]):
            here = mask & (windows == window)
            real[here] = self.access(kind, addresses[here], here[here], size, program)
        return real

    def _check(self, kind: str, lanes: Array, low: int, high: int, size: int, program: int) -> Argument:
        x = self.argument(low)
        if x is None:
            raise self.fault(kind, f"address {low:#x}", program, "which is in none of its arguments; check the pointer")
        outside = low < x.base or high + size > x.base + x.extent
        if outside or x.gaps:
            offsets = (lanes - np.uint64(x.base)).view(np.int64)
            bad = (offsets < 0) | (offsets + size > x.extent) if outside else ~x.elements(offsets)
            if bad.any():
                raise self._out_of_bounds(kind, x, offsets, bad, program)
        if kind != "atomic":
            self._log(kind, x, lanes, low, high, size, program)
        return x

    def _log(self, kind: str, x: Argument, lanes: Array, low: int, high: int, size: int, program: int) -> None:
        shadow, shift = self._shadows[x.window], x.real - x.base
        real = (lanes + x.shift).view(np.int64)
        units = shadow.units(real, low + shift, high + shift, size)
        if kind == "load":
            if race := shadow.read(units, program):
                raise self._race(kind, x, shadow, "written", *race, program)
        elif clash := shadow.write(units, program):
            verb, unit, other = clash
            if verb != "twice":
                raise self._race(kind, x, shadow, verb, unit, other, program)
            what = "from several lanes of one store, in no defined order; make the pointers differ, or mask all but one"
            raise self.fault(kind, _element(x, shadow.start + unit * shadow.unit - x.real), program, what)

    @functools.cached_property
    def _shadows(self) -> list[Shadow]:
        """The log of each argument; arguments that share memory share a log."""
        shadows: dict[int, Shadow] = {}
        stop, group = 0, list[Argument]()
        for x in [*sorted(self.arguments, key=lambda x: x.real), None]:
            if group and (x is None or x.real >= stop):
                unit = min(a.tensor.element_size() for a in group)
                shadow = Shadow(group[0].real, stop, unit)
                shadows.update((a.window, shadow) for a in group)
                group = []
            if x is not None:
                stop = max(stop, x.real + x.extent) if group else x.real + x.extent
                group.append(x)
        return [shadows[x.window] for x in self.arguments]

    def _out_of_bounds(self, kind: str, x: Argument, offsets: Array, bad: Array, program: int) -> KernelFault:
        first, lanes = int(offsets[bad][0]), f"in {int(bad.sum())} of {bad.size} active lanes"
        between = 0 <= first < x.extent
        where = "between the elements" if between else "out of bounds"
        remedy = "mask the access" + (", or check the strides" if between or x.tensor.dim() > 1 else "")
        return self.fault(kind, _element(x, first), program, f"{where} {lanes}: {x}; {remedy}")

    def _race(
        self, kind: str, x: Argument, shadow: Shadow, verb: str, unit: int, other: int, program: int
    ) -> KernelFault:
        who = "other programs have" if other == MANY else f"{self.label(other)} has"
        what = f"which {who} {verb}: programs run in any order; give each its own elements, or use another launch"
        return self.fault(kind, _element(x, shadow.start + unit * shadow.unit - x.real), program, what)

    def poisoned(self, kind: str, address: int, program: int, loads: dict[str, str]) -> KernelFault:
        """The fault of storing a value that lanes went into which a load masked off without `other=`.

        Args:
            loads: such loads of this program: the line, and the argument.
        """
        x = self.argument(address)
        element = _element(x, address - x.base) if x else f"address {address:#x}"
        sources = " or ".join(f"{name} (the load at {line})" for line, name in loads.items())
        what = f"of a value from masked-off lanes of {sources}; pass other= to that load, or mask these lanes here too"
        return self.fault(kind, element, program, what)

    def label(self, program: int) -> str:
        """A program by its index, or by its three where the grid has more than one dim."""
        x, y, _ = self.grid
        index = (program % x, program // x % y, program // (x * y))
        return f"program {program if self.grid[1:] == (1, 1) else index}"

    def fault(self, kind: str, element: str, program: int, what: str) -> KernelFault:
        """The exception for an access: "copy_kernel: load of X[12] by program 3 at file.py:7, ..."."""
        access = {"load": "load of", "store": "store to", "atomic": "atomic on"}[kind]
        return KernelFault(f"{self.kernel}: {access} {element} by {self.label(program)} at {self.where()}, {what}")


def _element(x: Argument, offset: int) -> str:
    return f"{x.name}[{offset // x.tensor.element_size()}]"
