"""A log of who read and wrote which memory, and the races that it shows."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MANY = -1  # more than one program
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13


class Shadow:
    """The last programs to read and to write each unit of a stretch of memory.

    The log has an entry a unit, and the entries never touched take no memory: the operating system hands out its
    pages on first use.
    """

    def __init__(self, start: int, stop: int, unit: int) -> None:
        self.start, self.unit = start, unit
        units = -(-(stop - start) // unit)
        self.writer, self.reader = _zeros(units), _zeros(units)  # 0: nobody; otherwise 1 + the program

    def units(self, lanes: Array, low: int, high: int, size: int) -> slice | Array:
        """The units that an access touches.

        Args:
            lanes: (n,) int64 addresses, `low` and `high` the first and the last of them.
            size: bytes a lane; where these are less than a unit, units become as small from here on.
        """
        if size < self.unit:
            self.writer, self.reader = (np.repeat(log, self.unit // size) for log in (self.writer, self.reader))
            self.unit = size
        n = lanes.size
        if size == self.unit and high - low == (n - 1) * size and (n == 1 or (lanes[1:] - lanes[:-1] == size).all()):
            first = (low - self.start) // size
            return slice(first, first + n)  # indexing by it is several times faster
        units = (lanes - self.start) // self.unit
        if size == self.unit:
            return units
        return (units[:, None] + np.arange(size // self.unit)).reshape(-1)

    def read(self, units: slice | Array, program: int) -> tuple[int, int] | None:
        """Log a read; returns (unit, the program that wrote it) where another program did."""
        me = program + 1
        writers, readers = self.writer[units], self.reader[units]
        if writers.any() and (others := (writers != 0) & (writers != me)).any():
            return _first(units, writers, others)
        self.reader[units] = np.where((readers == 0) | (readers == me), me, MANY) if readers.any() else me
        return None

    def write(self, units: slice | Array, program: int) -> tuple[str, int, int] | None:
        """Log a write; returns ("written" or "read" or "twice", unit, the other program) where it may not be."""
        me = program + 1
        for verb, log in (("written", self.writer), ("read", self.reader)):
            touched = log[units]
            if touched.any() and (others := (touched != 0) & (touched != me)).any():
                return verb, *_first(units, touched, others)
        if not isinstance(units, slice):
            lanes = np.arange(units.size, dtype=np.int32)
            self.writer[units] = lanes
            lost = self.writer[units] != lanes
            if lost.any():
                return "twice", int(units[lost][0]), program
        self.writer[units] = me
        return None


def _zeros(n: int) -> Array:
    if n < 1 << 20:
        return np.zeros(n, np.int32)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, 4 * n, flags=flags), np.int32)


def _first(units: slice | Array, programs: Array, which: Array) -> tuple[int, int]:
    lane = int(which.argmax())
    program = int(programs[lane])
    unit = units.start + lane if isinstance(units, slice) else int(units[lane])
    return unit, program if program == MANY else program - 1
