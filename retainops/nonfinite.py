"""The first gradient of a step that is not finite."""

from __future__ import annotations

from typing import Any

import torch

from retainops.arrivals import came_between, in_backward_order
from retainops.names import listed
from retainops.readings import Reading, Readings
from retainops.retained import Retained

FIRST = "nothing before it in backward is watched: the loss, or the weights, may be inf or nan already"


class NonFiniteGradient(FloatingPointError):
    """A watched gradient has an inf or a nan.

    Attributes:
        point: the first such point, in the order of backward.
        step: the number of the step.
        readings: all that was read in it.
    """

    def __init__(self, message: str, point: str, step: int, readings: Readings) -> None:
        super().__init__(message)
        self.point, self.step, self.readings = point, step, readings

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.point, self.step, self.readings)


def first_nonfinite(kept: Retained, readings: Readings) -> tuple[str, str] | None:
    """The first point in the order of backward whose count is not 0, and what to say of it."""
    bad = {name for name, of in readings.items() if "nonfinite" in of and _count(of["nonfinite"])}
    if not bad:
        return None
    order = [name for name in in_backward_order(kept) if "nonfinite" in readings.get(name, {})]
    place, first = next((i, name) for i, name in enumerate(order) if name in bad)
    around = came_between(kept, first)
    others = len(bad.difference(around)) - 1
    rest = f"that of '{order[place - 1]}', right before it in backward, is finite" if place else FIRST
    if around:
        rest = f"it got several, and between them came that of {listed(around)}: which had the first is not known"
    if others:
        rest += f"; {others} point{'s' * (others > 1)} after it {'have' if others > 1 else 'has'} some too"
    count = _count(readings[first]["nonfinite"])
    message = f"the gradient of '{first}' has {count} element{'s' * (count > 1)} that {'are' if count > 1 else 'is'}"
    return first, f"{message} inf or nan; {rest}"


def _count(reading: Reading) -> int:
    return int(reading.sum()) if isinstance(reading, torch.Tensor) else int(reading)
