"""Points: how a reference names its interiors, and what can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from retainops import parcel
from retainops.buffers import overlaps_itself
from retainops.part import Part, Places, picked
from retainops.registry import Op, Point, PointInfo, find
from retainops.relevance import Relevance
from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import TAKE_VALUE, Stats, parts_of
from retainops.untraced import untraced

COMPILED_VIEWS = torch.__version__ >= "2.12"
"""Whether a point in compiled code can be a view. In torch 2.11 a graph that has parcels cannot return two tensors of
one memory, and a point may leave it beside a view of the point."""


class Tap(torch.autograd.Function):
    """The identity; its backward also hands the gradient to a slot, by its leaf or a view of that."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, view: torch.Tensor, to: tuple[Slot, torch.Tensor], op: str, as_view: bool
    ) -> torch.Tensor:
        # The leaf is in a tuple, so that autograd sees it once: a gradient of None at a second place compiled autograd
        # would add to the one at the first.
        (ctx.slot, ctx.leaf), ctx.op = to, op
        ctx.set_materialize_grads(False)
        if ctx.slot.takes_value:
            ctx.save_for_backward(x)
        # Not view_as, which gives dims of size 1 other strides.
        return torch.ops.aten.alias(x) if as_view and x.layout is torch.strided else x.detach()

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:  # no gradient arrives: none leaves, as without the tap
            return None, None, None, None, None
        saved = ctx.saved_tensors  # once: a checkpoint refuses to unpack a second time
        value = saved[0] if saved else None
        grad = ctx.slot.apart(grad)
        return grad, ctx.slot.deposit(ctx.op, grad, value, ctx.leaf), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: torch.Tensor, *_: Any) -> torch.Tensor:
        return x_t.view_as(x_t)


class CompiledTap(torch.autograd.Function):
    """A tap inside torch.compile: its backward returns a parcel to the slot's carrier, an input of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        carrier: torch.Tensor,
        op: str,
        names: tuple[str, ...],
        over: str,
        part: Places,
        as_view: bool,
    ) -> torch.Tensor:
        ctx.op, ctx.names, ctx.over, ctx.part = op, names, over, part
        ctx.takes_value = not TAKE_VALUE.isdisjoint(names)
        if ctx.takes_value:
            ctx.save_for_backward(x)
        # No view: where x leaves the graph as well, AOTAutograd makes the view anew from it, outside, without the tap.
        # Inductor does not store the copy. It has x's strides: bits of what is computed from it may depend on them.
        copy = x.clone()
        if copy.stride() != x.stride() and not overlaps_itself(x):
            empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            # Not copy_: the Dynamo of torch 2.11 returns what it changes beside the output: the gradient goes there.
            copy = torch.ops.aten.copy(empty, x)
        return torch.ops.aten.alias(copy) if as_view and COMPILED_VIEWS else copy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        value = ctx.saved_tensors[0] if ctx.takes_value else None
        stats = tuple(name for name in ctx.names if name != "dense")
        parts = parts_of(stats, ctx.over, grad, value)
        if "dense" in ctx.names:
            # What a slot holds is its own; Inductor stores it from the same loop.
            parts.insert(0, picked(grad, ctx.part) if ctx.part else grad.clone())
        return grad, parcel.pack(ctx.op, ctx.names, *parts), None, None, None, None, None


def tap(
    op: str,
    slot: Slot,
    value: torch.Tensor,
    leaf: torch.Tensor | None = None,
    view: torch.Tensor | None = None,
    as_view: bool = False,
) -> torch.Tensor:
    """`value`, with its gradient going to a slot too: by its present leaf, one that it had before, or a view of it.

    `as_view`: what comes back is a view, which PyTorch refuses to change in place. So it must be where others may have
    the value too: the change would reach theirs, and their gradients would not know.
    """
    if leaf is None:
        check_no_transform(op)  # first: inside torch.vmap nothing requires grad
    if not (value.requires_grad and records()):
        raise no_grad(op, slot.name)
    if value.is_nested:
        raise RuntimeError(
            f"{op}: point '{slot.name}' is a nested tensor, and a slot holds a gradient of one shape; call it with "
            "the values, x.values(), or leave out retain="
        )
    check_not_recorded(op, slot.name)
    if torch.compiler.is_compiling():
        over = "tensor"
        part: Places = ()
        if isinstance(slot.want, (Stats, Relevance)):
            over = slot.want.over
            slot.want.check(op, slot.name, value.shape, value.dtype, value.device)
        if isinstance(slot.want, Part):
            part = slot.want.resolve(op, slot.name, value.shape)
        # No name of the point: a graph with one is for one layer of a model alone.
        return CompiledTap.apply(value, slot.carrier, op, slot.parts, over, part, as_view)
    if leaf is None:
        leaf = slot.bind(op, value.shape, value.dtype, value.device)
    return Tap.apply(value, leaf if view is None else view, (slot, leaf), op, as_view)


def unretained(name: str, value: torch.Tensor) -> torch.Tensor:
    """The `point` of a call that retains nothing."""
    return value


def reader(
    op: str,
    slots: Mapping[str, Slot],
    leaves: Mapping[str, torch.Tensor] | None = None,
    views: Mapping[str, torch.Tensor] | None = None,
) -> Point:
    """The `point` that a reference calls: it taps the values that `slots` asks for and leaves the others alone.

    `leaves` are the slots' leaves of an earlier forward, where the reference is run once more for its backward, and
    `views` are those of them that the gradients are to go to.
    """
    if not slots:
        return unretained

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        slot = slots.get(name)
        return value if slot is None else tap(op, slot, value, (leaves or {}).get(name), (views or {}).get(name))

    return point


def point(x: torch.Tensor, name: str, *, retain: Retained | None = None) -> torch.Tensor:
    """Name a value in code of yours, so that its gradient can be asked for: eager, or inside torch.compile.

    Args:
        x: any tensor that requires grad.
        name: what `retain` calls it.
        retain: the request. A name that it does not ask for, or None, makes this the identity.

    Returns:
        x, as a view. (PyTorch refuses in-place operations on that, which would reach x too; use out-of-place ones.)

    Raises:
        TypeError: x is not a tensor, or `retain` is not a `Retained`.
        RuntimeError: x does not require grad, grad mode is off, the slot was used with another shape and not reset
            since, or a torch.func transform is active.

    Example:
        >>> @torch.compile(fullgraph=True)
        ... def f(a, b, kept):
        ...     c = ro.point(a * b, "c", retain=kept)
        ...     return torch.sin(c)
    """
    if retain is None:
        return x
    if not isinstance(retain, Retained):
        raise TypeError(f'point: retain is {type(retain).__name__}; expected retainops.Retained, as Retained("{name}")')
    slot = retain.get(name)
    if slot is None:
        return x
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"point: x, to be '{name}', is {type(x).__name__}; expected a torch.Tensor that requires grad")
    return tap("point", slot, x, as_view=True)


def records() -> bool:
    """Whether autograd makes a graph of what is computed here."""
    if not torch.is_grad_enabled():
        return False
    # Inference mode makes none either, whatever grad mode says inside it. (Not every Dynamo knows the question.)
    return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()


def no_grad(op: str, name: str, of: str = "") -> RuntimeError:
    """The error for a point that no gradient reaches, in retain_grad's own words; `of` says what it is made of."""
    return RuntimeError(
        f"{op}: can't retain_grad on point '{name}': can't retain_grad on Tensor that has requires_grad=False. Nothing "
        f"that {name} depends on{of and f' ({of})'} requires grad, or grad mode is off; call requires_grad_() on an "
        "input of it, or leave out retain="
    )


def check_not_recorded(op: str, name: str) -> None:
    """Raise where a call is recorded as a program, which has no slots: it would answer nothing."""
    recorder = _recorder()
    if recorder is not None:
        raise RuntimeError(
            f"{op}: point '{name}' was asked for while {recorder} records this call, and the program that it makes "
            "answers no request; leave out retain=, or leave the `with` of ro.retain first (inside torch.compile a "
            "request is answered)"
        )


def _recorder() -> str | None:
    """What records this call as a program and knows nothing of slots; None: nothing, or torch.compile's Dynamo."""
    # What torch.compiler.is_exporting() returns; that call, in code which torch 2.11 compiles, is always True.
    if torch.compiler._is_exporting_flag:
        return "torch.export"
    if torch.compiler.is_compiling():
        return None if torch.compiler.is_dynamo_compiling() else "AOTAutograd (allow_in_graph, nonstrict_trace)"
    if torch.jit.is_tracing():
        return "torch.jit"
    functional = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return None if functional is None else "AOTAutograd"


def check_no_transform(op: str) -> None:
    """Raise where a point is asked for inside a torch.func transform."""
    # Dynamo, which traces this, takes what comes back for an object, None too; it knows the type.
    if not isinstance(torch._C._functorch.peek_interpreter_stack(), type(None)):
        raise RuntimeError(
            f"{op}: retain= inside a torch.func transform: a leaf made outside it gets no gradient there (nor does "
            "retain_grad() work); use torch.autograd, or write the interior as an input of the function"
        )


class PointTable(Mapping[str, PointInfo]):
    """The points of an op, in forward order: a mapping from name to `PointInfo`; its repr is a table."""

    def __init__(self, op: Op) -> None:
        self._op = op
        self._points = {p.name: p for p in op.points}

    def __getitem__(self, name: str) -> PointInfo:
        return self._points[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        lines = [f"  {p.name} = {p.formula}   ({p.shape})" for p in self._points.values()]
        return "\n".join([f"{self._op.name}: {self._op.formula}", *lines])


def points(op: Callable[..., Any] | str) -> PointTable:
    """What can be asked for in an op: each point's name, formula and shape.

    Args:
        op: a function of retainops, or its name.

    Raises:
        KeyError: not an op of retainops; the message lists them.

    Example:
        >>> ro.points(ro.mul_sin)
        mul_sin: sin(a * b)
          c = a * b   (broadcast of a and b)
    """
    return PointTable(find(op))
