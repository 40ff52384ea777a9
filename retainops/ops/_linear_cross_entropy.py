"""How linear_cross_entropy runs in blocks, and what a slot gets of a gradient that exists only block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops.dispatch import dense
from retainops.ops import _blocks
from retainops.ops._blocks import Layer
from retainops.ops._cross_entropy import Loss, Options, Rows, reduced, row_gradient
from retainops.ops._plan import Plan
from retainops.registry import Op
from retainops.slots import Slot
from retainops.stats import MERGE, Part, count, parts_of, total
from retainops.wants import Answer

Tensor = torch.Tensor


class LinearCrossEntropy:
    """The op in blocks.

    Args:
        kernels: make the losses of a block by the kernels, if they can; otherwise by plain PyTorch.
    """

    reads = staticmethod(dense)

    def __init__(self, kernels: bool) -> None:
        self.kernels = kernels

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        return inputs

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Any, ...]:
        x, weight, target, bias, class_weight, *options, chunk = inputs
        dtype, y = layout.points["logits"][1], layout.outputs[0]
        layer, loss = at_work(x, weight, target, bias, class_weight, Options(*options), dtype)
        rows = _blocks.forward(layer, loss, chunk, self.kernels)
        if loss.options.reduction == "none":
            return rows.loss.view(y.shape).to(y.dtype, copy=True), *rows[1:], None, dtype
        divisor = rows.share.sum() if loss.options.reduction == "mean" else None
        return reduced(rows.loss, divisor, loss.options).to(y.dtype), *rows[1:], divisor, dtype

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        x, weight, target, bias, class_weight, *options, chunk, m, logsum, share, divisor, dtype = inputs
        given, (dy,) = Options(*options), dys
        assert dy is not None
        dloss = row_gradient(dy.reshape(-1) if given.reduction == "none" else dy, given, divisor, share)
        layer, loss = at_work(x, weight, target, bias, class_weight, given, dtype, Rows(share, m, logsum, share))
        pieces = Pieces.of_slot(op.name, slots["logits"], leaves["logits"]) if "logits" in leaves else None
        of_x = needed[0] or "x" in leaves
        dx, dw, db = _blocks.backward(layer, loss, chunk, self.kernels, dloss, (of_x, needed[1], needed[3]), pieces)
        dx = None if dx is None else dx.view(x.shape)
        kept = [
            slots["x"].deposit(op.name, dx, x, leaves["x"]) if "x" in leaves and dx is not None else None,
            None if pieces is None else pieces.hand_over(slots["logits"], leaves["logits"]),
        ]
        found = [dx if needed[0] else None, dw, None, db]
        grads = [None if grad is None else grad.to(like.dtype) for grad, like in zip(found, inputs, strict=False)]
        return [*grads, *([None] * 7), *kept]


def at_work(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    rows: Rows | None = None,
) -> tuple[Layer, Loss]:
    """The layer and the loss of its outputs, all rows in one dim; `rows` are those of forward, if it has been."""
    n = target.numel()
    rows = Rows.of((n,), dtype, x.device) if rows is None else rows
    loss = Loss.of(target.reshape(n), class_weight, options, weight.shape[0], rows)
    return Layer(x.reshape(n, x.shape[-1]), weight, bias, dtype), loss


class Pieces:
    """A point's answer put together block by block; to `Kept` it is the slot of the present block.

    Args:
        answer: what is wanted of the whole gradient.
        shape: of the point, (..., V).
        like: of the point's dtype and device, of no dims.
    """

    def __init__(self, answer: Answer, shape: torch.Size, like: Tensor) -> None:
        self.whole, self.shape, self.like = answer, shape, like
        # A buffer of any strides: where its rows cannot be counted through, a copy goes back at the end.
        self.flat = None if answer.tensor is None else answer.tensor.detach().reshape(-1, shape[-1])
        self.parts: dict[str, Tensor] = {}
        self.at = (slice(None), slice(None))
        self.wants_value = answer.stats is not None and "act_grad" in answer.stats.parts

    @staticmethod
    def of_slot(op: str, slot: Slot, leaf: Tensor) -> Pieces:
        """What a slot asks; `leaf` is the one of the graph."""
        return Pieces(slot.answer(op, leaf.shape, leaf.dtype, leaf.device), leaf.shape, leaf.new_zeros(()))

    def answer(self, *_block: Any) -> Answer:
        """What the present block is to do."""
        return self.whole._replace(tensor=None if self.flat is None else self.flat[self.at], returned=None)

    def written(self) -> None:
        """The present block is; the slot hears of it when all are."""

    def merge(self, parts: Mapping[str, Part], _leaf: Tensor | None = None) -> None:
        """Take the present block's parts of statistics to their places."""
        assert self.whole.stats is not None
        over = self.whole.stats.over
        place: Any = {"tensor": ..., "rows": self.at[0], "channels": self.at[1]}[over]
        for name, shared in parts.items():
            if name == "count":  # known without looking
                continue
            part = total(shared)
            size = {"tensor": part.shape, "rows": [self.shape[:-1].numel()], "channels": self.shape[-1:]}[over]
            # Zero is neutral: they are sums, or maxima of magnitudes.
            whole = self.parts.setdefault(name, part.new_zeros(size))
            whole[place] = MERGE[name](whole[place], part)

    def keep(self, grad: Tensor, value: Tensor | None) -> None:
        """Take what is wanted of the present block's gradient."""
        tensor, accumulate, _, stats = self.answer()
        if tensor is not None:
            tensor.add_(grad) if accumulate else tensor.copy_(grad)
        if stats is not None:
            parts = parts_of(stats.parts, stats.over, grad, value, self.like.dtype)
            self.merge(dict(zip(stats.parts, parts, strict=True)))

    def finish(self) -> dict[str, Tensor]:
        """Once all blocks are done: the gradient is where it belongs, and these are the parts of its statistics."""
        tensor, _, _, stats = self.whole
        if tensor is not None and self.flat is not None and self.flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(self.flat.view(self.shape))
        if stats is None:
            return {}
        like = self.like.expand(self.shape)
        if not like.numel():
            return dict(zip(stats.parts, parts_of(stats.parts, stats.over, like, like), strict=True))
        small = stats.shape(self.shape)
        found = {name: part if name == "hist" else part.view(small) for name, part in self.parts.items()}
        return {name: count(like, stats.over) if name == "count" else found[name] for name in stats.parts}

    def hand_over(self, slot: Slot, leaf: Tensor) -> Tensor | None:
        """Give the slot what the blocks have left; what to return to autograd for it."""
        parts = self.finish()
        slot.written()
        if parts:
            slot.merge(parts, leaf)
        return self.whole.returned
