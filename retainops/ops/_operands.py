"""What is handed to a kernel: inputs to read, gradients and points to write.

Most of an argument follows from the layouts of the tensors alone: its *place*, which is worked out once for each `key`.
What is left to do at every launch is to put the pointers in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch

from retainops.kernels.points import Retained, Stats
from retainops.kernels.tiles import Operand
from retainops.ops._saved import Unread
from retainops.ops._walk import Walk, merged_strides, own_strides, shares, strides_in
from retainops.slots import Slot
from retainops.stats import HIST_BINS, Part, Shared, count, parts_of
from retainops.stats import Stats as Asked

NOTHING = Operand(None, ())
ZERO = Operand(None, (), number=0.0)
NO_STATS = Stats()
NOT_RETAINED = Retained(None, (), None, NO_STATS)


listener: ContextVar[Any] = ContextVar("retainops_listener", default=None)
"""Is told of launches, and of what slots are given: `_replay.Notes`, or None."""
ALIGNED = 16
"""Bytes: Triton compiles a kernel for pointers that divide by this, and another one for others."""


def layout_of(x: torch.Tensor) -> Hashable:
    """All that a launch depends on of a tensor in its memory."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED == 0


class Seed(NamedTuple):
    """Uniform random numbers as an input: one for each element of a shape, from an int64 of 0 dims."""

    tensor: torch.Tensor
    shape: torch.Size

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.shape, self.tensor.data_ptr() % ALIGNED == 0

    def place(self, way: Walk, shape: torch.Size) -> tuple[Any, ...]:
        """Strides; and 1 for numbers four at a time: where each row of a tile starts at a multiple of four."""
        strides = merged_strides(way, own_strides(self.shape, shape))
        *others, last = (s or 0 for s in strides)
        if last != 1 or way.block[1] % 4 or any(s % 4 for s in others):
            return strides, None
        return (*(s and s // 4 for s in strides[:-1]), 1), 1

    def operand(self, place: tuple[Any, ...], held: torch.dtype) -> Operand:
        """What the kernel takes."""
        strides, quads = place
        return Operand(None, strides, seed=self.tensor, quads=quads)


def key_of(x: Any) -> Hashable:
    """What an operand's argument depends on, besides pointers and numbers."""
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNED == 0
    if hasattr(x, "place"):
        return cast(Hashable, x.key())
    return layout_of(x) if isinstance(x, torch.Tensor) else cast(Hashable, kind)


def maker_of(way: Walk, shape: torch.Size, x: Any, held: torch.dtype) -> Callable[[Any], Any]:
    """What makes the kernel's argument of an operand of this key, as the kernel walks over the shape."""
    if isinstance(x, torch.Tensor):
        place = strides_of(way, shape, x)
        return lambda x: Operand(x, place)
    if hasattr(x, "place"):
        place = x.place(way, shape)
        return lambda x: x.operand(place, held)
    if x is None:  # an input that is not there, an output that nobody wants, a point that nobody asked for
        return lambda x: NOT_RETAINED
    if isinstance(x, Unread):
        return lambda x: ZERO
    return lambda x: Operand(None, (), number=ctypes.c_float(x).value)  # beyond float32 it is inf, as in eager


def strides_of(way: Walk, shape: torch.Size, x: torch.Tensor) -> tuple[int | None, ...]:
    """A tensor's strides as the kernel walks over the shape."""
    return merged_strides(way, strides_in(x, shape))


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

    def key(self) -> Hashable:
        """All that its place depends on."""
        if self.is_summed:
            return self.x.shape
        return None if self.tensor is None else layout_of(self.tensor)

    def place(self, way: Walk, shape: torch.Size) -> Any:
        """What its argument is, besides pointers."""
        if self.is_summed:
            return shares(way, self.shape, self.x.shape)
        return None if self.tensor is None else strides_of(way, self.shape, self.tensor)

    def operand(self, place: Any, held: torch.dtype) -> Operand:
        """What the kernel writes to."""
        if not self.is_summed:
            return NOTHING if self.tensor is None else Operand(self.tensor, place)
        rows, size, strides, tiles = place
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
            held = torch.promote_types(self.x.dtype, torch.float32)
            return torch.zeros(self.x.shape, dtype=held, device=self.x.device)
        return self.partial.sum(0).view(self.x.shape)


def gradients(
    inputs: Sequence[Any], shape: torch.Size, needed: Sequence[bool]
) -> tuple[Grad | torch.Tensor | None, ...]:
    """Where a kernel that walks over the shape writes the gradients of inputs: to new tensors where none is a sum.

    Where one is, each is a `Grad`: points may then take a launch of their own, which leaves these out.
    """
    pairs = list(zip(inputs, needed, strict=False))
    if any(need and x.shape.numel() != shape.numel() for x, need in pairs):
        return tuple([Grad(x, shape, True) if need else None for x, need in pairs])
    return tuple([_empty_like(x) if need else None for x, need in pairs])


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
        if listening := listener.get():
            listening.arrives(slot)
        self.tensor, self.accumulate, self.returned, self.stats = slot.answer(op, self.shape, self.dtype, self.device)
        self.is_into = self.tensor is not None and self.returned is None
        self.summed: Sequence[torch.Size] = ()
        if self.stats is not None:
            self.partials: dict[str, torch.Tensor] = {}
            self.small = self.stats.shape(self.shape)
            # Rows keep their dims where they are: the small shape must broadcast to the shape.
            self.summed = [torch.Size((*self.small, 1)) if self.stats.over == "rows" else self.small]

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> None:
        """Be walked over with one dim as two."""
        self.tensor = None if self.tensor is None else self.tensor.unflatten(dim, sizes)
        self.broadcast = torch.Size((*self.shape[:dim], *sizes, *self.shape[dim + 1 :]))
        if self.stats is not None and self.stats.over == "rows":
            self.summed = [torch.Size((*small[:dim], *sizes, *small[dim + 1 :])) for small in self.summed]

    def key(self) -> Hashable:
        """All that its place depends on."""
        stats = self.stats and (self.stats.parts, self.stats.over)
        layout = self.tensor is not None and layout_of(self.tensor)
        return self.shape, self.broadcast, self.dtype, layout, self.is_into, self.accumulate, stats

    def place(self, way: Walk, shape: torch.Size) -> Any:
        """Strides of the gradient, where shares of statistics go, and how many tiles there are."""
        strides = () if self.tensor is None else strides_of(way, self.broadcast, self.tensor)
        if self.stats is None:
            return strides, None, None, (None, None)
        sums, tiles = shares(way, self.broadcast, self.summed[0]), way.grid[0]
        by_warp = sums.size == 1 and sums.rows == tiles and way.block[0] == 1 and way.warps in (2, 4)
        # Two accesses of each of 32 lanes; of float64 it takes more, and the trick fails.
        if not by_warp or way.block[1] < 64 * way.warps or self.dtype == torch.float64:
            return strides, sums, tiles, (None, None)
        return strides, sums._replace(rows=tiles * way.warps), tiles, (1, 1 if way.warps == 2 else None)

    def operand(self, place: Any, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        strides, sums, grid, (by_warp, two_warps) = place
        if sums is None or self.stats is None:
            return Retained(self.tensor, strides, 1 if self.accumulate else None, NO_STATS)
        rows, size, at, tiles = sums
        for part in self.stats.parts:
            if part == "hist":
                self.partials[part] = torch.empty((grid, HIST_BINS), dtype=torch.int32, device=self.device)
            elif part != "count":
                dtype = torch.int32 if part == "nonfinite" else held
                self.partials[part] = torch.empty((rows, size), dtype=dtype, device=self.device)
        half = 1 if "nonfinite" in self.partials and self.dtype == torch.float16 else None
        stats = Stats(**self.partials, half=half, strides=at, tiles=tiles, by_warp=by_warp, two_warps=two_warps)
        return Retained(self.tensor, strides, None, stats)

    def finish(self) -> torch.Tensor | None:
        """Tell the slot what was written, once it is; the gradient to return to autograd for it."""
        self.slot.written()
        if self.stats is not None:
            if listening := listener.get():
                listening.merge(self.slot, self._parts(self.stats), self.leaf)
            else:
                self.slot.merge(self._parts(self.stats), self.leaf)
        return self.returned

    def _parts(self, stats: Asked) -> dict[str, Part]:
        like = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        if not self.shape.numel():
            return dict(zip(stats.parts, parts_of(stats.parts, stats.over, like, like), strict=True))
        parts = {name: self._part(name, shares) for name, shares in self.partials.items()}
        if "count" in stats.parts:
            parts["count"] = count(like, stats.over)
        return parts

    def _part(self, name: str, shares: torch.Tensor) -> Part:
        """One number is put together when somebody reads it; more of them now, for their shares take memory."""
        part = Shared(name, shares, self._shape(name))
        return part if shares.shape[1] == 1 else part.total()

    def _shape(self, part: str) -> torch.Size:
        return torch.Size([HIST_BINS]) if part == "hist" else self.small


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
        self.tensor, self.returned, self.summed, self.is_into = None, None, self.grad.summed, False

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.grad.key()

    def place(self, way: Walk, shape: torch.Size) -> Any:
        """What its argument is, besides pointers."""
        return self.grad.place(way, shape)

    def operand(self, place: Any, held: torch.dtype) -> Retained:
        """What the kernel writes to."""
        ptr, strides, tiles, *_ = self.grad.operand(place, held)
        return Retained(ptr, strides, None, NO_STATS, tiles)

    def finish(self) -> torch.Tensor | None:
        """Hand the gradient to the slot; what to return to autograd for it."""
        if (listening := listener.get()) and self.slot.want is not None:
            listening.are_whole = False  # the slot reduces the gradient, which is its own affair
        elif listening:
            listening.arrives(self.slot)
        value = self.value() if "act_grad" in self.slot.parts else None
        return self.slot.deposit(self.op, self.grad.sum(), value, self.leaf)
