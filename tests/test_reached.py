"""What no gradient reaches, and what is changed in place: as in eager PyTorch, and alike on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import retainops as ro
from retainops.registry import ops
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near, eager, is_float, sample, several

OF_ROWS = {"group_norm": (2, 4, 6), "rope": (2, 3, 5, 8)}
CASES = [
    (op.name, i)
    for op in ops()
    if op.kind == "row"
    or op.name in ("mul_sin", "swiglu", "swiglu_packed", "scale_shift", "bias_dropout_add", "softcap")
    for i, x in enumerate(sample(op.name, "cpu", shape=OF_ROWS.get(op.name, (5, 40)), requires_grad=False))
    if is_float(x) and i not in op.constants
]


@pytest.mark.parametrize(("name", "only"), CASES)
def test_with_one_input_that_requires_grad(path: Path, name: str, only: int) -> None:
    """Outputs require grad, and points can be asked for, where those of the definition can."""
    op = next(op for op in ops() if op.name == name)
    inputs = sample(name, path.device, shape=OF_ROWS.get(name, (5, 40)), requires_grad=False)
    inputs[only].requires_grad_()
    outputs, values = eager(op, inputs)
    expected = [y.requires_grad for y in several(outputs)]
    assert [y.requires_grad for y in several(op.call(*inputs))] == expected
    for point, value in values.items():
        kept = ro.Retained(point)
        if value.requires_grad:
            sum(y.sum() for y in several(op.call(*inputs, retain=kept)) if y.requires_grad).backward()
            assert kept[point].grad is not None
        else:
            with pytest.raises(RuntimeError, match=f"{name}: can't retain_grad on point '{point}'"):
                op.call(*inputs, retain=kept)


def points_that_are_outputs(device: str) -> dict[str, Any]:
    """Calls whose first output is the value of a point."""
    rand = random_leaves(device)
    x, tables = rand(2, 3, 5, 8), [rand(5, 8, requires_grad=False) for _ in "cs"]
    return {
        "q_rot": lambda kept: ro.rope(x, x, *tables, retain=kept)[0],
        "summed": lambda kept: ro.add_rms_norm(x, x, retain=kept)[1],
        "xhat": lambda kept: ro.layer_norm(x, retain=kept),
        "y": lambda kept: ro.rms_norm(x, round_first=True, retain=kept),
    }


@pytest.mark.parametrize("point", ["q_rot", "summed", "xhat", "y"])
def test_an_output_that_is_a_point_may_be_changed_in_place(path: Path, point: str) -> None:
    """Its gradient is that of the value as the op returned it."""
    call = points_that_are_outputs(path.device)[point]
    if point == "summed" and path.name != "reference":
        y = call(ro.Retained(point))
        y.mul_(3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the kernels keep it for backward
            y.sum().backward()
        return
    kept = ro.Retained(point)
    y = call(kept)
    y.mul_(3)
    y.sum().backward()
    assert_near(kept[point].grad, torch.full_like(kept[point].grad, 3.0))
