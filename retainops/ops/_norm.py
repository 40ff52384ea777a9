"""The norms over the last dim on their kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops.arrivals import last_first
from retainops.dispatch import HAS_TRITON
from retainops.ops import _fused
from retainops.ops._plan import Plan
from retainops.ops._saved import Unread
from retainops.registry import Op
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import norm as kernels
    from retainops.ops._launch import launch, triton_dtype
    from retainops.ops._operands import Grad, Kept
    from retainops.ops._rows import ALIGNED, Dense, Statistics, Tiling, covers, row_chunks, row_tiles
    from retainops.ops._shares import Shares, sums

    # What fits into registers: in forward x (of a sum also r), in backward also dy, the weights and their gradients.
    FORWARD = Tiling(widest=8192, elements=2048, chunk=16384, a_thread=32)
    FORWARD_OF_WIDE = Tiling(widest=16384, elements=16384, chunk=16384, a_thread=64)
    FORWARD_OF_WIDER = Tiling(widest=32768, elements=32768, chunk=16384, a_thread=32)  # in 32 warps, of 64 registers
    FORWARD_IN_CHUNKS = Tiling(widest=0, elements=8192, chunk=8192, a_thread=16)
    # In 32 warps of more than 32 registers: a program has a multiprocessor to itself.
    FORWARD_IN_CHUNKS_ALONE = FORWARD_IN_CHUNKS._replace(a_thread=8)
    FORWARD_IN_LONG_CHUNKS_ALONE = FORWARD_IN_CHUNKS._replace(elements=16384, chunk=16384)
    FORWARD_IN_EIGHTS = Tiling(widest=1024, elements=1024, chunk=1024, a_thread=8)
    FORWARD_UNALIGNED = Tiling(widest=8192, elements=2048, chunk=4096, a_thread=32)
    FORWARD_UNALIGNED_IN_CHUNKS = Tiling(widest=0, elements=4096, chunk=4096)
    BACKWARD = Tiling(widest=4096, elements=4096, chunk=2048)
    BACKWARD_IN_4_WARPS = BACKWARD._replace(a_thread=32)
    BACKWARD_OF_WIDE = Tiling(widest=8192, elements=8192, chunk=2048, a_thread=32)
    TALL = Tiling(widest=64, elements=4096, chunk=64)
    PROJECTIONS = Tiling(widest=0, elements=4096, chunk=4096)

Tensor = torch.Tensor
ROW_OF_TWO = 128 * 1024
"""Bytes of a row that is read twice, up to which a multiprocessor may work on two: the L2 holds those of all."""


def forward_tiling(n: int, x: torch.dtype, held: torch.dtype, centred: bool, residual: bool) -> Tiling:
    """How forward cuts rows of n: as was fastest on an H200, but for chunks (docs/performance.md)."""
    if n % ALIGNED:
        whole = FORWARD_UNALIGNED.held_in(held)
        return whole if n <= whole.widest else FORWARD_UNALIGNED_IN_CHUNKS.held_in(held)
    if 512 < n <= 1024 and x == torch.float32 and centred and not residual:
        return FORWARD_IN_EIGHTS
    simple = not (centred or residual) and held == torch.float32  # x and a weight are all that it has in hand
    fitting = (FORWARD, FORWARD_OF_WIDE, *([FORWARD_OF_WIDER] if simple else []))
    # With means, too, a thread of 16 elements takes more than the 64 registers of which two programs have room.
    two = n * x.itemsize * (1 + residual) <= ROW_OF_TWO and not centred
    one = FORWARD_IN_CHUNKS_ALONE if centred or residual else FORWARD_IN_LONG_CHUNKS_ALONE
    chunks = FORWARD_IN_CHUNKS if two else one
    return next((t for tiling in fitting if n <= (t := tiling.held_in(held)).widest), chunks.held_in(held))


def backward_tiling(n: int, x: torch.dtype, held: torch.dtype, centred: bool) -> Tiling:
    """How backward cuts rows of n.

    It depends on nothing that is asked for: another cut is another order of sums. And on nothing that a launch is not
    looked up by: without a gradient of the sum, that of a norm and of a norm of a sum are one.
    """
    narrow, wide = BACKWARD.held_in(held), BACKWARD_OF_WIDE.held_in(held)
    if n % ALIGNED:
        return narrow
    short = x.itemsize == 2
    if (centred or short) and 512 < n <= (2048 if centred and short else 1024) and held == torch.float32:
        return BACKWARD_IN_4_WARPS
    return wide if narrow.widest < n <= wide.widest else narrow


class Norm:
    """A norm on its kernels.

    Args:
        centred: layer norm; otherwise root mean square norm.
        residual: of a sum, whose second part is the second input.
    """

    def __init__(self, centred: bool, residual: bool) -> None:
        self.centred, self.residual = centred, residual

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        # The sum stands for both of its parts: all derivatives depend on it alone. On a bias none depends.
        kept = [self.sum_of(inputs, outputs[1]), Unread(inputs[1]), *inputs[2:]] if self.residual else list(inputs)
        if self.centred:
            at = self.parts(range(len(inputs)))[3]
            kept[at] = Unread.of(inputs[at])
        return kept

    @staticmethod
    def sum_of(inputs: Sequence[Any], summed: Tensor | None) -> Tensor | None:
        """The sum, as a constant where both of its parts are: otherwise second derivatives come back by this output."""
        return summed if summed is None or any(x.requires_grad for x in inputs[:2]) else summed.detach()

    def parts(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """(x, residual, weight, bias, eps, offset, round_first), None or 0 for what this norm has not."""
        x, residual, *rest = inputs if self.residual else (inputs[0], None, *inputs[1:])
        if self.centred:
            weight, bias, eps, *_ = rest
            return x, residual, weight, bias, eps, 0.0, False
        weight, eps, offset, round_first, *_ = rest
        return x, residual, weight, None, eps, offset, round_first

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, eps, offset, round_first = self.parts(inputs)
        outputs = tuple(layout.empty(i) for i in range(len(layout.outputs)))
        summed, held, n = outputs[1] if self.residual else None, layout.points["xhat"][1], x.shape[-1]
        rstd = torch.empty((*x.shape[:-1], 1), dtype=held, device=x.device)
        mean = torch.empty_like(rstd) if self.centred else None
        tiling = forward_tiling(n, x.dtype, held, self.centred, self.residual)
        launch(
            kernels.norm_fwd_kernel,
            x.shape,
            held,
            *(x, residual, weight, bias, summed, outputs[0], mean, rstd, float(eps), float(offset)),
            walked=tiling.walk,
            programs=row_tiles,
            ROUND=triton_dtype(outputs[-1] if self.residual else x) if round_first else None,
            CHUNKED=n > tiling.widest,
            WHOLE=covers,
            STAGES=tiling.stages(n, x, residual),
        )
        return *outputs, mean, rstd

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        *given, mean, rstd = inputs
        if dys[0] is None:  # of a sum: nothing of the norm is differentiated
            return self.through_reference(op, given, needed, slots, leaves, dys)
        x, _, weight, bias, *_ = self.parts(given)
        _, _, needs_weight, needs_bias, *_ = self.parts(needed)
        kept = {name: Kept(op.name, slots[name], leaves[name]) for name in last_first(leaves)}
        tiling = backward_tiling(x.shape[-1], x.dtype, rstd.dtype, self.centred)
        needs_dx = any(needed[: 1 + self.residual])
        dx = Grad(x, x.shape, needs_dx)
        shares = functools.partial(Shares, programs=lambda way: tiling.walkers(x.device, way) // row_chunks(way))
        dw, db = shares(weight, needs_weight), shares(bias, needs_bias)
        later = self.takes_later(x, kept)
        points = {name: Dense(k) if name in later else k for name, k in kept.items()}
        self.launch_backward(given, mean, rstd, dys, (dx if needs_dx else None, dw, db), points, tiling)
        if later:
            statistics = {name: Statistics(kept[name]) for name in later}
            self.launch_backward(given, mean, rstd, dys, (None, None, None), statistics, TALL.held_in(rstd.dtype))
        x_at, residual_at, weight_at, bias_at, *_ = self.parts(range(len(given)))
        dweight, dbias = sums(dw, db)
        grads = {x_at: dx.finish(), weight_at: dweight, bias_at: dbias}
        grads[residual_at] = grads[x_at]
        found = (kept[p.name].finish() if p.name in kept else None for p in op.points)
        return [*(grads.get(i) for i in range(len(given))), *found]

    def takes_later(self, x: Tensor, kept: Mapping[str, Kept]) -> set[str]:
        """The points whose statistics take a launch of their own.

        Over channels a tile leaves a share for each column, and there are too many tiles of few rows. And with most of
        what there is in registers there may be no room for them. The tiles of the gradients stay as they are in either
        case, and so does each bit of them.
        """
        stats = {name: k.stats.over for name, k in kept.items() if k.stats is not None}
        full = self.residual and (x.shape[-1] > BACKWARD.elements or (self.centred and len(stats) > 1))
        return {name for name, over in stats.items() if full or over == "channels"}

    def through_reference(
        self,
        op: Op,
        inputs: Sequence[Any],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
        dys: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """As of every op, but the point `summed` is an input here: the output that was kept.

        What arrives there in a later backward comes to the op as that output's gradient. A tap in the reference would
        count it a second time.
        """
        if "summed" not in leaves:
            return _fused.through_reference(op, inputs, needed, slots, leaves, dys)
        others = {name: leaf for name, leaf in leaves.items() if name != "summed"}
        asked = {name: slots[name] for name in others}
        dsummed, _, *rest = _fused.through_reference(op, inputs, (True, False, *needed[2:]), asked, others, dys)
        at = len(inputs) - 2
        if dsummed is not None:
            slot = slots["summed"]
            dsummed = slot.apart(dsummed)
            rest[at] = slot.deposit(op.name, dsummed, inputs[0], leaves["summed"])
        return [dsummed if need else None for need in needed[:2]] + rest

    def launch_backward(
        self,
        given: Sequence[Any],
        mean: Tensor | None,
        rstd: Tensor,
        dys: Sequence[Tensor | None],
        grads: Sequence[Any],
        points: Mapping[str, Any],
        tiling: Tiling,
    ) -> None:
        """Write gradients and points; of rows of several tiles the projections come first, for what needs them."""
        x, _, weight, _, _, offset, round_first = self.parts(given)
        n, (dy, ds) = x.shape[-1], dys if self.residual else (dys[0], None)
        # Two gradients of weights, and more: weights are read anew for each row, where registers do not hold them too.
        wide = tiling.tile(n) > BACKWARD.held_in(rstd.dtype).elements
        crowded = self.centred and (any(p is not None for p in points.values()) or (self.residual and wide))
        read = (x, weight, mean, rstd)
        projected = n > tiling.widest and (grads[0] is not None or "summed" in points)
        sums = self.projections(*read, dy, offset) if projected else (None, None)
        launch(
            kernels.norm_bwd_kernel,
            x.shape,
            rstd.dtype,
            *(*read, *sums, dy, ds, float(offset), *grads, *(points.get(name) for name in ("summed", "xhat", "y"))),
            walked=tiling.walk,
            programs=functools.partial(tiling.walkers, x.device),
            ROUND=triton_dtype(x) if round_first else None,
            HOLD=not crowded,
            WHOLE=covers,
            STAGES=tiling.stages(n, x, dy, ds),
            enable_fp_fusion=False,  # which sums are fused depends on what else is asked for, and with it the last bit
        )

    def projections(
        self, x: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, dy: Tensor | None, offset: float
    ) -> tuple[Tensor, Tensor | None]:
        """Sums over each row of the gradient of xhat, along xhat and along the ones."""
        along = torch.empty_like(rstd)
        level = torch.empty_like(rstd) if self.centred else None
        tiling = PROJECTIONS.held_in(rstd.dtype)
        launch(
            kernels.norm_project_kernel,
            x.shape,
            rstd.dtype,
            *(x, weight, mean, rstd, dy, float(offset), along, level),
            walked=tiling.walk,
            programs=row_tiles,
            WHOLE=covers,
            STAGES=tiling.stages(x.shape[-1], x, dy),
        )
        return along, level
