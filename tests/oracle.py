"""What eager PyTorch does: the reference, run by autograd, with `retain_grad()` at its points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import retainops as ro
from retainops.registry import Op, ops

OPS = [op.name for op in ops()]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
