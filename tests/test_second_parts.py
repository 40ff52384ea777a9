"""What the docs say of gradients that come in parts: by the norm and by its sum, by an op and by its first backward."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from tests.conftest import Path, random_leaves


@pytest.mark.parametrize("norm", [ro.add_rms_norm, ro.add_layer_norm])
def test_the_point_of_a_sum_has_what_comes_by_both_outputs(path: Path, norm: object) -> None:
    rand = random_leaves(path.device)
    x, residual, kept = rand(5, 40), rand(5, 40), ro.Retained("summed")
    y, summed = norm(x, residual, retain=kept)
    heard: list[torch.Tensor] = []
    summed.register_hook(lambda grad: heard.append(grad.clone()))
    (y.square().sum() * 0.1 + summed.sin().sum()).backward()
    torch.testing.assert_close(kept.summed.grad, x.grad)
    by_itself = summed.detach().cos()
    expected = x.grad if path.name == "reference" else by_itself  # there the norm is made of that tensor
    torch.testing.assert_close(heard, [expected])


def test_statistics_that_add_up_are_right_over_a_second_backward(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b = rand(5, 40), rand(40)
    kept = ro.Retained(c=ro.Stats("sum", "act_grad"))
    twice(ro.mul_sin(a, b, retain=kept), a)
    c, heard = a * b, []
    c.register_hook(lambda grad: heard.append(grad.detach()))
    twice(torch.sin(c), a)
    torch.testing.assert_close(kept.c.sum, sum(heard).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.c.act_grad, (sum(heard) * c.detach()).sum(), rtol=1e-4, atol=1e-4)


def twice(y: torch.Tensor, a: torch.Tensor) -> None:
    """A second backward, of a penalty on the gradient."""
    (da,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
    da.square().sum().backward()
