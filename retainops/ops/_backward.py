"""What the backward of every fused op has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops import dispatch
from retainops.points import reader
from retainops.registry import Op
from retainops.slots import Slot


def save_inputs(ctx: Any, *inputs: Any) -> None:
    """Keep an op's inputs for backward: tensors under autograd's watch (freed and checked for in-place changes)."""
    ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))
    ctx.numbers = [None if isinstance(x, torch.Tensor) else x for x in inputs]


def saved_inputs(ctx: Any) -> list[Any]:
    """The inputs that `save_inputs` kept, Python numbers among them."""
    return [x if n is None else n for x, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]


def kernels_can(dy: torch.Tensor) -> bool:
    """Whether a fused backward may run: not for create_graph, batched gradients, or a gradient it cannot read."""
    return not torch.is_grad_enabled() and dispatch.ambient() is None and dispatch.plain(dy)


def through_reference(
    op: Op,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    slots: Mapping[str, Slot],
    leaves: Mapping[str, torch.Tensor],
    dy: torch.Tensor,
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
        # A view for each use: mul_sin(a, a) has two gradients to return, not their sum twice.
        own = [_own_view(x, create_graph) if need else x for x, need in zip(inputs, needed, strict=True)]
        y = op.reference(*own, reader(op.name, slots, leaves))
        wanted = [x for x, need in zip(own, needed, strict=True) if need] + list(leaves.values())
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    grads = [next(found) if need else None for need in needed]
    of_slots = {name: next(found) for name in leaves}
    return grads + [of_slots.get(p.name) for p in op.points]


def _own_view(x: torch.Tensor, create_graph: bool) -> torch.Tensor:
    return x.view_as(x) if create_graph else x.detach().requires_grad_()
