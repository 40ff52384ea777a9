"""Norms that people write themselves: what they compute fused, what is left, and what is called as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from tests.fusing.blocks import assert_same, run
from tests.fusing.own_norms import (
    MAKERS,
    OPS,
    WRITTEN,
    GammaRMS_Norm,
    LayerNorm,
    N,
    Scaled,
    WeightlessRMSNorm,
    data,
    drawn,
)

Tensor = torch.Tensor
over_norms = pytest.mark.parametrize("name", OPS)


@over_norms
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    model, x = MAKERS[name]().to(dtype), data(dtype)
    theirs, keys = run(model, x), list(model.state_dict())
    assert [row.op for row in ro.fuse(model)] == [OPS[name]]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        for ours, expected in zip(run(other, x), theirs, strict=True):
            eps = torch.finfo(dtype).eps
            if dtype == torch.float64 and name in {*WRITTEN, "torchtune, calling"}:  # they go by float32
                eps = torch.finfo(torch.float32).eps
            scale = max(1.0, expected.abs().max().item())  # that of the terms: they cancel in x's gradient
            torch.testing.assert_close(ours, expected, rtol=0, atol=4 * eps * scale)
    ro.unfuse(model)
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), theirs, strict=True))


@over_norms
@pytest.mark.parametrize("compiled", [False, True])
def test_the_point(name: str, compiled: bool) -> None:
    model, x = MAKERS[name](), data()
    theirs = run(model, x)
    weight = next((p.detach() for p in model.parameters()), torch.ones(N))
    ro.fuse(model)
    torch._dynamo.reset()
    call: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    call.parameters, call.zero_grad = model.parameters, model.zero_grad
    with ro.retain(model, "xhat") as kept:
        assert_same(run(call, x), theirs)
    dy = torch.linspace(-1, 1, x.numel()).view_as(x)
    torch.testing.assert_close(kept["xhat"].grad, dy * (weight + ("offset" in name)))


@pytest.mark.parametrize("name", ["torchtune", "LitGPT, offset", "around the mean", "no weight, written"])
def test_a_sum_and_its_norm(name: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = WRITTEN[name]()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + x.flip(0))

    model, x = Sum(), data()
    theirs = run(model, x)
    assert {row.op for row in ro.fuse(model)} == {"add_norm(norm)", OPS[name]}
    with ro.retain(model) as kept:
        assert_same(run(model, x), theirs)
    assert {"norm.summed", "norm.xhat"} <= set(kept)
    assert all(slot.grad is not None for slot in kept.values())


def test_a_tensor_that_is_no_weight() -> None:
    """It has the name of one, and the forward does not read it."""
    norm, x = WeightlessRMSNorm(), data()
    norm.scale = torch.full((N,), 2.0)
    expected = norm(x)
    assert [row.op for row in ro.fuse(norm)] == ["rms_norm"]
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.GroupNorm(2, 4), lambda: nn.RMSNorm(N), lambda: nn.LayerNorm(N)])
def test_vmap(make: Callable[[], nn.Module]) -> None:
    norm, x = make(), torch.randn(3, 2, 4, 5, N)
    expected = torch.func.vmap(norm)(x)
    ro.fuse(norm)
    torch.testing.assert_close(torch.func.vmap(norm)(x), expected)


# What is left, and what is called as it was


class FixedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = drawn()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * N**0.5 * self.g


class NarrowRMSNorm(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale


class StrangeRMSNorm(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.mine = self.scale
        del self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.mine


class RoundedRMSNorm(nn.Module):
    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype)


class GatedRMSNorm(Scaled):
    """All in one class, as those of Mamba."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * gate
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.scale


class Looped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.layer_norm(x, (N,))
        return x


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (N,)) + F.rms_norm(x, (N,))


LEFT: dict[type[nn.Module], list[str]] = {
    FixedRMSNorm: ["it has no number as its variance_epsilon, eps, epsilon or norm_eps"],
    NarrowRMSNorm: ["in 16 bits it rounds in other places than any norm of retainops"],
    StrangeRMSNorm: ["its weight is called mine, and none of weight, scale, gamma, gain, alpha, g, w"],
    RoundedRMSNorm: ["in 16 bits it rounds in other places than any norm of retainops"],
    GatedRMSNorm: ["its forward takes more than its input: gate"],
    Looped: ["functional_norm(F.layer_norm): it is in a loop, and its points would be of several calls"],
    Twice: ["", "functional_norm(F.rms_norm): a second of its kind, whose points would have the same names"],
}


@pytest.mark.parametrize("cls", LEFT, ids=lambda cls: cls.__name__)
def test_what_is_left_is_said(cls: type[nn.Module]) -> None:
    model, x = cls(), data()
    theirs = run(model, x)
    assert [row.why for row in ro.fuse(model)] == LEFT[cls]
    assert_same(run(model, x), theirs)


class Any_(nn.Module):
    """A call with whatever it is given."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        return F.layer_norm(*args, **named)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (((2, N),), r"it is over the dims \(2, 8\), and the op takes the last one alone"),
        (((N,), None, None, 0.0), "its eps is 0.0; the op takes a number above 0"),
    ],
)
def test_calls_that_no_op_takes(args: tuple[Any, ...], why: str) -> None:
    """The function itself is called; to ask for what it does not give is an error."""
    model, x = Any_(), torch.randn(3, 2, N, requires_grad=True)
    ro.fuse(model)
    assert torch.equal(model(x, *args), F.layer_norm(x, *args))
    with ro.retain(model) as kept:
        with torch.no_grad():
            model(x, *args)
        with pytest.raises(
            RuntimeError, match=f"'xhat' is asked for, and no op stands for its call of layer_norm: {why}"
        ):
            model(x, *args)
        model(x, (N,)).sum().backward()
    assert kept["xhat"].grad is not None


def test_errors_are_pytorchs() -> None:
    model = Any_()
    ro.fuse(model)
    for args in (
        (torch.ones(2, N), (N + 1,)),
        (torch.ones(2, N), (N,), torch.ones(1)),
        (torch.ones(2, N), N),
        (3, (N,)),
    ):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            F.layer_norm(*args)
        with pytest.raises(theirs.type) as ours:
            model(*args)
        assert str(ours.value) == str(theirs.value)


def test_a_function_that_is_exchanged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = LayerNorm(), data().requires_grad_()
    ro.fuse(model)
    monkeypatch.setattr(F, "layer_norm", lambda x, *others: x * 3)
    assert torch.equal(model(x), x * 3)
    with ro.retain(model), pytest.raises(RuntimeError, match="it is another function than when the model was fused"):
        model(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    parts = [torch.randn(n, N) for n in (2, 3)]
    model = LayerNorm()
    expected = [model(part) for part in parts]
    ro.fuse(model)
    for ours, theirs in zip(model(torch.nested.nested_tensor(parts, layout=layout)).unbind(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_name_that_it_has_for_something_else() -> None:
    """A number named scale beside the weight, set when the norm is fused or later."""
    model, x = GammaRMS_Norm(), data()
    theirs = run(model, x)
    ro.fuse(model)
    model.weight = 5.0
    assert_same(run(model, x), theirs)
