"""Blocks of logits inside torch.compile: two operators that the compiler calls and does not look into.

It would find that backward makes the logits that forward made already, and keep them from there: all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retainops import parcel
from retainops.dispatch import backend_name, requested
from retainops.ops import _blocks
from retainops.ops._cross_entropy import Options, Rows, reduced
from retainops.ops._linear_cross_entropy import Pieces, at_work
from retainops.ops.cross_entropy import loss_dtype, shares
from retainops.points import no_grad, reader
from retainops.registry import Op
from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import Stats, parts_of
from retainops.wants import Answer

Tensor = torch.Tensor


def _kernels() -> bool:
    return backend_name() != "reference"


@torch.library.custom_op("retainops::linear_cross_entropy_forward", mutates_args=())
def forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_blocks.forward`, its rows."""
    given = Options(ignore_index, "none", label_smoothing, z_loss, softcap)
    layer, loss = at_work(x, weight, target, bias, class_weight, given, dtype)
    rows = _blocks.forward(layer, loss, chunk, _kernels())
    return rows.loss, rows.max, rows.logsum, rows.share


@forward.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(Rows.of(x.shape[:1], others[-1], x.device))


@torch.library.custom_op("retainops::linear_cross_entropy_backward", mutates_args=())
def backward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk: int | None,
    dtype: torch.dtype,
    max: Tensor,
    logsum: Tensor,
    share: Tensor,
    dloss: Tensor,
    needed: Sequence[bool],
    dense: bool,
    stats: str,
    over: str,
    before: Sequence[int],
) -> list[Tensor]:
    """`_blocks.backward`: the gradients that are needed, then what is kept of the logits' one.

    Args:
        stats: names of statistics, with a blank between them.
        dense, over: as of `Stats`.
        before: the shape of the logits before their last dim.
    """
    shape, pieces = torch.Size((*before, weight.shape[0])), None
    if dense or stats:
        tensor = torch.empty(shape, dtype=dtype, device=x.device) if dense else None
        wanted = Stats(*stats.split(), over=over) if stats else None
        pieces = Pieces(Answer(tensor, False, None, wanted), shape, torch.empty((), dtype=dtype, device=x.device))
    given = Options(ignore_index, "none", label_smoothing, z_loss, softcap)
    rows = Rows(share, max, logsum, share)
    layer, loss = at_work(x, weight, target, bias, class_weight, given, dtype, rows)
    grads = _blocks.backward(layer, loss, chunk, _kernels(), dloss, needed, pieces)
    likes = (x, weight, bias)
    found = [g.to(t.dtype) for g, t in zip(grads, likes, strict=True) if g is not None and t is not None]
    if pieces is not None:
        parts = pieces.finish()
        found += [] if pieces.whole.tensor is None else [pieces.whole.tensor]
        found += parts.values()
    return found


@backward.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    dtype, (needed, dense, stats, over, before) = others[6], others[11:]
    likes = [t for t, need in zip((x, weight, bias), needed, strict=True) if t is not None and need]
    found = [torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in likes]
    dz = torch.empty((*before, weight.shape[0]), dtype=dtype, device=x.device)
    found += [dz] if dense else []
    return found + (parts_of(Stats(*stats.split()).parts, over, dz, dz) if stats else [])


class Blocks(torch.autograd.Function):
    """The loss of each row; backward also returns a parcel to the slot's carrier, an input of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        carrier: Tensor | None,
        target: Tensor,
        class_weight: Tensor | None,
        fixed: tuple[Any, ...],
        request: tuple[Any, ...],
    ) -> Tensor:
        ctx.fixed, ctx.request = fixed, request
        loss, *rest = forward(x, weight, target, bias, class_weight, *fixed)
        ctx.save_for_backward(x, weight, target, bias, class_weight, *rest)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        tensors, (names, needed, *wanted) = ctx.saved_tensors, ctx.request
        found = backward(*tensors[:5], *ctx.fixed, *tensors[5:], dloss, needed, *wanted)
        grads = [found[sum(needed[:i])] if need else None for i, need in enumerate(needed)]
        answer = parcel.pack("logits", names, *found[sum(needed) :]) if names else None
        return *grads, answer, None, None, None, None


def call(
    op: Op,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    given: Options,
    chunk: int | None,
    retain: Retained | None,
) -> Tensor:
    """`linear_cross_entropy`, as it is traced."""
    slots = {} if retain is None else requested(op, (x, weight, bias), retain)
    dtype, x = _product_dtype(x), reader(op.name, slots)("x", x)
    rows = x.reshape(target.numel(), x.shape[-1])
    needed = [rows.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad]
    shape = (*target.shape, weight.shape[0])
    carrier, request = _asked(op, slots.get("logits"), needed, shape, dtype, x.device)
    fixed = (given.ignore_index, *given[2:], chunk, dtype)
    loss = Blocks.apply(rows, weight, bias, carrier, target.reshape(-1), class_weight, fixed, request)
    loss, to = loss.view(target.shape), loss_dtype(dtype, x.device)
    if given.reduction == "none":
        return loss.to(to)
    if given.reduction == "sum":
        return reduced(loss, None, given).to(to)
    share, *_ = shares(target, class_weight, given.ignore_index, shape[-1], loss.dtype)
    return reduced(loss, share.sum(), given).to(to)


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _asked(
    op: Op, slot: Slot | None, needed: list[bool], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, tuple[Any, ...]]:
    """The carrier of what is retained of the logits, and what backward is to do for it."""
    before = list(shape[:-1])
    if slot is None:
        return None, ((), needed, False, "", "tensor", before)
    if not any(needed):
        raise no_grad(op.name, slot.name)
    want = slot.want
    if not isinstance(want, Stats):
        return slot.carrier, (slot.parts, needed, True, "", "tensor", before)
    want.check(op.name, slot.name, torch.Size(shape), dtype, device)
    return slot.carrier, (slot.parts, needed, want.grad, " ".join(want.names), want.over, before)
