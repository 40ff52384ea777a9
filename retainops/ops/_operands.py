"""What is handed to a pointwise kernel: inputs to read, gradients and points to write; and the launch itself."""

from __future__ import annotations

import contextlib
import ctypes
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from retainops.buffers import share_memory
from retainops.kernels.points import Retained, Stats
from retainops.kernels.tiles import Operand
from retainops.ops._saved import Unread
from retainops.ops._walk import Walk, merged_strides, own_strides, shares, strides_in, walk
from retainops.slots import Slot
from retainops.stats import HIST_BINS, count, parts_of

NOTHING = Operand(None, ())
NO_STATS = Stats()
NOT_RETAINED = Retained(None, (), None, NO_STATS)


class Seed(NamedTuple):
    """Uniform random numbers as an input: one for each element of a shape, from an int64 of 0 dims."""

    tensor: torch.Tensor
    shape: torch.Size


def operand(way: Walk, shape: torch.Size, x: Any) -> Operand:
    """An input, or an output (None: that nobody wants), as the kernels take it."""
    if x is None:
        return NOTHING
    if isinstance(x, Seed):
        return _random(way, merged_strides(way, own_strides(x.shape, shape)), x.tensor)
    if isinstance(x, Unread):
        return Operand(None, (), number=0.0)
    if isinstance(x, torch.Tensor):
        return Operand(x, merged_strides(way, strides_in(x, shape)))
    return Operand(None, (), number=ctypes.c_float(x).value)  # beyond float32 it is inf, as in eager


def _random(way: Walk, strides: tuple[int | None, ...], seed: torch.Tensor) -> Operand:
    """Random numbers; four at a time where each row of a tile starts at a multiple of four and is numbered in order."""
    *others, last = (s or 0 for s in strides)
    if last != 1 or way.block[1] % 4 or any(s % 4 for s in others):
        return Operand(None, strides, seed=seed)
    counters = tuple(s and s // 4 for s in strides[:-1])
    return Operand(None, (*counters, 1), seed=seed, quads=1)


class Grad:
    """The gradient of one input: written by the kernel as it is, or as shares that `finish` adds up.

    Shares are of the interiors' dtype and added by one `torch.sum`: no atomics, the same bits at every run.

    Args:
        x: the input.
        shape: the broadcast shape.
        needed: whether anybody wants it.
        tensor: where to write it, if it is not summed; default: a new tensor laid out as x.
        whole: what `tensor` is a part of.
    """

    def __init__(
        self,
        x: Any,
        shape: torch.Size,
        needed: bool,
        tensor: torch.Tensor | None = None,
        whole: torch.Tensor | None = None,
    ) -> None:
        self.x, self.shape, self.needed, self.whole = x, shape, needed, whole
        self.is_summed = needed and x.shape.numel() != shape.numel()
        self.tensor = (_empty_like(x) if tensor is None else tensor) if needed and not self.is_summed else None
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
        like = _empty_like(self.x)
        return self.sum().to(like.dtype) if self.partial is not None else like.zero_()

    def sum(self) -> torch.Tensor:
        """The shares added up, not yet rounded."""
        if self.partial is None:  # nothing was launched: a sum of no elements
            return torch.zeros(self.x.shape, device=self.x.device)
        return self.partial.sum(0).view(self.x.shape)


def _empty_like(x: torch.Tensor | Unread) -> torch.Tensor:
    return x.empty_like() if isinstance(x, Unread) else torch.empty_like(x)


class Kept:
    """What a slot asked of a point: its gradient written where it will be read, and shares of statistics.

    Args:
        op, slot: whose.
        leaf: the slot's leaf when the graph was made.
        broadcast: the shape that is walked, of as many elements; default: the leaf's.
    """

    def __init__(self, op: str, slot: Slot, leaf: torch.Tensor, broadcast: torch.Size | None = None) -> None:
        self.slot, self.leaf, self.broadcast = slot, leaf, broadcast or leaf.shape
        self.shape, self.dtype, self.device = leaf.shape, leaf.dtype, leaf.device
        self.tensor, self.accumulate, self.returned, self.stats = slot.answer(op, self.shape, self.dtype, self.device)
        self.summed: list[torch.Size] = []
        self.partials: dict[str, torch.Tensor] = {}
        if self.stats is not None:
            self.small = self.stats.shape(self.shape)
            # Rows keep their dims where they are: the small shape must broadcast to the shape.
            self.summed = [torch.Size((*self.small, 1)) if self.stats.over == "rows" else self.small]

    def operand(self, way: Walk, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        ptr, strides, *_ = operand(way, self.broadcast, self.tensor)
        if self.stats is None:
            return Retained(ptr, strides, 1 if self.accumulate else None, NO_STATS)
        rows, size, at, tiles = shares(way, self.broadcast, self.summed[0])
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


class KeptSum:
    """As `Kept`, of a point that is broadcast on its way to the output: its gradient is a sum, which comes first.

    Args:
        op, slot, leaf: as in `Kept`.
        shape: the broadcast shape.
        value: makes the point's value, for statistics that need it.
    """

    def __init__(
        self, op: str, slot: Slot, leaf: torch.Tensor, shape: torch.Size, value: Callable[[], torch.Tensor]
    ) -> None:
        self.op, self.slot, self.leaf, self.value = op, slot, leaf, value
        self.grad = Grad(leaf, shape, True)
        self.tensor, self.returned, self.summed = None, None, self.grad.summed

    def operand(self, way: Walk, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        ptr, strides, tiles, *_ = self.grad.operand(way, held)
        return Retained(ptr, strides, None, NO_STATS, tiles)

    def finish(self) -> torch.Tensor | None:
        """Hand the gradient to the slot; what to return to autograd for it."""
        value = self.value() if "act_grad" in self.slot.parts else None
        return self.slot.deposit(self.op, self.grad.sum(), value, self.leaf)


def launch(
    kernel: Any,
    shape: torch.Size,
    dtype: torch.dtype,
    *operands: Any,
    walked: Callable[..., Walk] | None = None,
    programs: Callable[[Walk], int] | None = None,
    **constants: Any,
) -> None:
    """Launch a kernel of the form kernel(*operands, SHAPE, DTYPE, BLOCK_M, BLOCK_N, **constants) over a shape.

    Args:
        kernel: the Triton kernel.
        shape: the shape that all operands broadcast to.
        dtype: the result's, which decides the dtype of interiors.
        *operands: in the kernel's order, each one or a tuple of them: what is read (tensors, numbers, `Seed`,
            `Unread`), gradients to write (`Grad`), points (`Kept`, `KeptSum`, or None where nobody asked).
        walked: how to walk the tensors, from what `walk` takes; default: `walk`.
        programs: how many programs a walk is shared by; default: each tile has its own.
        **constants: the kernel's own.
    """
    if not shape.numel():
        return
    held = torch.promote_types(dtype, torch.float32)
    device = next(x.device for x in _flat(operands) if isinstance(x, (torch.Tensor, Unread)))
    given = _apart(operands)
    if held == torch.float64:  # Triton passes numbers as float32
        given = _each(given, lambda x: _tensor(x, held, device) if isinstance(x, numbers.Real) else x)
    flat = _flat(given)
    written = [x for x in flat if hasattr(x, "operand")]
    tensors = [t for x in flat if isinstance(t := getattr(x, "tensor", x), torch.Tensor) and not isinstance(x, Seed)]
    summed = [small for x in written for small in x.summed]
    gradients = [small for x in written if isinstance(x, Grad) for small in x.summed]
    numbered = [x.shape for x in flat if isinstance(x, Seed)]
    way = (walked or walk)(shape, tensors, summed, numbered, gradients)

    def passed(x: Any) -> Any:
        if hasattr(x, "operand"):
            return x.operand(way, held)
        return NOT_RETAINED if x is None else operand(way, shape, x)

    with on_device(device):
        kernel[(programs(way),) if programs else way.grid](
            *_each(given, passed),
            way.shape,
            tl.float64 if held == torch.float64 else tl.float32,
            *way.block,
            **constants,
            num_warps=way.warps,
        )


def triton_dtype(x: torch.Tensor) -> tl.dtype:
    """A tensor's dtype, as a constant of a kernel."""
    return getattr(tl, str(x.dtype).removeprefix("torch."))


def _tensor(x: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((), x, dtype=dtype, device=device)


def _flat(operands: Sequence[Any]) -> list[Any]:
    return [x for group in operands for x in (group if type(group) is tuple else (group,))]


def _each(operands: Sequence[Any], change: Callable[[Any], Any]) -> tuple[Any, ...]:
    return tuple(tuple(map(change, x)) if type(x) is tuple else change(x) for x in operands)


def _apart(operands: Sequence[Any]) -> Sequence[Any]:
    """The operands of a backward, with a copy of what an `Into` buffer shares memory with: programs would race."""
    kept = [x for x in _flat(operands) if isinstance(x, Kept)]
    buffers = [x.tensor for x in kept if x.tensor is not None and x.returned is None]
    if not buffers:
        return operands

    def apart(x: Any) -> Any:
        shared = isinstance(x, torch.Tensor) and any(share_memory(x, buffer) for buffer in buffers)
        return x.clone() if shared else x

    return _each(operands, apart)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one: Triton launches there, whatever the tensors say."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
