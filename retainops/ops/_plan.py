"""What eager PyTorch would return for an op's inputs: shapes, strides and dtypes, found without computing anything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Output(NamedTuple):
    """One output, not yet computed."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Plan:
    """The outputs and the points of one call. It equals itself alone: calls of one layout have one plan.

    Attributes:
        outputs: in order.
        points: (shape, dtype) by name.
        device: of all of them.
        autocast: the dtype of autocast there, None where it is off.
    """

    outputs: tuple[Output, ...]
    points: Mapping[str, tuple[torch.Size, torch.dtype]]
    device: torch.device
    autocast: torch.dtype | None = None

    def empty(self, which: int = 0) -> torch.Tensor:
        """An output, not yet written."""
        shape, strides, dtype = self.outputs[which]
        return torch.empty_strided(shape, strides, dtype=dtype, device=self.device)


def plan(reference: Callable[..., Any], inputs: tuple[Any, ...]) -> Plan:
    """What the reference gives for inputs like these; remembered for each layout."""
    layouts = tuple(map(_layout, inputs))
    device, default = next(x.device for x in inputs if isinstance(x, torch.Tensor)), torch.get_default_dtype()
    if torch.is_autocast_enabled(device.type):
        return _plan(reference, layouts, device, torch.get_autocast_dtype(device.type), default)
    return _plan(reference, layouts, device, None, default)


@functools.lru_cache(maxsize=4096)
def _plan(
    reference: Callable[..., Any],
    layouts: tuple[Any, ...],
    device: torch.device,
    autocast: torch.dtype | None,
    _default: torch.dtype,
) -> Plan:
    seen: dict[str, torch.Tensor] = {}

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value
        return value

    with torch.no_grad():
        outputs = several(reference(*(_like(x, "meta") for x in layouts), point))
        shapes = {name: value.shape for name, value in seen.items()}
        typed = outputs
        if autocast is not None:  # which looks at the device: ask with tensors of no elements there
            typed = several(reference(*(_like(x, device) for x in layouts), point))
    planned = (Output(y.shape, y.stride(), t.dtype) for y, t in zip(outputs, typed, strict=True))
    points = {name: (shapes[name], seen[name].dtype) for name in shapes}
    return Plan(tuple(planned), points, device, autocast)


def several(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs of an op of one or of several."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs


def _layout(x: Any) -> Any:
    """What a plan depends on: of a number only its type, of a choice (a string, or a bool) its value."""
    if isinstance(x, torch.Tensor):
        return x.shape, x.stride(), x.dtype
    return x if isinstance(x, (str, bool)) else type(x)


def _like(layout: Any, device: Any) -> Any:
    if layout is type(None):
        return None
    if isinstance(layout, (str, bool)):
        return layout
    if isinstance(layout, type):
        number: Callable[[float], Any] = layout
        return number(0.5) if issubclass(layout, float) else number(1)  # a probability, a bound: any value will do
    shape, strides, dtype = layout
    if device == "meta":
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    # A dim of 1 stays one: it is broadcast. The last dim stays even for what is cut in halves.
    return torch.zeros([1 if size == 1 else 0 for size in shape], dtype=dtype, device=device)
