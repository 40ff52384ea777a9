"""The host side of kernels/tiles.py: from tensors of any layout to tiles and a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Walk(NamedTuple):
    """How a launch walks its tensors.

    Attributes:
        shape: the merged dims, at least two.
        dims: for each merged dim, the dims of the broadcast shape in it, outermost first.
        block: (BLOCK_M, BLOCK_N).
        warps: warps a program.
        grid: programs.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    block: tuple[int, int]
    warps: int
    grid: tuple[int]


def walk(
    shape: torch.Size,
    tensors: Sequence[torch.Tensor],
    summed: Sequence[torch.Size] = (),
    numbered: Sequence[torch.Size] = (),
    gradients: Sequence[torch.Size] = (),
    accesses: int = 2,
) -> Walk:
    """Merge dims for a launch over `shape`.

    Args:
        shape: the broadcast shape.
        tensors: all that are read or written.
        summed: shapes that broadcast to `shape`, to which something is summed up.
        numbered: shapes that broadcast to `shape`, whose elements are numbered.
        gradients: those of `summed` that are gradients of inputs. Where there are any they alone choose the tiles, so
            what else is retained changes no order of summation.
        accesses: 128-bit accesses of a thread to each tensor of 16 bits, 1 or 2.
    """
    dense = all(t.shape == shape and t.is_contiguous() for t in tensors) and all(s == shape for s in numbered)
    if dense and all(s.numel() == 1 for s in summed):
        merged = [(tuple(d for d, size in enumerate(shape) if size != 1), shape.numel())]
    else:
        smalls = [*summed, *numbered]
        merged = merge(shape, [strides_in(t, shape) for t in tensors] + [own_strides(s, shape) for s in smalls])
    while len(merged) < 2:
        merged.insert(0, ((), 1))
    sizes = tuple(size for _, size in merged)
    rows, columns = merged[-2][0], merged[-1][0]
    tall = any(_sums(x, shape, rows) and not _sums(x, shape, columns) for x in gradients or summed)
    narrow = max(t.element_size() for t in tensors) <= 2
    block, warps = _block(sizes[-2], sizes[-1], tall, 4 // accesses if narrow else 4)
    programs = -(-sizes[-2] // block[0]) * -(-sizes[-1] // block[1])
    for size in sizes[:-2]:
        programs *= size
    return Walk(sizes, tuple(dims for dims, _ in merged), block, warps, (programs,))


def strides_in(t: torch.Tensor, shape: torch.Size) -> list[int]:
    """Strides of `t` expanded to `shape`: 0 where it does not move."""
    lead = len(shape) - t.dim()
    return [0] * lead + [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


def own_strides(small: torch.Size, shape: torch.Size) -> list[int]:
    """Strides of a contiguous tensor of shape `small`, expanded to `shape`: 0 only where it is broadcast."""
    strides, step = [0] * len(shape), 1
    for d in range(-1, -1 - len(small), -1):
        if small[d] > 1:
            strides[d] = step
            step *= small[d]
    return strides


def merge(shape: torch.Size, strides: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], int]]:
    """Merge dims that every tensor walks as one: [(the dims, their size)], outermost first; dims of size 1 vanish."""
    # The first tensor that moves in the most dims sets the order: a broadcast one would put its rows innermost.
    lead = max(strides, key=lambda s: sum(map(bool, s)))
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -lead[d])
    merged: list[tuple[tuple[int, ...], int]] = []
    for d in order:
        if merged:
            dims, size = merged[-1]
            if all(s[dims[-1]] == s[d] * shape[d] for s in strides):
                merged[-1] = ((*dims, d), size * shape[d])
                continue
        merged.append(((d,), shape[d]))
    return merged


def _sums(small: torch.Size, shape: torch.Size, dims: tuple[int, ...]) -> bool:
    """Whether summing up to `small` sums over these dims."""
    return bool(dims) and all(d < len(shape) - len(small) or small[d - len(shape)] == 1 for d in dims)


ELEMENTS = 1024
"""Of a tile. In 4 warps it is 8 a thread, so two 128-bit accesses of float32 or one of 16 bits; in 2 warps, two."""


def _block(m: int, n: int, tall: bool, warps: int) -> tuple[tuple[int, int], int]:
    """(BLOCK_M, BLOCK_N) and warps.

    A sum over rows that keeps the columns wants tall tiles, since every tile leaves one partial row: 1/64 of the
    elements here.
    """
    if tall:
        return (min(64, power_of_2(m)), min(64, power_of_2(n))), 8
    if m == 1:
        return (1, min(ELEMENTS, power_of_2(n))), warps
    # Rows are cut where the last tile wastes the fewest lanes.
    block_n = min((1024, 512, 256), key=lambda b: (-(-n // b) * b, -b)) if n > 256 else power_of_2(n)
    return (min(ELEMENTS // block_n, power_of_2(m)), block_n), warps


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def merged_strides(way: Walk, strides: Sequence[int]) -> tuple[int | None, ...]:
    # The innermost dim of a merged group is the one whose stride the group walks with.
    return tuple((strides[dims[-1]] or None) if dims else None for dims in way.dims)


class Shares(NamedTuple):
    """Where the tiles of a walk leave their shares of a sum (or maximum): `rows` x `size` of them, to be reduced."""

    rows: int
    size: int
    strides: tuple[int | None, ...]
    tiles: tuple[int | None, ...]


def shares(way: Walk, shape: torch.Size, small: torch.Size) -> Shares:
    """One row of the small shape's size for each step along what is summed: no two programs write one element."""
    strides = list(merged_strides(way, own_strides(small, shape)))
    tiles: list[int | None] = [None, None]
    rows, size = 1, small.numel()
    for d, dims in enumerate(way.dims):
        if not _sums(small, shape, dims):
            continue
        from_end = d - len(way.dims)
        if from_end >= -2:
            tiles[from_end] = rows * size
            rows *= -(-way.shape[d] // way.block[from_end])
        else:
            strides[d] = rows * size
            rows *= way.shape[d]
    return Shares(rows, size, tuple(strides), tuple(tiles))
