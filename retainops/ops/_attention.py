"""Attention's output with an ear: the identity, whose backward answers what was asked of the scores.

The gradients of q, k and v are none of its business: they are made by what made the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from retainops import dispatch
from retainops.arrivals import last_first
from retainops.ops import _fused
from retainops.ops._asked import Asked, Call, answers, cast, scores_of
from retainops.ops._scores import Scores, Wanted
from retainops.part import Part
from retainops.registry import Op
from retainops.relevance import Relevance
from retainops.slots import Slot
from retainops.stats import Stats
from retainops.untraced import untraced

Tensor = torch.Tensor
LSE = {
    "ScaledDotProductFlashAttentionForCpuBackward0": "_saved_logsumexp",
    "ScaledDotProductFlashAttentionBackward0": "_saved_logsumexp",
    "ScaledDotProductEfficientAttentionBackward0": "_saved_log_sumexp",
    "ScaledDotProductCudnnAttentionBackward0": "_saved_logsumexp",
}
"""The nodes that keep a natural logarithm, and under which name."""
MASKLESS = "ScaledDotProductCudnnAttentionBackward0"
"""Its mask hides a row behind finite numbers, and then its logarithm is theirs."""
POINTS = ("s", "p")
"""Of the op's points, those that do not exist."""


class Reached(torch.autograd.Function):
    """q with a graph, which leads nowhere."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, v: Tensor) -> Tensor:
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, dq: Tensor) -> tuple[None, None]:
        return None, None


def reached(inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs such that s and p of the definition, which are made of q, k and the mask, have a gradient where o has one.

    Where v alone requires grad they would have none. The tiles answer there: what they need is the output's gradient.
    """
    q, k, v, mask, *rest = inputs
    if not v.requires_grad or any(t is not None and t.requires_grad for t in (q, k, mask)):
        return inputs
    return Reached.apply(q, v), k, v, mask, *rest


def of_requests(op: Op, count: int) -> Op:
    """The op, with points "s 0", "p 0", "s 1", ... of that many requests instead of its own."""

    def reference(*args: Any) -> Tensor:
        *inputs, point = args

        def each(name: str, value: Tensor) -> Tensor:
            for i in range(count if name in POINTS else 0):
                value = point(f"{name} {i}", value)
            return value

        definition: Any = op.reference
        return definition(*reached(inputs), each)

    points = [dataclasses.replace(p, name=f"{p.name} {i}") for i in range(count) for p in op.points if p.name in POINTS]
    return dataclasses.replace(op, reference=reference, points=tuple(points))


class Ear(torch.autograd.Function):
    """The identity on an output. Inputs of attention are inputs of it for the sake of second derivatives alone.

    Those are the reference's: then no gradient goes to the output, and so to the node that made it, but to its inputs
    directly. So it answers all requests: one behind another would not hear a thing. `op` is as `of_requests` has it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Op,
        call: Call,
        slots: Mapping[str, Slot],
        kernels: bool,
        o: Tensor,
        lse: Tensor | None,
        *args: Any,
    ) -> Tensor:
        tensors, leaves = args[:4], dict(zip((p.name for p in op.points), args[4:], strict=True))
        ctx.op, ctx.call, ctx.slots, ctx.kernels = op, call, slots, kernels
        ctx.leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        ctx.casts, ctx.autocast = (
            torch.is_autocast_enabled(o.device.type),
            torch.get_autocast_dtype(o.device.type),
        )
        ctx.set_materialize_grads(False)
        ctx.dtype = o.dtype
        ctx.save_for_backward(*tensors, o if kernels else None, lse)
        return torch.ops.aten.alias(o)  # not a view_as, which gives dims of size 1 other strides

    @staticmethod
    @untraced
    def backward(ctx: Any, do: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, o, lse = ctx.saved_tensors
        none, needs = (None,) * 4, ctx.needs_input_grad
        if do is None:  # no gradient arrives: none leaves, as in eager
            return (None,) * len(needs)
        if torch.is_grad_enabled() or dispatch.transformed() or not dispatch.dense(do):
            # Whatever is in force around this backward.
            with torch.autocast(do.device.type, dtype=ctx.autocast, enabled=ctx.casts):
                inputs = (*tensors, 0.0, *ctx.call)
                needed = (*needs[6:10], *[False] * (len(inputs) - 4))
                found = _fused.through_reference(ctx.op, inputs, needed, ctx.slots, ctx.leaves, (do,))
            return *none, None, None, *found[:4], *found[len(inputs) :]
        names = [p.name for p in ctx.op.points]
        leaves = {name: ctx.leaves[name] for name, need in zip(names, needs[10:], strict=True) if need}
        tensors = cast(tensors, ctx.dtype, ctx.casts)
        with torch.autocast(do.device.type, enabled=False):
            scores, kept = scores_of(ctx.call, tensors, do, o, lse), []
            for i in range(0, len(names), len(POINTS)):
                kept += _hear(ctx.op.name, scores, do, ctx.slots, leaves, names[i : i + len(POINTS)], ctx.kernels)
        return *none, do, None, None, None, None, None, *kept


def listen(
    op: Op,
    call: Call,
    o: Tensor,
    tensors: Sequence[Tensor | None],
    requests: Sequence[Mapping[str, Slot]],
    kernels: bool,
    lse: Tensor | None,
) -> Tensor:
    """An output of attention of (q, k, v, mask), such that its backward answers what requests ask of s and p."""
    k = tensors[1]
    assert k is not None
    shape = torch.Size((*o.shape[:-1], k.shape[-2]))
    slots = {f"{name} {i}": slots[name] for i, slots in enumerate(requests) for name in POINTS if name in slots}
    op = of_requests(op, len(requests))
    leaves = [slots[p.name].bind(op.name, shape, o.dtype, o.device) if p.name in slots else None for p in op.points]
    return Ear.apply(op, call, slots, kernels, o, lse, *tensors, *leaves)


def _hear(
    op: str,
    scores: Scores,
    do: Tensor,
    slots: Mapping[str, Slot],
    leaves: Mapping[str, Tensor],
    names: Sequence[str],
    kernels: bool,
) -> list[Tensor | None]:
    """What to return to autograd for the slots of these names, of s and of p, once they have all they asked for."""
    shape = torch.Size((*do.shape[:-1], scores.shape[-1]))
    given = {}
    for name in last_first(name for name in names if name in leaves):
        given[name] = slots[name].answer(op, leaves[name].shape, leaves[name].dtype, leaves[name].device)
    asked = {name: asked_of(op, slots[name], shape, answer.tensor, answer.accumulate) for name, answer in given.items()}
    found = answers(scores, shape, asked.get(names[0]), asked.get(names[1]), kernels) if asked else ({}, {})
    for name, parts in zip(names, found, strict=True):
        if name in leaves:
            slots[name].written()
            if parts:
                slots[name].merge(parts, leaves[name])
    return [given[name].returned if name in given else None for name in names]


def asked_of(op: str, slot: Slot, shape: torch.Size, tensor: Tensor | None, accumulate: bool) -> Asked:
    """What a slot asks of its point, of this shape."""
    want = slot.want
    wanted = Wanted(tensor, accumulate)
    if isinstance(want, Stats):
        wanted = wanted._replace(parts=want.parts, over=want.over)
    if isinstance(want, Relevance):
        wanted = wanted._replace(relevance=want.names)
    return Asked(wanted, want.resolve(op, slot.name, shape) if isinstance(want, Part) else ())


def lse_of(o: Tensor) -> Tensor | None:
    """The logarithm of each row's sum, (B, H, Nq), of the node that made an output; None if it keeps none."""
    if _hooked():
        return None  # to look at it would undo what the hooks are there for
    node: Any = o.grad_fn
    if node is not None and type(node).__name__ == "SliceBackward0":  # of heads that were padded
        node = node.next_functions[0][0]
    name = LSE.get(type(node).__name__)
    if name is None or (type(node).__name__ == MASKLESS and node._saved_attn_bias is not None):
        return None
    return _normal(getattr(node, name), o)


def _normal(lse: Tensor, o: Tensor) -> Tensor | None:
    if o.dim() != 4 or lse.dtype != torch.promote_types(o.dtype, torch.float32):
        return None
    b, h, n, _ = o.shape
    lse = lse.detach().reshape(b, h, -1)[..., :n]  # one kernel pads the rows
    # One says inf of a row that sees no key, whose output is 0, and of a row that is nan.
    return torch.where(lse.isinf(), 0.0 * o.detach()[..., 0].to(lse.dtype), lse)


def _hooked() -> bool:
    """Whether saved tensors are packed: by checkpointing, or to lie in another memory."""
    top: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
