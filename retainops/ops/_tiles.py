"""The host side of kernels/tiles.py: from tensors of any layout to operands, tiles and a grid."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from retainops.buffers import share_memory
from retainops.kernels.points import Retained, Stats
from retainops.kernels.tiles import Operand
from retainops.slots import Slot
from retainops.stats import HIST_BINS, count, parts_of

NOTHING = Operand(None, ())
NO_STATS = Stats()
NOT_RETAINED = Retained(None, (), None, NO_STATS)


def tensors(dtype: torch.dtype, *inputs: torch.Tensor | float) -> list[torch.Tensor]:
    """The inputs with Python numbers as 0-dim tensors, of the dtype that interiors of a result of `dtype` have."""
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    held = torch.promote_types(dtype, torch.float32)
    # By way of float64: a number beyond float32 is inf there, as it is in eager, and not an error.
    return [
        x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=torch.float64, device=device).to(held)
        for x in inputs
    ]


def result(dtype: torch.dtype, *inputs: torch.Tensor) -> torch.Tensor:
    """An empty result of an elementwise expression of the inputs, laid out as eager PyTorch lays it out."""
    first = inputs[0]
    if all(t.shape == first.shape and t.is_contiguous() for t in inputs):
        return torch.empty(first.shape, dtype=dtype, device=first.device)
    shape, strides = _eager_layout(*((t.shape, t.stride()) for t in inputs))
    return torch.empty_strided(shape, strides, dtype=dtype, device=first.device)


@functools.lru_cache(maxsize=4096)
def _eager_layout(*layouts: tuple[torch.Size, tuple[int, ...]]) -> tuple[torch.Size, tuple[int, ...]]:
    y = functools.reduce(torch.mul, (torch.empty_strided(*layout, device="meta") for layout in layouts))
    return y.shape, y.stride()


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


def walk(shape: torch.Size, tensors: Sequence[torch.Tensor], summed: Sequence[torch.Size] = ()) -> Walk:
    """Merge dims for a launch over `shape`.

    Args:
        shape: the broadcast shape.
        tensors: all that are read or written.
        summed: shapes that broadcast to `shape`, to which something is summed up.
    """
    if all(t.shape == shape and t.is_contiguous() for t in tensors) and all(s.numel() == 1 for s in summed):
        merged = [(tuple(d for d, size in enumerate(shape) if size != 1), shape.numel())]
    else:
        merged = _merge(shape, [_strides(t, shape) for t in tensors] + [_own(small, shape) for small in summed])
    while len(merged) < 2:
        merged.insert(0, ((), 1))
    sizes = tuple(size for _, size in merged)
    block, warps = _block(sizes[-2], sizes[-1], any(_sums(small, shape, merged[-2][0]) for small in summed))
    programs = -(-sizes[-2] // block[0]) * -(-sizes[-1] // block[1])
    for size in sizes[:-2]:
        programs *= size
    return Walk(sizes, tuple(dims for dims, _ in merged), block, warps, (programs,))


def _strides(t: torch.Tensor, shape: torch.Size) -> list[int]:
    """Strides of `t` expanded to `shape`: 0 where it does not move."""
    lead = len(shape) - t.dim()
    return [0] * lead + [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


def _own(small: torch.Size, shape: torch.Size) -> list[int]:
    """Strides of a contiguous tensor of shape `small`, expanded to `shape`: 0 only where it is broadcast."""
    strides, step = [0] * len(shape), 1
    for d in range(-1, -1 - len(small), -1):
        if small[d] > 1:
            strides[d] = step
            step *= small[d]
    return strides


def _merge(shape: torch.Size, strides: Sequence[Sequence[int]]) -> list[tuple[tuple[int, ...], int]]:
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


def _block(m: int, n: int, sums_rows: bool) -> tuple[tuple[int, int], int]:
    """(BLOCK_M, BLOCK_N) and warps.

    1024 elements in 4 warps are 8 a thread: one 128-bit access in bf16, two in fp32. A gradient summed over rows
    wants tall tiles, since every tile leaves one partial row: 1/64 of the elements here.
    """
    if sums_rows:
        return (min(64, _power_of_2(m)), min(64, _power_of_2(n))), 8
    if m == 1:
        return (1, min(1024, _power_of_2(n))), 4
    # Rows are cut where the last tile wastes the fewest lanes.
    block_n = min((1024, 512, 256), key=lambda b: (-(-n // b) * b, -b)) if n > 256 else _power_of_2(n)
    return (min(1024 // block_n, _power_of_2(m)), block_n), 4


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _merged_strides(way: Walk, strides: Sequence[int]) -> tuple[int | None, ...]:
    # The innermost dim of a merged group is the one whose stride the group walks with.
    return tuple((strides[dims[-1]] or None) if dims else None for dims in way.dims)


def operand(way: Walk, shape: torch.Size, t: torch.Tensor | None) -> Operand:
    """`t` as the kernels take it; None for an output that nobody wants."""
    return NOTHING if t is None else Operand(t, _merged_strides(way, _strides(t, shape)))


class Shares(NamedTuple):
    """Where the tiles of a walk leave their shares of a sum (or maximum): `rows` x `size` of them, to be reduced."""

    rows: int
    size: int
    strides: tuple[int | None, ...]
    tiles: tuple[int | None, ...]


def shares(way: Walk, shape: torch.Size, small: torch.Size) -> Shares:
    """One row of the small shape's size for each step along what is summed: no two programs write one element."""
    strides = list(_merged_strides(way, _own(small, shape)))
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


class Grad:
    """The gradient of one input: written by the kernel as it is, or as shares that `finish` adds up.

    Shares are of the interiors' dtype and added by one `torch.sum`: no atomics, the same bits at every run.
    """

    def __init__(self, x: torch.Tensor, shape: torch.Size, needed: bool) -> None:
        self.x, self.shape, self.needed = x, shape, needed
        self.is_summed = needed and x.numel() != shape.numel()
        self.tensor = torch.empty_like(x) if needed and not self.is_summed else None
        self.summed = [x.shape] if self.is_summed else []
        self.partial: torch.Tensor | None = None

    def operand(self, way: Walk, held: torch.dtype) -> Operand:
        """What the kernel writes to."""
        if not self.is_summed:
            return operand(way, self.shape, self.tensor)
        rows, size, strides, tiles = shares(way, self.shape, self.x.shape)
        self.partial = torch.empty((rows, size), dtype=held, device=self.x.device)
        return Operand(self.partial, strides, tiles)

    def finish(self) -> torch.Tensor | None:
        """The gradient, in the input's shape and dtype."""
        if not self.is_summed:
            return self.tensor
        if self.partial is None:  # nothing was launched: a sum of no elements
            return torch.zeros_like(self.x)
        return self.partial.sum(0).view(self.x.shape).to(self.x.dtype)


class Kept:
    """What a slot asked of a point: its gradient written where it will be read, and shares of statistics."""

    def __init__(
        self,
        op: str,
        slot: Slot,
        leaf: torch.Tensor | None,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slot, self.leaf, self.shape, self.dtype, self.device = slot, leaf, shape, dtype, device
        self.tensor, self.accumulate, self.returned, self.stats = slot.answer(op, shape, dtype, device)
        self.summed: list[torch.Size] = []
        self.partials: dict[str, torch.Tensor] = {}
        if self.stats is not None:
            self.small = self.stats.shape(shape)
            # Rows keep their dims where they are: the small shape must broadcast to the shape.
            self.summed = [torch.Size((*self.small, 1)) if self.stats.over == "rows" else self.small]

    def operand(self, way: Walk, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        ptr, strides, _ = operand(way, self.shape, self.tensor)
        if self.stats is None:
            return Retained(ptr, strides, 1 if self.accumulate else None, NO_STATS)
        rows, size, at, tiles = shares(way, self.shape, self.summed[0])
        for part in self.stats.parts:
            if part == "hist":
                self.partials[part] = torch.empty((*way.grid, HIST_BINS), dtype=torch.int32, device=self.device)
            elif part != "count":
                dtype = torch.int32 if part == "nonfinite" else held
                self.partials[part] = torch.empty((rows, size), dtype=dtype, device=self.device)
        return Retained(ptr, strides, None, Stats(**self.partials, strides=at, tiles=tiles))

    def finish(self) -> torch.Tensor | None:
        """Tell the slot what was written, once it is; the gradient to return to autograd for it."""
        self.slot.written()
        if self.stats is not None:
            like = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
            if not self.shape.numel():
                found = parts_of(self.stats.parts, self.stats.over, like, like)
                self.slot.merge(dict(zip(self.stats.parts, found, strict=True)), self.leaf)
            else:
                parts = {part: self._reduce(part) for part in self.partials}
                if "count" in self.stats.parts:
                    parts["count"] = count(like, self.stats.over)
                self.slot.merge(parts, self.leaf)
        return self.returned

    def _reduce(self, part: str) -> torch.Tensor:
        partial = self.partials[part]
        if part == "amax":
            return partial.amax(0).view(self.small)
        return partial.sum(0).view(HIST_BINS if part == "hist" else self.small)


def launch(kernel: Any, shape: torch.Size, dtype: torch.dtype, *operands: torch.Tensor | Grad | Kept | None) -> None:
    """Launch a kernel of the form kernel(*operands, SHAPE, DTYPE, BLOCK_M, BLOCK_N) over a broadcast shape.

    Args:
        kernel: the Triton kernel.
        shape: the shape that all operands broadcast to.
        dtype: the result's, which decides the dtype of interiors.
        *operands: in the kernel's order: tensors, gradients to write (`Grad`), points (`Kept`, or None where nobody
            asked).
    """
    if not shape.numel():
        return
    given = _apart(operands)
    tensors = [t for x in given if (t := x.tensor if isinstance(x, (Grad, Kept)) else x) is not None]
    summed = [small for x in given if isinstance(x, (Grad, Kept)) for small in x.summed]
    way = walk(shape, tensors, summed)
    held = torch.promote_types(dtype, torch.float32)
    args: list[Any] = []
    for x in given:
        if isinstance(x, (Grad, Kept)):
            args.append(x.operand(way, held))
        else:
            args.append(NOT_RETAINED if x is None else operand(way, shape, x))
    with on_device(tensors[0]):
        kernel[way.grid](
            *args, way.shape, tl.float64 if held == torch.float64 else tl.float32, *way.block, num_warps=way.warps
        )


def _apart(operands: Sequence[Any]) -> list[Any]:
    """The operands of a backward, with a copy of what an `Into` buffer shares memory with: programs would race."""
    buffers = [x.tensor for x in operands if isinstance(x, Kept) and x.tensor is not None and x.returned is None]
    return [
        x.clone() if isinstance(x, torch.Tensor) and any(share_memory(x, buffer) for buffer in buffers) else x
        for x in operands
    ]


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there, whatever the tensors say."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()
