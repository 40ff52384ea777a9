"""One call that several requests ask for at once: nested `ro.retain` on one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops.dispatch import backend_name, requested
from retainops.ops.attention import ATTENTION, attention_of
from retainops.points import tap
from retainops.registry import Op
from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import Part, Stats
from retainops.untraced import untraced


def call_with_several(op: Op, inputs: tuple[Any, ...], requests: Sequence[Retained]) -> torch.Tensor:
    """Call an op and answer each request: through the kernels where one answer holds all that is wanted."""
    if op is ATTENTION:
        return attention_of(inputs, requests)
    if not torch.compiler.is_compiling():
        for request in requests:
            requested(op, inputs, request)
        wanted = {p.name: [r[p.name] for r in requests if p.name in r] for p in op.points}
        if all(len(overs(slots)) <= 1 for slots in wanted.values()):
            joined = {name: slots[0] if len(slots) == 1 else Joined(slots) for name, slots in wanted.items() if slots}
            return op.call(*inputs, retain=Retained.of(joined))

        if backend_name() == "triton":
            raise RuntimeError(
                f'{op.name}: the backend is "triton", and nested requests ask one point for statistics over different '
                'things, which one launch cannot take; use backend("auto") to let them take the reference path'
            )

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        for request in requests:
            slot = request.get(name)
            if slot is not None:
                value = tap(op.name, slot, value)
        return value

    return op.reference(*inputs, point)


def overs(slots: Sequence[Slot]) -> set[str]:
    """What the statistics that these slots want are over: a kernel takes them over one thing a launch."""
    return {slot.want.over for slot in slots if isinstance(slot.want, Stats)}


class Joined(Slot):
    """Several slots of one point as an op's one: it asks for what any of them wants and hands each its own."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(slots[0].name, _union(slots))
        self.slots = tuple(slots)

    def bind(self, op: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._leaves = [slot.bind(op, shape, dtype, device) for slot in self.slots]
        self._leaf = Join.apply(self.slots, op, *self._leaves)
        return self._leaf

    def apart(self, grad: torch.Tensor) -> torch.Tensor:
        for slot in self.slots:
            grad = slot.apart(grad)
        return grad

    def note_arrival(self, compiled: bool = False) -> None:
        for slot in self.slots:
            slot.note_arrival(compiled)

    def merge(self, parts: Mapping[str, Part], leaf: torch.Tensor | None = None) -> None:
        for slot, own in zip(self.slots, self._leaves, strict=True):
            if isinstance(slot.want, Stats):
                slot.merge({name: parts[name] for name in slot.want.parts}, own)


def _union(slots: Sequence[Slot]) -> Stats | None:
    stats = [slot.want for slot in slots if isinstance(slot.want, Stats)]
    if not stats:
        return None
    dense = any(want.grad for want in stats) or len(stats) < len(slots)
    return Stats(*(name for want in stats for name in want.names), over=stats[0].over, grad=dense)


class Join(torch.autograd.Function):
    """From leaves to the one that an op takes; backward gives each leaf, or its buffer, the gradient it wants."""

    @staticmethod
    def forward(ctx: Any, slots: tuple[Slot, ...], op: str, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.slots, ctx.op = slots, op
        first = leaves[0]
        return torch.zeros((), dtype=first.dtype, device=first.device).expand(first.shape)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return (None,) * (2 + len(ctx.slots))
        for slot in ctx.slots:
            grad = slot.apart(grad)
        return None, None, *(_hand_over(ctx.op, slot, grad) for slot in ctx.slots)


def _hand_over(op: str, slot: Slot, grad: torch.Tensor) -> torch.Tensor | None:
    if isinstance(slot.want, Stats):
        return grad if slot.want.grad else None  # the statistics came by `merge`
    return slot.place(op, grad, None)
