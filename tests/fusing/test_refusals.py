"""Modules that look like what a rule is for and are not, or are by now another thing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.fusing.test_mechanics import TinyRMSNorm, assert_same, run


class Acts(nn.Module):
    """A linear layer and an activation."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 8) * 30


def gelu_10() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_10"]


class Unhashable:
    """An activation that no dict can have as a key."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


NOT_KNOWN: dict[str, Callable[[], Any]] = {
    "cut off at 6": nn.ReLU6,
    "cut off at 20": lambda: nn.Hardtanh(0, 20.0),
    "cut off at 10": gelu_10,
    "a slope": lambda: nn.LeakyReLU(0.0),
    "a threshold": lambda: nn.Threshold(0, 0),
    "no hash": Unhashable,
}


@pytest.mark.parametrize("act", NOT_KNOWN)
def test_activations_that_are_others_far_out_or_later(act: str, x: torch.Tensor) -> None:
    model = Acts(NOT_KNOWN[act]())
    theirs = run(model, x)
    assert not ro.fuse(model)
    assert_same(run(model, x), theirs)


def doubled(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return wrapper


@pytest.mark.parametrize("cls", [Acts, nn.LayerNorm, nn.Softmax, TinyRMSNorm], ids=lambda cls: cls.__name__)
def test_a_forward_that_was_wrapped_on_its_class(cls: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, "forward", doubled(cls.forward))
    model = nn.Sequential(cls({Acts: nn.GELU(), nn.Softmax: -1}.get(cls, 8)))
    theirs = run(model, x)
    table = ro.fuse(model)
    assert not table.replaced
    assert len(table.left) == 1
    assert_same(run(model, x), theirs)


class Gated(nn.Module):
    """The gate is used once more after its activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.fc = act, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, y = self.fc(x), x
        return self.act(g) * y + g


class Packed(nn.Module):
    """The same of a packed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        up = up * self.act(gate)
        return up + gate


class Private(nn.Module):
    """Python spells its attribute as _Private__scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.GELU()
        self.__scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x)) * self.__scale


def test_a_gate_that_is_used_later(x: torch.Tensor) -> None:
    model = Gated(nn.ReLU(inplace=True))
    theirs = run(model, x)
    assert [row.why for row in ro.fuse(model)] == ["gated(act): act works in place, on a gate that may be used later"]
    assert_same(run(model, x), theirs)
    model = Gated(nn.ReLU())
    assert len(ro.fuse(model).replaced) == 1
    model.act.inplace = True
    theirs = run(model, x)
    ro.unfuse(model)
    assert_same(theirs, run(model, x))
    model, theirs = Packed(), run(Packed(), x)
    ro.fuse(model)
    assert_same(run(model, x), theirs)


def test_private_names(x: torch.Tensor) -> None:
    model = Private()
    theirs = run(model, x)
    assert all("its method forward has the private name __scale" in row.why for row in ro.fuse(model))
    assert_same(run(model, x), theirs)
