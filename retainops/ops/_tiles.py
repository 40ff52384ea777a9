"""The host side of kernels/tiles.py: from tensors of any layout to operands, tiles and a grid."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from retainops.kernels.tiles import Operand, Retained
from retainops.slots import Answer

NOTHING = Operand(None, ())
NOT_RETAINED = Retained(None, (), None)


def tensors(dtype: torch.dtype, *inputs: torch.Tensor | float) -> list[torch.Tensor]:
    """The inputs with Python numbers as 0-dim tensors, of the dtype that interiors of a result of `dtype` have."""
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
    held = torch.promote_types(dtype, torch.float32)
    return [x if isinstance(x, torch.Tensor) else torch.full((), x, dtype=held, device=device) for x in inputs]


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


def walk(shape: torch.Size, tensors: Sequence[torch.Tensor], summed: Sequence[torch.Tensor] = ()) -> Walk:
    """Merge dims for a launch over `shape`.

    Args:
        shape: the broadcast shape.
        tensors: all that are read or written.
        summed: those inputs among `tensors` whose gradient is summed over broadcast dims.
    """
    if all(t.shape == shape and t.is_contiguous() for t in tensors):
        merged = [(tuple(d for d, size in enumerate(shape) if size != 1), shape.numel())]
    else:
        merged = _merge(shape, [_strides(t, shape) for t in tensors] + [_own(t, shape) for t in summed])
    while len(merged) < 2:
        merged.insert(0, ((), 1))
    sizes = tuple(size for _, size in merged)
    block, warps = _block(sizes[-2], sizes[-1], any(_sums(t, shape, merged[-2][0]) for t in summed))
    programs = -(-sizes[-2] // block[0]) * -(-sizes[-1] // block[1])
    for size in sizes[:-2]:
        programs *= size
    return Walk(sizes, tuple(dims for dims, _ in merged), block, warps, (programs,))


def _strides(t: torch.Tensor, shape: torch.Size) -> list[int]:
    """Strides of `t` expanded to `shape`: 0 where it does not move."""
    lead = len(shape) - t.dim()
    return [0] * lead + [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


def _own(t: torch.Tensor, shape: torch.Size) -> list[int]:
    """Strides of a contiguous gradient of `t`, expanded: 0 only where it is summed."""
    strides, step = [0] * len(shape), 1
    for d in range(-1, -1 - t.dim(), -1):
        if t.shape[d] > 1:
            strides[d] = step
            step *= t.shape[d]
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


def _sums(t: torch.Tensor, shape: torch.Size, dims: tuple[int, ...]) -> bool:
    """Whether the gradient of `t` is summed over these dims."""
    return bool(dims) and all(d < len(shape) - t.dim() or t.shape[d - len(shape)] == 1 for d in dims)


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


def retained(way: Walk, shape: torch.Size, answer: Answer) -> Retained:
    """Where a retained gradient goes, as the kernels take it."""
    t = operand(way, shape, answer.tensor)
    return Retained(t.ptr, t.strides, 1 if answer.accumulate else None)


class Grad:
    """The gradient of one input: written by the kernel as it is, or as partial sums that `finish` adds up.

    Partials are fp32 (fp64 for fp64), one row of the input's size for each tile along the summed dims, added by one
    `torch.sum`: no atomics, the same bits at every run.
    """

    def __init__(self, x: torch.Tensor, shape: torch.Size, needed: bool) -> None:
        self.x, self.shape, self.needed = x, shape, needed
        self.is_summed = needed and x.numel() != shape.numel()
        self.out = torch.empty_like(x) if needed and not self.is_summed else None

    def operand(self, way: Walk, dtype: torch.dtype) -> Operand:
        """What the kernel writes to; partial sums are of this dtype."""
        if self.out is not None or not self.needed:
            return operand(way, self.shape, self.out)
        strides = list(_merged_strides(way, _own(self.x, self.shape)))
        tiles: list[int | None] = [None, None]
        rows, size = 1, self.x.numel()
        for d, dims in enumerate(way.dims):
            if not _sums(self.x, self.shape, dims):
                continue
            from_end = d - len(way.dims)
            if from_end >= -2:
                tiles[from_end] = rows * size
                rows *= -(-way.shape[d] // way.block[from_end])
            else:
                strides[d] = rows * size
                rows *= way.shape[d]
        self.partial = torch.empty((rows, size), dtype=dtype, device=self.x.device)
        return Operand(self.partial, tuple(strides), tuple(tiles))

    def finish(self) -> torch.Tensor | None:
        """The gradient, in the input's shape and dtype."""
        if not self.is_summed:
            return self.out
        return self.partial.sum(0).view(self.x.shape).to(self.x.dtype)


def launch(kernel: Any, shape: torch.Size, dtype: torch.dtype, *operands: torch.Tensor | Grad | Answer | None) -> None:
    """Launch a kernel of the form kernel(*operands, SHAPE, DTYPE, BLOCK_M, BLOCK_N) over a broadcast shape.

    Args:
        kernel: the Triton kernel.
        shape: the shape that all operands broadcast to.
        dtype: the result's, which decides the dtype of interiors.
        *operands: in the kernel's order: tensors, gradients to write (`Grad`), retained gradients (`Answer`, or None
            where nobody asked).
    """
    tensors = [t for x in operands if (t := _tensor_of(x)) is not None]
    summed = [x.x for x in operands if isinstance(x, Grad) and x.is_summed]
    if not shape.numel():
        for x in operands:
            if isinstance(x, Grad) and x.is_summed:
                x.partial = torch.zeros((1, x.x.numel()), dtype=torch.float32, device=x.x.device)
        return
    way = walk(shape, tensors, summed)
    args: list[Any] = []
    for x in operands:
        if isinstance(x, Grad):
            args.append(x.operand(way, torch.promote_types(dtype, torch.float32)))
        elif isinstance(x, Answer):
            args.append(retained(way, shape, x))
        else:
            args.append(NOT_RETAINED if x is None else operand(way, shape, x))
    held = tl.float64 if dtype == torch.float64 else tl.float32
    with on_device(tensors[0]):
        kernel[way.grid](*args, way.shape, held, *way.block, num_warps=way.warps)


def _tensor_of(x: torch.Tensor | Grad | Answer | None) -> torch.Tensor | None:
    if isinstance(x, Grad):
        return x.out
    return x.tensor if isinstance(x, Answer) else x


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there, whatever the tensors say."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()
