"""What eager PyTorch compares an input with: a number, or a tensor of no dims, rounded to the input's dtype.

Interiors are held in float32, so kernels compare in float32. Of an input that is right once the other side is rounded
as eager rounds it: kernels do that to numbers (`rounded` and `compared` of kernels/elementary.py). Whether a tensor is
rounded depends on which of them have dims, which kernels do not know, so the reference is left to do it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from retainops.elementwise.clamp import TO_BOTH
from retainops.elementwise.step import Step
from retainops.elementwise.trace import Traced, sources

_EXACT = ("neg", "abs", "detach", "relu")
"""Operations whose results need no more bits than their operands."""
_PAIRS = ("maximum", "minimum")
"""They compare too, but take no numbers."""


def compared_with(traced: Traced, step: Step, i: int) -> Node | None:
    """The input that an operand is compared with, if that is compared as it is."""
    if not step.compares:
        return None
    return _input(traced, step.operands[0 if i else 1])


def needs_rounding(x: float) -> bool:
    """Whether a number is another one in 16 bits."""
    narrow = (torch.tensor(x, dtype=torch.float64).to(dtype).item() for dtype in (torch.float16, torch.bfloat16))
    return not math.isnan(x) and any(y != x for y in narrow)


def comparisons(traced: Traced) -> list[tuple[int, list[int]]]:
    """Places of inputs that are compared as they are, each with those of the inputs behind the other side."""
    found = []
    for node in traced.steps:
        step = node.meta["step"]
        for x, other in _sides(step) if step.compares or node.meta["name"] in _PAIRS else ():
            own, behind = (
                _input(traced, x),
                sources(traced, other, differentiably=False) if isinstance(other, Node) else [],
            )
            if own is not None and behind:
                found.append((traced.inputs.index(own), behind))
    return found


def refuses_comparisons(found: Sequence[tuple[int, Sequence[int]]], inputs: Sequence[Any]) -> str | None:
    """Why kernels cannot compare these inputs as eager PyTorch does, or None."""
    for place, behind in found:
        x, others = inputs[place], [inputs[i] for i in behind]
        if not isinstance(x, torch.Tensor):
            continue
        tensors = [t for t in others if isinstance(t, torch.Tensor)]
        if any(t.dtype != x.dtype for t in tensors) and _rounds(x, tensors):
            return f"a tensor of no dims is compared with an input, which rounds it to {x.dtype}"
        if not tensors and _is_wide(x, inputs):
            return f"a number is compared with an input of {x.dtype}, and the result is float64"
    return None


def shared_bounds(traced: Traced) -> list[list[int]]:
    """Of each bound that is taken for a tensor, and shares its ties, the places of the inputs behind it."""
    steps = (node.meta["step"] for node in traced.steps)
    of = (step.operands[1:] for step in steps if any(step.grads is grads for grads in TO_BOTH))
    return [
        sources(traced, bound, differentiably=False) for bounds in of for bound in bounds if isinstance(bound, Node)
    ]


def refuses_bounds(bounds: Sequence[Sequence[int]], inputs: Sequence[Any]) -> str | None:
    """Why kernels cannot share the ties with these bounds as eager PyTorch does, or None."""
    if all(any(isinstance(inputs[i], torch.Tensor) for i in behind) for behind in bounds):
        return None
    return "a bound of clamp is a number, which shares no gradient with what equals it"


def _sides(step: Step) -> Iterator[tuple[Any, Any]]:
    first, *others = step.operands
    for other in others:
        yield first, other
        yield other, first


def _input(traced: Traced, x: Any) -> Node | None:
    """The input that a value is, but for what rounds nothing."""
    while isinstance(x, Node) and "step" in x.meta and x.meta["name"] in _EXACT:
        (x,) = x.meta["step"].operands
    return x if isinstance(x, Node) and x.op == "placeholder" and x not in traced.conditions else None


def _rounds(x: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether eager PyTorch compares in x's dtype, which another one's values need not fit."""
    floats = [x, *(t for t in others if t.is_floating_point())]
    whole = [t for t in floats if t.dim()] or floats  # those of no dims have no say where there are others
    common = functools.reduce(torch.promote_types, [t.dtype for t in whole])
    return common == x.dtype and any(torch.promote_types(t.dtype, x.dtype) != x.dtype for t in floats)


def _is_wide(x: torch.Tensor, inputs: Sequence[Any]) -> bool:
    """In float64 a number is a tensor to the kernels."""
    wide = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in inputs)
    return wide and x.dtype != torch.float64
