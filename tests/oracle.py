"""What eager PyTorch does: the reference, run by autograd, with `retain_grad()` at its points."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

import retainops as ro
from retainops.points import unretained
from retainops.registry import Op, find, ops

EVERY_OP = [op.name for op in ops() if op.kind == "elementwise"]
FAMILY = EVERY_OP
"""The elementwise ops."""
OPS = ["mul_sin", "softcap", "mish", "bias_dropout_add", "swiglu", "swiglu_packed"]
"""One op of each kind: of one and of several inputs, of one and of several points, and what has host code of its own.

Every op is held to the same semantics. Those of one kind differ in their maths alone, which tests/test_family.py tests
for each.
"""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sample(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    shape: Sequence[int] = (7, 150),  # one whole tile of 1024 elements and a ragged one
    *,
    seed: int = 6,
    requires_grad: bool = True,
) -> list[Any]:
    """Inputs of an op whose output has this shape: floating-point leaves, and whatever else it takes.

    Of no dims where the shape has none, whether or not the op takes that.
    """
    shape = (*shape[:-1], shape[-1] * widening(name)) if shape else ()
    made = find(name).sample(torch.Size(shape), dtype, device, torch.Generator().manual_seed(seed))
    constants = find(name).constants
    return [x.requires_grad_(requires_grad and i not in constants) if is_float(x) else x for i, x in enumerate(made)]


@functools.cache
def widening(name: str) -> int:
    """How many times wider than its output an op's inputs are: 2 for a packed tensor."""
    if find(name).kind != "elementwise":
        return 1
    inputs = find(name).sample(torch.Size((4,)), torch.float32, "cpu", torch.Generator())
    return 4 // find(name).reference(*inputs, unretained).shape[-1]


def is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def refusal(op: Op, inputs: Sequence[Any]) -> type[Exception] | None:
    """What eager PyTorch raises at these inputs, or None."""
    try:
        op.reference(*clones(inputs), unretained)
    except (RuntimeError, ValueError, IndexError, TypeError) as e:
        return type(e)
    return None


def random_like(y: torch.Tensor, seed: int = 9) -> torch.Tensor:
    """A gradient for y."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


def eager(op: Op, inputs: Sequence[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(output, {point: its value, retaining its grad})."""
    values: dict[str, torch.Tensor] = {}

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.requires_grad:
            value.retain_grad()
        values[name] = value
        return value

    return op.reference(*inputs, point), values


def leaves(inputs: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def clones(inputs: Sequence[Any]) -> list[Any]:
    """Fresh leaves with the same values and layout."""
    return [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]


def all_points(op: Op) -> ro.Retained:
    return ro.Retained(*(p.name for p in op.points))


def assert_near(ours: torch.Tensor, eagers: torch.Tensor, scale: float = 1.0) -> None:
    """Equal up to the rounding of both: 4 ulp of the dtype at the largest magnitude (eager rounds its interiors too).

    For exactness against float64 there is `check_op`; this is for tests about something else.
    """
    assert ours.shape == eagers.shape
    assert ours.dtype == eagers.dtype
    torch.testing.assert_close(ours.isnan(), eagers.isnan())
    if ours.numel():
        top = eagers.detach().abs().nan_to_num(0, 0, 0).max().item()
        bound = 4 * torch.finfo(eagers.dtype).eps * max(top, 1e-3) * scale
        torch.testing.assert_close(ours, eagers, rtol=0, atol=bound, equal_nan=True)


def several(outputs: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of an op of one or of several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
