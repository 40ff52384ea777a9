"""A row of the pointwise family: how few lines it is, and that it is then an op like the others."""

from __future__ import annotations

import inspect

import pytest
import torch
import triton
from triton.language.extra import libdevice

import retainops as ro
from retainops import registry
from retainops.kernels import unary as kernels_of_rows
from retainops.kernels.unary import divide
from retainops.ops import pointwise
from retainops.registry import Op
from retainops.testing import check_op
from tests.conftest import Path
from tests.oracle import DTYPES, sample


@triton.jit
def atan(x):
    return libdevice.atan(x)


@triton.jit
def atan_grad(x, dy):
    return divide(dy, 1.0 + x * x)


ROW = {"atan": ("atan({})", torch.atan)}


@triton.jit
def wrong_atan_grad(x, dy):
    return divide(-dy, 1.0 + x * x)


def add(monkeypatch: pytest.MonkeyPatch, derivative: object) -> list[Op]:
    """Add the row, as if its functions stood in kernels/unary.py and ROW in the table."""
    monkeypatch.setattr(kernels_of_rows, "atan", atan, raising=False)
    monkeypatch.setattr(kernels_of_rows, "atan_grad", derivative, raising=False)
    monkeypatch.setitem(pointwise.UNARY, "atan", ROW["atan"])
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))
    return [pointwise.unary_of_binary(binary, "atan") for binary in pointwise.BINARY]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    return add(monkeypatch, atan_grad)


def test_a_row_is_ten_lines_or_fewer() -> None:
    functions = [inspect.getsource(f.fn).strip().splitlines() for f in (atan, atan_grad)]
    assert all(lines[0] == "@triton.jit" for lines in functions)
    assert sum(map(len, functions)) + len(ROW) <= 10  # ROW is a line of the table


def test_its_ops_are_known(added: list[Op]) -> None:
    assert [op.name for op in added] == ["mul_atan", "add_atan", "sub_atan", "div_atan"]
    assert repr(ro.points("sub_atan")) == "sub_atan: atan(a - b)\n  c = a - b   (broadcast of a and b)"
    assert "atan(a / b)" in added[3].call.__doc__
    assert list(inspect.signature(added[0].call).parameters) == ["a", "b", "retain"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_ops_are_right(kernels: Path, added: list[Op], dtype: torch.dtype) -> None:
    for op in added:
        a, b = sample(op.name, kernels.device, dtype, (5, 70), requires_grad=False)
        for inputs in ((a, b), (a[:, :1], b[0]), (a, 0.7)):
            report = check_op(op.call, *inputs, reference=op.reference)
            assert report.ok, report


def test_first_and_second_derivatives(kernels: Path, added: list[Op]) -> None:
    for op in added:
        inputs = sample(op.name, kernels.device, torch.float64, (2, 3))
        with ro.backend("auto"):
            assert torch.autograd.gradcheck(op.call, inputs)
            assert torch.autograd.gradgradcheck(op.call, inputs)


def test_a_wrong_row_is_found_out(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in add(monkeypatch, wrong_atan_grad):
        report = check_op(op.call, *sample(op.name, kernels.device, requires_grad=False), reference=op.reference)
        assert [row.name for row in report.rows if not row.ok] == ["da", "db", "dc"]
