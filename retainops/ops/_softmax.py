"""How softmax and log_softmax run on their kernels, and what they take."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from retainops.arrivals import last_first
from retainops.dispatch import HAS_TRITON
from retainops.ops._check import is_number, is_stand_in
from retainops.ops._plan import Plan
from retainops.registry import Op
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import softmax as kernels
    from retainops.kernels.tiles import Operand
    from retainops.ops._launch import launch
    from retainops.ops._operands import Grad, Kept
    from retainops.ops._rows import ALIGNED, Tiling, covers, in_tiles, row_tiles
    from retainops.ops._saved import Unread
    from retainops.ops._walk import Walk, merged_strides, strides_in

    ROWS = Tiling(widest=16384, elements=2048, chunk=4096, a_thread=32)
    # Wider rows are read twice, the second time from the cache if they all fit: few programs, each of many warps.
    FORWARD_OF_WIDE = Tiling(widest=32768, elements=2048, chunk=16384, a_thread=32)
    WIDE = ROWS._replace(chunk=16384)
    WIDEST = ROWS._replace(chunk=32768)

Tensor = torch.Tensor


def tiling_of(n: int, dtype: torch.dtype, forward: bool, masked: bool) -> Tiling:
    """How rows of n are cut. It depends on nothing that is asked for: another cut is another order of sums."""
    held = torch.promote_types(dtype, torch.float32)
    if masked or n % ALIGNED or held == torch.float64:
        return ROWS.held_in(held)
    if n <= FORWARD_OF_WIDE.widest:
        return FORWARD_OF_WIDE if forward else WIDE
    return WIDEST if forward == (dtype.itemsize == 4) else WIDE


class Softmax:
    """softmax or log_softmax on its kernels, whose backward reads the output, and a boolean mask, alone.

    For second derivatives too the output stands in the place of x: the reference is then the linear function with the
    same gradient. Its coefficients are the output's, so the gradient with respect to them flows on to x.

    Args:
        log: log_softmax.
        keeps_x: keep x besides, and differentiate the definition itself. So it must be where the point p is asked for:
            nothing may flow into the output as a coefficient then, for all that arrives there is the gradient of p.
    """

    def __init__(self, log: bool, keeps_x: bool = False) -> None:
        self.log, self.keeps_x = log, keeps_x

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        x, scale, mask, causal, _ = inputs
        if values or self.keeps_x:
            return inputs
        return Unread(x), scale, mask if mask is None or is_boolean(mask) else Unread(mask), causal, outputs[0]

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor, ...]:
        x, scale, mask, causal, _ = inputs
        y, queries = layout.empty(), Queries(x.shape) if causal else None
        self._launch(kernels.softmax_fwd_kernel, (x, mask, queries, float(scale)), y)
        return y, y

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        x, scale, mask, causal, _, y = inputs
        dx, dmask = Grad(x, x.shape, needed[0]), Grad(mask, x.shape, needed[2])
        grads: tuple[Grad | None, Grad | None] = dx, dmask
        bwd = kernels.softmax_bwd_kernel
        kept = {name: Kept(op.name, slots[name], leaves[name]) for name in last_first(leaves)}
        read, queries = mask if is_boolean(mask) else None, Queries(x.shape) if causal else None
        places = None if queries is None else queries.tensor
        own = [t for t in (y, dys[0], dx.tensor, dmask.tensor, read, places) if t is not None]
        alone, points = (Unread(x) if isinstance(x, Tensor) else x, read), (kept.get("scaled"), kept.get("p"))
        if "scaled" not in kept or "act_grad" not in slots["scaled"].parts:  # only that needs the value of scaled
            x, mask = alone
        elif dmask.is_summed:  # in an order that what else is read must not change
            self._launch(bwd, (*alone, queries, float(scale)), y, dys[0], *grads, None, None, own=own)
            grads = None, None
        self._launch(bwd, (x, mask, queries, float(scale)), y, dys[0], *grads, *points, own=own)
        found = (kept[p.name].finish() if p.name in kept else None for p in op.points)
        return [dx.finish(), None, dmask.finish(), None, None, *found]

    def _launch(
        self, kernel: Any, given: tuple[Any, ...], y: Tensor, *others: Any, own: Sequence[Tensor] | None = None
    ) -> None:
        """Launch a kernel of (x, mask, queries, scale), y and others; `own` as of `_walked`."""
        x, mask, queries, _ = given
        forward = kernel is kernels.softmax_fwd_kernel
        # In backward a mask that is added is there only if values are asked for, and must make no difference.
        masked = queries is not None or (mask is not None if forward else is_boolean(mask))
        tiling = tiling_of(x.shape[-1], y.dtype, forward, masked)
        launch(
            kernel,
            x.shape,
            y.dtype,
            *(*given, y, *others),
            walked=functools.partial(_walked, tiling, own),
            programs=row_tiles,
            BOOLEAN=is_boolean(mask),
            CAUSAL=queries is not None,
            LOG=self.log,
            CHUNKED=x.shape[-1] > tiling.widest,
            WHOLE=covers,
        )


class Queries:
    """The place of each row among the queries: an operand without memory, whose offsets are the places."""

    summed = ()

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.tensor = torch.empty(shape[-2], 1, device="meta")

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.shape

    def place(self, way: Walk, shape: torch.Size) -> tuple[int | None, ...]:
        """Strides."""
        return merged_strides(way, strides_in(self.tensor, self.shape))

    def operand(self, place: tuple[int | None, ...], held: torch.dtype) -> Operand:
        """What the kernel takes."""
        return Operand(None, place)


def _walked(
    tiling: Tiling,
    own: Sequence[Tensor] | None,
    shape: torch.Size,
    tensors: Sequence[Tensor],
    summed: Sequence[torch.Size],
    _: Sequence[torch.Size],
    gradients: Sequence[torch.Size],
) -> Walk:
    """Rows, with dims kept apart in which something is summed.

    `own` are the tensors that there are whatever is retained, if not all. They alone choose the tiles: so retention
    changes no order of summation.
    """

    def walk(tensors: Sequence[Tensor], smalls: Sequence[torch.Size]) -> Walk:
        return tiling.walk(shape, [*tensors, *(torch.empty(small, device="meta") for small in smalls)])

    way = walk(tensors, summed)
    return way if own is None else in_tiles(way, walk(own, gradients))


def is_boolean(mask: Any) -> bool:
    """Whether a mask says what takes part, and is not added."""
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


def check(op: str, x: Any, scale: Any, mask: Any, causal: Any) -> None:
    """Inputs of softmax.

    It holds in compiled code too: the definition, traced, would take a dim for a scale, and any mask.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: a shape or device that does not go with x's.
    """
    if any(is_stand_in(t) for t in (x, scale, mask)):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}; expected a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x is {x.dtype}; expected a floating-point tensor: convert it with .float()")
    _check_scale(op, x, scale)
    if mask is not None:
        _check_mask(op, x, mask)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal is {type(causal).__name__}; expected True or False")
    if causal and x.dim() < 2:
        raise RuntimeError(f"{op}: causal=True, and x has shape {tuple(x.shape)}; expected (..., queries, keys)")


def _check_scale(op: str, x: Tensor, scale: Any) -> None:
    if isinstance(scale, Tensor):
        if scale.dim() or not scale.is_floating_point():
            raise RuntimeError(
                f"{op}: scale is a tensor of shape {tuple(scale.shape)} and {scale.dtype}; expected a number, or a "
                "floating-point tensor of no dims; multiply x by others beforehand"
            )
    elif not is_number(scale):
        raise TypeError(f"{op}: scale is {type(scale).__name__}; expected a number, such as 0.125")
    elif isinstance(scale, int) and scale < 1:
        raise TypeError(
            f"{op}: scale is the integer {scale}, as if it were a dim; {op} is over the last dim and takes no dim; if "
            f"it is a scale, write {float(scale)}"
        )


def _check_mask(op: str, x: Tensor, mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask is {type(mask).__name__}; expected a torch.Tensor or None")
    if not is_boolean(mask) and not mask.is_floating_point():
        raise TypeError(
            f"{op}: mask is {mask.dtype}; expected torch.bool (True: takes part), or floating point, which is added; "
            "convert it with .bool()"
        )
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(
            f"{op}: mask has shape {tuple(mask.shape)}, and x has {tuple(x.shape)}; expected a mask that broadcasts to "
            "x: aligned from the right, each of its sizes is x's or 1"
        )
    if mask.device != x.device:
        raise RuntimeError(f"{op}: mask is on {mask.device} and x on {x.device}; move one of them with .to(device)")
