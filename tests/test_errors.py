"""Bad input: a clear error, on every path, and nothing changed."""

from __future__ import annotations

import pytest
import torch

import retainops as ro
from tests.conftest import Path, random_leaves


@pytest.fixture
def a(path: Path) -> torch.Tensor:
    return random_leaves(path.device)(3, 4)


def test_unknown_point(path: Path, a: torch.Tensor) -> None:
    kept = ro.Retained("d")
    with pytest.raises(KeyError, match="mul_sin: unknown point 'd'; its points are: c"):
        ro.mul_sin(a, a, retain=kept)
    assert kept.d.shape is None


@pytest.mark.parametrize("retain", ["c", {"c": None}, True, ("c",)])
def test_retain_of_another_type(path: Path, a: torch.Tensor, retain) -> None:
    name = type(retain).__name__
    with pytest.raises(TypeError, match=rf'mul_sin: retain is {name}; expected retainops.Retained, such as .*"c"'):
        ro.mul_sin(a, a, retain=retain)


def test_shapes_that_do_not_broadcast(path: Path, a: torch.Tensor) -> None:
    b = torch.ones(3, device=path.device)
    with pytest.raises(RuntimeError, match=r"mul_sin: a of shape \(3, 4\) and b of shape \(3,\) do not broadcast"):
        ro.mul_sin(a, b)


def test_two_devices(path: Path, a: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=rf"mul_sin: a is on {path.device}.*, b is on meta; expected all on one"):
        ro.mul_sin(a, torch.ones(3, 4, device="meta"))


@pytest.mark.parametrize("b", ["2", None, [1.0]])
def test_neither_tensor_nor_number(path: Path, a: torch.Tensor, b) -> None:
    with pytest.raises(TypeError, match=f"mul_sin: b is {type(b).__name__}; expected a torch.Tensor or a Python"):
        ro.mul_sin(a, b)


def test_numbers_alone(path: Path) -> None:
    with pytest.raises(TypeError, match="mul_sin: a and b are all numbers; expected a torch.Tensor among them"):
        ro.mul_sin(1.0, 2.0)


def test_integer_tensors_are_as_in_eager(path: Path, a: torch.Tensor) -> None:
    i = torch.arange(4, device=path.device)
    for x, y in ((i, a), (i, i), (i, 2), (i.bool(), i)):
        ours, want = ro.mul_sin(x, y), torch.sin(x * y)
        assert ours.dtype == want.dtype
        assert torch.equal(ours, want)
    kept = ro.Retained("c")
    ro.mul_sin(i, a, retain=kept).sum().backward()  # a requires grad, so does c
    assert kept.c.grad.dtype == torch.float32


def test_complex_tensors_are_as_in_eager(path: Path, a: torch.Tensor) -> None:
    z = torch.complex(a.detach(), a.detach()).requires_grad_()
    kept = ro.Retained("c")
    ro.mul_sin(z, a, retain=kept).real.sum().backward()
    c = (z * a).detach()
    torch.testing.assert_close(kept.c.grad, torch.cos(c).conj())


def test_a_failed_call_leaves_the_request_usable(path: Path, a: torch.Tensor) -> None:
    kept = ro.Retained("c")
    with pytest.raises(RuntimeError):
        ro.mul_sin(a, torch.ones(3, device=path.device), retain=kept)
    ro.mul_sin(a, a, retain=kept).sum().backward()
    assert kept.c.grad.shape == (3, 4)
