"""The host side of kernels/rows.py: how ops that reduce over the last dim walk their rows."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch

from retainops.kernels.points import Retained
from retainops.ops._operands import NO_STATS, Kept, layout_of, strides_of
from retainops.ops._walk import Walk, merge, power_of_2, strides_in

CHUNK = 1024
"""Columns of a tile where a row is wider than registers hold."""
A_THREAD = 16
"""Elements of a tile for each thread: two 128-bit accesses of bf16. Twice as many leave few registers for the rest."""
ROOM = 8192
"""Elements of tiles that a multiprocessor's registers have room for, with what is computed of each."""
ALIGNED = 16
"""What the length of rows divides by whose accesses are 128 bits wide: Triton knows that of a number, or nothing."""
SHARED_BYTES = 96 * 1024
"""What programs may use of a multiprocessor's shared memory for tiles on their way: any of NVIDIA's GPUs since 2020 has
99 KiB. Twice as much is slower on an H200."""


def row_walk(
    shape: torch.Size,
    tensors: Sequence[torch.Tensor],
    *_others: Sequence[torch.Size],
    widest: int,
    elements: int,
    chunk: int = CHUNK,
    a_thread: int = 32,
) -> Walk:
    """Merge the dims before the last one.

    Args:
        shape: the broadcast shape.
        tensors: all that are read or written and whose shape broadcasts to `shape`.
        widest: the widest row that is held in registers as a whole.
        elements: of a tile of narrower rows.
        chunk: columns of a tile of wider ones.
        a_thread: elements of a tile for each thread, while there are threads.
    """
    before, n = shape[:-1], shape[-1]
    merged = merge(before, [strides_in(t, shape)[:-1] for t in tensors]) or [((), 1)]
    groups = (*merged, ((len(shape) - 1,), n))
    m = merged[-1][1]
    block_n = power_of_2(n) if n <= widest else chunk
    block_m = min(max(elements // block_n, 1), power_of_2(m))
    tiles = -(-m // block_m)
    for _, size in merged[:-1]:
        tiles *= size
    tile = block_m * block_n
    warps = min(max(tile // (32 * a_thread), 1), max(8, tile // 256), 32)
    sizes, dims = tuple(size for _, size in groups), tuple(d for d, _ in groups)
    return Walk(sizes, dims, (block_m, block_n), 1 << (warps - 1).bit_length(), (tiles * -(-n // block_n),))


class Tiling(NamedTuple):
    """How an op cuts rows into tiles; in elements of 4 bytes, as most interiors are held (half as many of 8).

    Attributes:
        widest: the widest row that is one tile.
        elements: of a tile of narrower or of wider rows.
        chunk: columns of a tile of wider rows.
        a_thread: of a tile for each thread, while there are threads.
    """

    widest: int
    elements: int
    chunk: int
    a_thread: int = A_THREAD

    @functools.cache  # noqa: B019  (of the few there are)
    def held_in(self, dtype: torch.dtype) -> Tiling:
        """For interiors of this dtype."""
        return Tiling(*(size * 4 // dtype.itemsize for size in self))

    def walk(self, shape: torch.Size, tensors: Sequence[torch.Tensor], *others: Sequence[torch.Size]) -> Walk:
        """What `launch` asks for."""
        return row_walk(shape, tensors, *others, **self._asdict())

    def tile(self, n: int) -> int:
        """Elements of a tile of rows of n."""
        return max(self.elements, power_of_2(n) if n <= self.widest else 0)

    def walkers(self, device: torch.device, way: Walk) -> int:
        """How many programs share the tiles: as many as there is room for, a whole number for each tile of a row."""
        chunks = row_chunks(way)
        for_each = max(1, ROOM // (way.block[0] * way.block[1]))
        return max(1, resident(way.grid[0], device, for_each) // chunks) * chunks

    def stages(self, n: int, *read: torch.Tensor | None) -> int:
        """How many tiles of rows of n a program has in hand: the one it works on, and more on their way to it.

        Where accesses are not wide, each element on its way would have an instruction and addresses of its own.
        """
        tile = self.tile(n)
        size = tile * sum(x.element_size() for x in read if x is not None) * max(1, ROOM // tile)
        return 1 if torch.version.hip or n % ALIGNED else 1 + min(2, SHARED_BYTES // size)


def covers(way: Walk) -> bool:
    """Whether tiles cover the rows without going beyond: then no access needs a mask."""
    return way.shape[-1] % way.block[1] == 0 and way.shape[-2] % way.block[0] == 0


def in_tiles(way: Walk, other: Walk) -> Walk:
    """A walk over rows in the tiles of another one over the same rows."""
    programs = row_chunks(other) * -(-way.shape[-2] // other.block[0])
    for size in way.shape[:-2]:
        programs *= size
    return way._replace(block=other.block, warps=other.warps, grid=(programs,))


def row_tiles(way: Walk) -> int:
    """How many tiles there are down the rows."""
    return way.grid[0] // row_chunks(way)


def row_chunks(way: Walk) -> int:
    """How many tiles there are along a row."""
    return -(-way.shape[-1] // way.block[1])


def resident(tiles: int, device: torch.device, for_each: int = 2) -> int:
    """How many programs share the tiles, where each leaves a share of a sum: so many for each multiprocessor."""
    return min(tiles, for_each * _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class Dense:
    """What is kept of a point, without its statistics."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.tensor = kept, kept.tensor
        self.summed: list[torch.Size] = []

    def key(self) -> Hashable:
        """All that its place depends on."""
        return None if self.tensor is None else layout_of(self.tensor)

    def place(self, way: Walk, shape: torch.Size) -> tuple[int | None, ...]:
        """Strides."""
        return () if self.tensor is None else strides_of(way, self.kept.shape, self.tensor)

    def operand(self, place: tuple[int | None, ...], held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        return Retained(self.tensor, place, None, NO_STATS)


class Statistics:
    """What is kept of a point, of which only the statistics are not written yet."""

    def __init__(self, kept: Kept) -> None:
        self.kept, self.tensor, self.summed = kept, None, kept.summed

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.kept.key()

    def place(self, way: Walk, shape: torch.Size) -> Any:
        """What its argument is, besides pointers."""
        return self.kept.place(way, shape)

    def operand(self, place: Any, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        return self.kept.operand(place, held)._replace(ptr=None)
