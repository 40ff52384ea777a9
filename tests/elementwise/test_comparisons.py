"""Inputs of 16 bits beside numbers and tensors of no dims, which eager PyTorch rounds to compare them."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.elementwise.clamp import TIES_ARE_SHARED
from tests.conftest import Path

BESIDE_A_CONSTANT: dict[str, Callable] = {
    "ge": lambda x: torch.where(x >= 0.1, x * 2, x * 3),
    "gt": lambda x: torch.where(x > 0.1, x * 2, x * 3),
    "eq": lambda x: torch.where(x == 0.1, x * 2, x * 3),
    "a number on the left": lambda x: torch.where(operator.lt(0.1, x), x * 2, x * 3),
    "a magnitude": lambda x: torch.where(abs(x) > 0.1, x * 2, x * 3),
    "detached": lambda x: torch.where((-x).detach() >= -0.1, x * 2, x * 3),
    "clamp": lambda x: torch.clamp(x, 0.1, 0.2),
    "clamp, least": lambda x: x.clamp(0.1),
    "clamp, most": lambda x: x.clamp(max=0.3),
}
BESIDE_AN_ARGUMENT: dict[str, Callable] = {
    "ge": lambda x, s: torch.where(x >= s, x * s, x * 3),
    "ne": lambda x, s: torch.where(x != s, x * s, x * 3),
    "on the left": lambda x, s: torch.where(s <= x, x * s, x * 3),
    "clamp": lambda x, s: torch.clamp(x, s, s * 2),
    "magnitudes": lambda x, s: torch.where(x.abs() >= abs(s), x * 2, x * 3),
}
PAIRS: dict[str, Callable] = {
    "maximum": lambda x, s: torch.maximum(x, s) * 2,
    "minimum": lambda x, s: torch.minimum(x, s) * 2,
}
NARROW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def agrees(fn: Callable, device: str, dtype: torch.dtype, *others: torch.Tensor | float) -> None:
    """Values and gradients at the numbers that are compared with, and beside them."""
    found, at = [], torch.tensor([0.1, 0.2, 0.3], dtype=dtype, device=device)
    around = torch.cat([at, at * 1.01, at * 0.99, -at])
    for f in (ro.fuse_pointwise(fn), fn):
        x = around.clone().requires_grad_()
        y = f(x, *others)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=2 * eps)


@NARROW
@pytest.mark.parametrize("name", BESIDE_A_CONSTANT)
def test_a_number_in_the_function(kernels: Path, name: str, dtype: torch.dtype) -> None:
    agrees(BESIDE_A_CONSTANT[name], kernels.device, dtype)


@NARROW
@pytest.mark.parametrize("name", BESIDE_AN_ARGUMENT)
def test_a_number_as_an_argument(kernels: Path, name: str, dtype: torch.dtype) -> None:
    # From torch 2.14 on a bound that may be a tensor is the reference's, if it is none.
    with ro.backend("auto") if name == "clamp" and TIES_ARE_SHARED else contextlib.nullcontext():
        agrees(BESIDE_AN_ARGUMENT[name], kernels.device, dtype, 0.1)


@NARROW
@pytest.mark.parametrize("name", [*BESIDE_AN_ARGUMENT, *PAIRS])
def test_a_tensor_of_no_dims_takes_the_reference(kernels: Path, name: str, dtype: torch.dtype) -> None:
    fn, s = {**BESIDE_AN_ARGUMENT, **PAIRS}[name], torch.tensor(0.1, device=kernels.device)
    x = torch.ones(3, dtype=dtype, device=kernels.device)
    assert f"which rounds it to {dtype}" in ro.explain(ro.fuse_pointwise(fn), x, s)
    with ro.backend("auto"):
        agrees(fn, kernels.device, dtype, s)


@NARROW
@pytest.mark.parametrize("name", [*BESIDE_AN_ARGUMENT, *PAIRS])
def test_tensors_that_eager_does_not_round_take_the_kernels(kernels: Path, name: str, dtype: torch.dtype) -> None:
    fn = {**BESIDE_AN_ARGUMENT, **PAIRS}[name]
    for s in (torch.tensor([0.1], device=kernels.device), torch.tensor(0.1, dtype=dtype, device=kernels.device)):
        agrees(fn, kernels.device, dtype, s)


def test_what_the_kernels_cannot_round(kernels: Path) -> None:
    x, wide = torch.ones(3, device=kernels.device), torch.ones(3, device=kernels.device, dtype=torch.float64)
    beside = ro.fuse_pointwise(lambda x, s, w: torch.where(x > s, x, 2 * x) * w)
    assert "a number is compared with an input of torch.float32" in ro.explain(beside, x, 0.1, wide)
    assert "takes the Triton kernels" in ro.explain(beside, x, 0.1, x)


def test_a_float32_input_among_float64_ones(kernels: Path) -> None:
    x = torch.tensor([0.1, 0.2], device=kernels.device)
    w = torch.ones(2, dtype=torch.float64, device=kernels.device)
    f = ro.fuse_pointwise(lambda x, w: torch.where(x > 0.1, x, 2 * x) * w)
    torch.testing.assert_close(f(x, w), torch.where(x > 0.1, x, 2 * x) * w)


def test_numbers_that_16_bits_hold_are_compared_as_they_stand() -> None:
    source = ro.fuse_pointwise(lambda x: torch.where(x > 0.5, x, x.clamp(-1, 2))).source
    assert "x > 0.5" in source
    assert "rounded" not in source
