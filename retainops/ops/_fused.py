"""The `autograd.Function` of every op that has kernels, and what it asks of an op's room."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from retainops import dispatch, registry
from retainops.dispatch import HAS_TRITON
from retainops.ops._plan import Plan, plan, several
from retainops.ops._saved import Unread, restored, saved
from retainops.points import reader
from retainops.registry import Op
from retainops.slots import Slot
from retainops.untraced import untraced

if HAS_TRITON:
    from retainops.ops import _replay


class Kernels(Protocol):
    """How an op runs on its kernels.

    A room that runs elsewhere too says what memory it can read, by an attribute `reads`; default: `dispatch.plain`. One
    that keeps a point in the place of an input may need a `through_reference` of its own.
    """

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None], values: bool) -> Sequence[Any]:
        """What to keep in the place of each input: itself, something equivalent, or its layout (`Unread`).

        `values`: the points' values will be asked for too, and so all that they depend on.
        """

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[torch.Tensor | None, ...]:
        """Launch the forward kernel; the outputs, and behind them what backward needs besides the inputs."""

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, torch.Tensor],
    ) -> list[torch.Tensor | None]:
        """Launch the backward kernel; the gradient of each input, then what goes to the slot of each point.

        `inputs` are followed by what forward kept besides; of `dys` not all are None.
        """


class Fused(torch.autograd.Function):
    """Any op on its kernels: its inputs, and one more differentiable input for each point, the slot's leaf."""

    @staticmethod
    def forward(ctx: Any, op: Op, kernels: Kernels, slots: Any, layout: Plan, *args: Any) -> Any:
        ctx.count = len(args) - len(op.points)
        inputs, leaves = args[: ctx.count], args[ctx.count :]
        ctx.op, ctx.kernels, ctx.slots = op, kernels, slots
        ctx.leaves = slots and {p.name: leaf for p, leaf in zip(op.points, leaves, strict=True) if leaf is not None}
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        results = _replay.forward(kernels, inputs, layout) if repeats(kernels) else kernels.forward(inputs, layout)
        outputs, others = results[: len(layout.outputs)], results[len(layout.outputs) :]
        # A statistic of value x gradient needs the values after all.
        values = bool(slots) and any("act_grad" in slot.parts for slot in slots.values())
        ctx.others = saved(ctx, (*kernels.keeps(inputs, outputs, values), *others))
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @untraced
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        op, inputs, none = ctx.op, restored(ctx), (None,) * 4
        needs = ctx.needs_input_grad[len(none) :]
        if all(dy is None for dy in dys):  # no gradient arrives: none leaves, as in eager
            return none + (None,) * len(needs)
        needed, wanted = needs[: ctx.count], needs[ctx.count :]
        leaves = ctx.leaves and {p.name: ctx.leaves[p.name] for p, want in zip(op.points, wanted, strict=True) if want}
        # Hooks on saved tensors may give back anything of equal values: the inputs are asked, too.
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        if not kernels_can(*dys, *tensors, readable=getattr(ctx.kernels, "reads", dispatch.plain)):
            with autocast_as(ctx.layout):  # whatever is in force around this backward
                by_reference = getattr(ctx.kernels, "through_reference", through_reference)
                return *none, *by_reference(op, inputs[: ctx.count], needed, ctx.slots, ctx.leaves, dys)
        if repeats(ctx.kernels):
            return *none, *_replay.backward(ctx.kernels, ctx.layout, op, inputs, dys, needed, ctx.slots, leaves)
        return *none, *ctx.kernels.backward(op, inputs, dys, needed, ctx.slots, leaves)


def repeats(kernels: Kernels) -> bool:
    """Whether what the host does for a call follows from layouts: a room that runs elsewhere too has no launches."""
    return HAS_TRITON and not hasattr(kernels, "reads")


def autocast_as(layout: Plan) -> torch.autocast:
    """Autocast as it was in the forward of this plan."""
    return torch.autocast(layout.device.type, dtype=layout.autocast, enabled=layout.autocast is not None)


def register(kernels: Kernels, **fields: Any) -> Op:
    """Register an op that runs on these kernels; `fields` are those of `Op`."""

    def start(inputs: tuple[Any, ...], slots: Mapping[str, Slot]) -> Any:
        return launch(op, kernels, inputs, slots)

    op = registry.register(Op(launch=start, **fields))
    return op


def launch(op: Op, kernels: Kernels, inputs: tuple[Any, ...], slots: Mapping[str, Slot]) -> Any:
    """Run an op on its kernels, its points bound to the slots that ask for them."""
    layout = plan(op.reference, inputs)
    leaves = [
        slots[p.name].bind(op.name, *layout.points[p.name], layout.device) if p.name in slots else None
        for p in op.points
    ]
    outputs = Fused.apply(op, kernels, slots, layout, *inputs, *leaves)
    if not op.outputs:
        return outputs
    # One requires grad if what it is made of does, as in eager.
    reached = {p.name: p.requires_grad(inputs) for p in op.points}
    pairs = zip(outputs, op.outputs, strict=True)
    return tuple(y.detach() if y.requires_grad and not reached.get(name, True) else y for y, name in pairs)


def kernels_can(*read: torch.Tensor | None, readable: Callable[[torch.Tensor], bool] = dispatch.plain) -> bool:
    """Whether a fused backward may run: not for create_graph, batched gradients, or a tensor that it cannot read."""
    return all(x is None or readable(x) for x in read) and not torch.is_grad_enabled() and dispatch.ambient() is None


def through_reference(
    op: Op,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    slots: Mapping[str, Slot],
    leaves: Mapping[str, torch.Tensor],
    dys: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients by differentiating the op's reference: differentiable themselves under create_graph.

    The reference is run on the saved inputs with the same slots, so a second backward adds the second-order part to
    a retained gradient too, as retain_grad does. `leaves` are those of the forward: the slots may have others by now.

    Returns:
        The gradient of each input (None where not needed), then of each point's slot (None where there is none, or
        it went `Into` a buffer).
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        with outside_transforms():
            # A view for each use: mul_sin(a, a) has two gradients to return, not their sum twice.
            whole = [x.zeros() if isinstance(x, Unread) else x for x in inputs]
            own = [_own_view(x, create_graph) if need else x for x, need in zip(whole, needed, strict=True)]
            # Of the leaves, too: this very node leads to them where an output was kept in the place of an input.
            views = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}
            outputs = several(op.reference(*own, reader(op.name, slots, leaves, views)))
        arrived = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None and y.requires_grad]
        wanted = [x for x, need in zip(own, needed, strict=True) if need] + list(views.values())
        y, dy = zip(*arrived, strict=True)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    grads = [next(found) if need else None for need in needed]
    of_slots = {name: next(found) for name in leaves}
    return grads + [of_slots.get(p.name) for p in op.points]


def outside_transforms() -> contextlib.AbstractContextManager[object]:
    """Outside of torch.func's transforms, to whose levels nothing belongs that a forward before them has saved.

    torch.vmap over torch.autograd.grad is one around a backward alone.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return contextlib.nullcontext()
    return temporarily_clear_interpreter_stack()


def _own_view(x: torch.Tensor, create_graph: bool) -> torch.Tensor:
    return x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
