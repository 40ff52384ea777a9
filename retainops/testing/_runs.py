"""What `check_op` runs: an op, or its definition in eager PyTorch, with every gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from retainops.dispatch import backend
from retainops.retained import Retained

Quantities = dict[str, "torch.Tensor | None"]
"""What a run computes, by name: "y" (several: "y0", "y1"), then "d" and the name of each input, then of each point."""

Dys = tuple[torch.Tensor, ...]
"""The gradient of each output."""


class Terms(NamedTuple):
    """What a gradient of an input or point that is broadcast sums: how many terms, and the sum of their magnitudes."""

    n: int
    magnitudes: torch.Tensor


class Call:
    """A definition, inputs for it, which of them to differentiate, and which points to retain.

    Args:
        reference: the definition, `reference(*inputs, point)`.
        inputs: those that require grad are differentiated; all floating-point tensors if none does.
    """

    def __init__(self, reference: Callable[..., torch.Tensor], inputs: Sequence[Any]) -> None:
        self.reference, self.inputs = reference, tuple(inputs)
        asked = [isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]
        self.needed = asked if any(asked) else [is_float(x) for x in inputs]
        self.names = _argument_names(reference, len(self.inputs))

    def with_inputs(self, inputs: Sequence[Any]) -> Call:
        """The same call at other inputs."""
        other = Call(self.reference, inputs)
        other.needed = self.needed
        return other

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same call with its floating-point inputs in this dtype."""
        return self.with_inputs([cast(x, dtype) for x in self.inputs])

    def label(self, point: str) -> str:
        """What a point's gradient is called in a report."""
        return f"d{point} (point)" if point in self.names else f"d{point}"

    def points(self) -> tuple[str, ...]:
        """The points of the definition, in the order in which it comes to them."""
        seen: list[str] = []

        def point(name: str, value: torch.Tensor) -> torch.Tensor:
            seen.append(name)
            return value

        with backend("reference"), torch.no_grad():
            self.reference(*self.inputs, point)
        return tuple(seen)

    def eager(self, dys: Dys | None, retain: Sequence[str]) -> Quantities:
        """Run the definition in eager PyTorch, with `retain_grad()` at these points; no backward if `dys` is None."""
        interiors: dict[str, torch.Tensor] = {}

        def point(name: str, value: torch.Tensor) -> torch.Tensor:
            if name in retain:
                value.retain_grad()
                interiors[name] = value
            return value

        leaves = self._leaves()
        with backend("reference"), torch.enable_grad():
            outputs = several(self.reference(*leaves, point))
            if dys is not None:
                torch.autograd.backward(*_differentiable(outputs, dys))
        return self._quantities(outputs, leaves, {p: x.grad for p, x in interiors.items()})

    def fused(self, op: Callable[..., Any], dys: Dys, retain: Sequence[str]) -> Quantities:
        """Run the op itself, with these points retained."""
        leaves = self._leaves()
        kept = Retained(*retain) if retain else {}
        with torch.enable_grad():
            outputs = several(op(*leaves, retain=kept) if kept else op(*leaves))
            for y in outputs:
                if not isinstance(y, torch.Tensor):
                    raise TypeError(f"check_op: {name_of(op)} returned {type(y).__name__}; expected a tensor")
            torch.autograd.backward(*_differentiable(outputs, dys))
        return self._quantities(outputs, leaves, {p: slot.grad for p, slot in kept.items()})

    def terms(self, dys: Dys, retain: Sequence[str]) -> dict[str, Terms]:
        """For each gradient that is a sum over broadcast dims, what it sums, in float64.

        The definition is run with those inputs and points expanded to the output's shape, where autograd stops short
        of the sum. A definition in which they do not broadcast has none.
        """
        wide: dict[str, tuple[torch.Tensor, torch.Size]] = {}

        def widened(name: str, x: Any) -> Any:
            if not (isinstance(x, torch.Tensor) and x.requires_grad and x.numel() < shape.numel()):
                return x
            whole = x.expand(shape)
            whole.retain_grad()
            wide[name] = whole, x.shape
            return whole

        double, shape = self.in_dtype(torch.float64), max((dy.shape for dy in dys), key=torch.Size.numel)
        try:
            with backend("reference"), torch.enable_grad():
                leaves = [widened(f"d{n}", x) for n, x in zip(self.names, double._leaves(), strict=True)]
                outputs = several(self.reference(*leaves, lambda n, x: widened(self.label(n), x) if n in retain else x))
                torch.autograd.backward(*_differentiable(outputs, tuple(dy.double() for dy in dys)))
        except RuntimeError:
            return {}
        return {
            name: Terms(shape.numel() // small.numel(), whole.grad.abs().sum_to_size(small))
            for name, (whole, small) in wide.items()
            if whole.grad is not None and small.numel()
        }

    def _leaves(self) -> list[Any]:
        """The inputs as fresh leaves over the same memory, so with the same strides."""
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in self.inputs]
        return [x.requires_grad_() if need else x for x, need in zip(detached, self.needed, strict=True)]

    def _quantities(self, outputs: Dys, leaves: Sequence[Any], of_points: Quantities) -> Quantities:
        ys = {f"y{i}" if len(outputs) > 1 else "y": y.detach() for i, y in enumerate(outputs)}
        grads = {f"d{n}": x.grad for n, x, need in zip(self.names, leaves, self.needed, strict=True) if need}
        return {**ys, **grads, **{self.label(p): grad for p, grad in of_points.items()}}


def several(outputs: Any) -> tuple[Any, ...]:
    """The outputs of a call that returns one or a tuple of them."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _differentiable(outputs: Dys, dys: Dys) -> tuple[Dys, Dys]:
    pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    return tuple(y for y, _ in pairs), tuple(dy for _, dy in pairs)


def _argument_names(reference: Callable[..., Any], count: int) -> list[str]:
    """Names of the inputs in the definition's signature; a variadic one has none to give."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(reference).parameters.values() if p.kind in positional]
    return [names[i] if i < len(names) else f"input{i}" for i in range(count)]


def name_of(op: Any) -> str:
    """What to call an op in a message."""
    return getattr(op, "__name__", None) or type(op).__name__


def is_float(x: Any) -> bool:
    """Whether this is a floating-point tensor."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in another dtype; anything else as it is."""
    return x.detach().to(dtype) if is_float(x) else x
