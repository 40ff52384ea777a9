"""Modules of softmax, log_softmax and rope: beside PyTorch's, inside a model, copied and stored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.ops.rope import ROPE
from tests.conftest import Path
from tests.oracle import assert_near, eager, random_like
from tests.rope_cases import tables
from tests.softmax_cases import boolean, drawn


@pytest.mark.parametrize("dim", [-1, 2, 0, -2])
def test_softmax_modules_are_pytorchs(dim: int, path: Path) -> None:
    x = drawn(3, 4, 5, device=path.device)
    for ours, theirs in ((ro.nn.Softmax(dim), nn.Softmax(dim)), (ro.nn.LogSoftmax(dim), nn.LogSoftmax(dim))):
        y = ours(x)
        assert_near(y, theirs(x))
        dy = random_like(y)
        assert_near(*torch.autograd.grad(y, x, dy), *torch.autograd.grad(theirs(x), x, dy), 2)
        assert ours.state_dict() == theirs.state_dict() == {}


class Attention(nn.Module):
    """Of grouped queries: two heads to each head of the keys; and logarithms of probabilities as output."""

    def __init__(self, scale: float | nn.Parameter = 0.35) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 64)
        self.rope = ro.nn.Rope(half_tables=True)
        self.weights = ro.nn.Softmax(scale=scale, causal=True)
        self.out = nn.Sequential(nn.Linear(32, 10), ro.nn.LogSoftmax())

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.qkv(x).split([32, 16, 16], -1)]

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = self.heads(x)
        q, k = self.rope(q, k, cos, sin)
        p = self.weights(q.unflatten(1, (-1, 2)) @ k.unsqueeze(2).mT, mask)
        return self.out((p @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).flatten(2))

    def in_pytorch(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output and the points, which retain their gradients."""
        q, k, v = self.heads(x)
        (q, k), points = eager(ROPE, [q, k, cos, sin, False, True])
        scaled = (q.unflatten(1, (-1, 2)) @ k.unsqueeze(2).mT * self.weights.scale).masked_fill(~mask, -torch.inf)
        p = torch.softmax(scaled, -1)
        logits = self.out[0]((p @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).flatten(2))
        for value in (scaled, p, logits):
            value.retain_grad()
        points = {f"rope.{name}": value for name, value in points.items()}
        return torch.log_softmax(logits, -1), {
            **points,
            "weights.scaled": scaled,
            "weights.p": p,
            "out.1.scaled": logits,
        }


@pytest.mark.parametrize("scale", ["a number", "learned"])
def test_points_of_a_model(scale: str, path: Path) -> None:
    torch.manual_seed(1)
    model = Attention(nn.Parameter(torch.tensor(0.35)) if scale == "learned" else 0.35).to(path.device)
    x, given = drawn(2, 6, 32, device=path.device), tables(6, 4, device=path.device)
    mask = boolean(2, 1, 1, 1, 6, device=path.device)
    names = ["rope.q_rot", "rope.k_rot", "weights.scaled", "weights.p", "out.1.scaled"]
    assert list(ro.points(model)) == names
    with ro.retain(model, "*") as kept:
        y = model(x, *given, mask)
        dy = random_like(y)
        y.backward(dy)
    grads = {name: w.grad for name, w in model.named_parameters()}
    model.zero_grad()
    want, values = model.in_pytorch(x, *given, mask & torch.ones(6, 6, dtype=torch.bool, device=path.device).tril())
    want.backward(dy)
    assert_near(y, want, 4)
    for name, w in model.named_parameters():
        assert_near(grads[name], w.grad, 8)
    assert list(values) == names
    for name, value in values.items():
        assert_near(kept[name].grad, value.grad, 8)


def test_some_points_of_a_model(path: Path) -> None:
    model = Attention().to(path.device)
    with ro.retain(model, "*.scaled", ro.Stats("l2", over="rows")) as kept:
        model(drawn(2, 6, 32, device=path.device), *tables(6, 4, device=path.device)).sum().backward()
    assert {name: tuple(slot.l2.shape) for name, slot in kept.items()} == {
        "weights.scaled": (2, 2, 2, 6),
        "out.1.scaled": (2, 6),
    }


def test_copied_and_stored() -> None:
    model, other = (Attention(nn.Parameter(torch.tensor(scale))) for scale in (0.35, 0.5))
    assert set(model.state_dict()) == {f"{layer}.{w}" for layer in ("qkv", "out.0") for w in ("weight", "bias")} | {
        "weights.scale"
    }
    other.load_state_dict(model.state_dict())
    x, given = drawn(2, 6, 32), tables(6, 4)
    for one in (other, copy.deepcopy(model)):
        assert torch.equal(one(x, *given), model(x, *given))


def test_shown_and_refused() -> None:
    assert repr(ro.nn.Softmax(scale=0.5, causal=True)) == "Softmax(dim=-1, scale=0.5, causal=True)"
    assert repr(ro.nn.LogSoftmax(1)) == "LogSoftmax(dim=1)"
    assert repr(ro.nn.Rope()) == "Rope()"
    assert repr(ro.nn.Rope(interleaved=True, half_tables=True)) == "Rope(interleaved=True, half_tables=True)"
    with pytest.raises(TypeError, match="LogSoftmax: dim is NoneType; expected an integer"):
        ro.nn.LogSoftmax(None)
    with pytest.raises(TypeError, match="Rope: interleaved is int; expected True or False"):
        ro.nn.Rope(interleaved=1)
