"""Points: how a reference names its interiors, and what can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from retainops.registry import Op, Point, PointInfo, find
from retainops.slots import Slot


class Tap(torch.autograd.Function):
    """The identity; its backward also hands the gradient to a slot."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, leaf: torch.Tensor, slot: Slot, op: str) -> torch.Tensor:
        ctx.slot, ctx.op = slot, op
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, ctx.slot.deposit(ctx.op, grad), None, None

    @staticmethod
    def jvp(ctx: Any, x_t: torch.Tensor, *_: Any) -> torch.Tensor:
        return x_t.view_as(x_t)


def unretained(name: str, value: torch.Tensor) -> torch.Tensor:
    """The `point` of a call that retains nothing."""
    return value


def reader(op: str, slots: Mapping[str, Slot]) -> Point:
    """The `point` that a reference calls: it taps the values that `slots` asks for and leaves the others alone."""
    if not slots:
        return unretained

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        slot = slots.get(name)
        if slot is None:
            return value
        if not value.requires_grad:
            raise no_grad(op, name)
        return Tap.apply(value, slot.bind(op, value.shape, value.dtype, value.device), slot, op)

    return point


def no_grad(op: str, name: str) -> RuntimeError:
    """The error for a point that no gradient reaches, in retain_grad's own words."""
    return RuntimeError(
        f"{op}: can't retain_grad on point '{name}': can't retain_grad on Tensor that has requires_grad=False. None of "
        "the inputs requires grad, or grad mode is off; call requires_grad_() on an input, or leave out retain="
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
