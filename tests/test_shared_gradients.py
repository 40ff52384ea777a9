"""Gradients that are equal are written once and returned for each input, as eager PyTorch does."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from retainops.registry import find
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near


@pytest.mark.parametrize("shapes", [((7, 60), (7, 60)), ((7, 60), (60,)), ((7, 1), (7, 60))], ids=str)
def test_add_hands_one_gradient_to_both_or_sums_it(path: Path, shapes: tuple) -> None:
    rand = random_leaves(path.device)
    a, b = (rand(*shape) for shape in shapes)
    dy = rand(7, 60, requires_grad=False)
    ro.add_gelu(a, b).backward(dy)
    ours, a.grad, b.grad = (a.grad, b.grad), None, None
    torch.nn.functional.gelu(a + b).backward(dy)
    for grad, leaf in zip(ours, (a, b), strict=True):
        assert_near(grad, leaf.grad)
    assert ours[0].data_ptr() != ours[1].data_ptr()  # leaves do not share a gradient: one of them got a copy


def test_leaves_accumulate_apart(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b = rand(5, 40), rand(5, 40)
    y = ro.add_silu(a, b)
    y.sum().backward(retain_graph=True)
    with torch.no_grad():
        a.grad.zero_()
    first = b.grad.clone()
    y.sum().backward()
    assert torch.equal(a.grad, first)
    assert torch.equal(b.grad, 2 * first)


def test_mixed_dtypes_and_layouts_have_gradients_of_their_own(path: Path) -> None:
    rand = random_leaves(path.device)
    for a, b in ((rand(6, 8), rand(6, 8, dtype=torch.float64)), (rand(6, 8), rand(8, 6).detach().t().requires_grad_())):
        ro.add_relu(a, b).sum().backward()
        assert (a.grad.dtype, b.grad.dtype) == (a.dtype, b.dtype)
        assert_near(a.grad, (a + b > 0).to(a.dtype))
        assert_near(b.grad, (a + b > 0).to(b.dtype))


def test_the_gradient_that_arrives_is_the_residuals(kernels: Path) -> None:
    rand = random_leaves(kernels.device)
    x, bias, residual = rand(6, 50), rand(50), rand(6, 50)
    y = ro.bias_dropout_add(x, bias, residual, 0.25)
    dy = rand(6, 50, requires_grad=False)
    dx, dbias, dresidual = torch.autograd.grad(y, (x, bias, residual), dy)
    assert dresidual.data_ptr() == dy.data_ptr()
    assert_near(dbias, dx.sum(0), 4)


def test_fewest_bytes_count_a_shared_gradient_once() -> None:
    a, b = torch.empty(16, 16), torch.empty(16, 16)
    assert find("add_gelu").traffic(a, b)[1] == 4 * a.nbytes  # a, b, dy; one gradient
    assert find("mul_gelu").traffic(a, b)[1] == 5 * a.nbytes
    assert find("add_gelu").traffic(a, b[0])[1] == 3 * a.nbytes + 2 * b[0].nbytes
