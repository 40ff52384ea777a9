"""How each variant does a job: retainops, eager PyTorch, torch.compile, a copy of as many bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch

from bench.jobs import Job
from retainops import Into, Retained, Stats
from retainops.ops._plan import several
from retainops.points import unretained
from retainops.registry import Op

Call = Callable[[], Any]
Prepare = Callable[[Sequence[Any]], Call]
AUTOTUNED = "torch.compile, max-autotune"


def backward(y: torch.Tensor | tuple[torch.Tensor, ...], inputs: Sequence[Any], *slots: torch.Tensor) -> Call:
    """A backward of the graph behind y (one output, or several), again and again.

    retain_graph=True is what lets one graph be timed many times. It is fair here: no op of retainops overwrites its
    saved tensors, and autograd neither copies nor recomputes because of it. What is timed on the host is autograd's
    engine, the op's backward and the allocation of the gradients; accumulating them into `.grad` is left out for all.
    """
    outputs = several(y)
    dys = [random_like(y) for y in outputs]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad] + list(slots)
    # What is retained in another form than the gradient itself is returned as None, which "unused" is to autograd.
    return partial(torch.autograd.grad, outputs, wanted, dys, retain_graph=True, allow_unused=True)


def random_like(y: torch.Tensor) -> torch.Tensor:
    """A gradient for y."""
    return torch.randn_like(y)


def _retainops(op: Op, job: Job, tensors: str) -> Prepare:
    def prepare(inputs: Sequence[Any]) -> Call:
        if job.point is None:
            return plain(op.call, job, inputs)
        if job.form == "Stats":
            kept = Retained(**{job.point: Stats("l2", "amax")})
        elif job.form == "Into":
            kept = Retained(**{job.point: Into(_buffer(op, job.point, inputs))})
        else:
            kept = Retained(job.point)
        slot = kept[job.point]
        if job.direction == "step":
            return partial(_step, lambda: op.call(*inputs, retain=kept), inputs, lambda: [slot.tensor])
        y = op.call(*inputs, retain=kept)
        grads = backward(y, inputs, slot.tensor)
        if not job.form:
            return grads

        def call() -> Any:
            slot.reset()  # or it would be added to: one more read of a buffer
            return *grads(), slot.grad if job.form == "Into" else slot

        return call

    return prepare


def _buffer(op: Op, point: str, inputs: Sequence[Any]) -> torch.Tensor:
    """One for a point's gradient: its shape is known after a call."""
    probe = Retained(point)
    op.call(*inputs, retain=probe)
    leaf = probe[point].tensor
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _eager(op: Op, job: Job, tensors: str) -> Prepare:
    def prepare(inputs: Sequence[Any]) -> Call:
        if job.point is None:
            return plain(_reference(op), job, inputs)
        interior: list[torch.Tensor] = []

        def point(name: str, value: torch.Tensor) -> torch.Tensor:
            if name == job.point:
                value.retain_grad()
                interior.append(value)
            return value

        if job.direction == "step":

            def forward() -> Any:
                interior.clear()
                return op.reference(*inputs, point)

            return partial(_step, forward, inputs, lambda: interior)
        y = op.reference(*inputs, point)
        # On an input retain_grad() does nothing, and an output's gradient comes from outside.
        is_outer = interior[0].is_leaf or any(interior[0] is output for output in several(y))
        grads = backward(y, inputs, *(interior if is_outer else ()))

        def call() -> Any:
            if not is_outer:
                interior[0].grad = None  # or it would be added to
            found = grads() if is_outer else (*grads(), interior[0].grad)
            norms = (torch.linalg.vector_norm(found[-1], ord) for ord in (2, inf))  # each a single pass
            return (*found, *norms) if job.form == "Stats" else found

        return call

    return prepare


def _compiled(op: Op, job: Job, tensors: str) -> Prepare:
    return partial(plain, _compile(op, None, tensors), job)


def _autotuned(op: Op, job: Job, tensors: str) -> Prepare:
    return partial(plain, _compile(op, "max-autotune-no-cudagraphs", tensors), job)


@functools.lru_cache(maxsize=1)
def _compile(op: Op, mode: str | None, tensors: str) -> Callable[..., torch.Tensor]:
    """The reference, compiled for tensors of one shape and dtype; forward and backward share it."""
    # As in a program of fixed shapes. Without a reset dynamo gives up after a few of them.
    torch.compiler.reset()
    return torch.compile(_reference(op), fullgraph=True, dynamic=False, mode=mode)


def _reference(op: Op) -> Callable[..., torch.Tensor]:
    def function(*inputs: Any) -> torch.Tensor:
        return op.reference(*inputs, unretained)

    return function


def _step(forward: Call, inputs: Sequence[Any], kept: Callable[[], Sequence[torch.Tensor]] = list) -> Any:
    """Forward and backward; the gradient that arrives is all ones, of one stored element."""
    outputs = several(forward())
    dys = [torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape) for y in outputs]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(outputs, [*wanted, *kept()], dys, allow_unused=True)


def plain(function: Callable[..., torch.Tensor], job: Job, inputs: Sequence[Any]) -> Call:
    """The call to time of a function that retains nothing."""
    if job.direction == "forward":
        return partial(function, *inputs)  # as in training: autograd records it
    if job.direction == "step":
        return partial(_step, partial(function, *inputs), inputs)
    return backward(function(*inputs), inputs)


def _copy(op: Op, job: Job, tensors: str) -> Prepare:
    def prepare(inputs: Sequence[Any]) -> Call:
        device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        elements = job.fewest_bytes(op, inputs) // 2 // 4  # half of the bytes are read, half are written
        return torch.randn(elements, device=device).clone

    return prepare


VARIANTS: Mapping[str, Callable[[Op, Job, str], Prepare]] = {
    "retainops": _retainops,
    "eager": _eager,
    "torch.compile": _compiled,
    AUTOTUNED: _autotuned,
    "copy": _copy,
}
"""By name: makes what makes the call to time, for a job of an op. The last argument names the inputs' shape and dtype:
what there is to compile is compiled once for them."""
