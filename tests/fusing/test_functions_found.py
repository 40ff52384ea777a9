"""Activations that a forward calls as functions: found where the name is that of one, or a library's method is."""

from __future__ import annotations

import copy
import functools
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from retainops.fusing import _probe
from tests.fusing import layers
from tests.fusing.blocks import assert_same
from tests.fusing.layers import Layers, steps

Tensor = torch.Tensor
x = layers.x  # a fixture


def gelu(x: Tensor) -> Tensor:
    """Not PyTorch's."""
    return 2 * x


class Own(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.fc(x))


class Shadowed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        F = self
        return F.relu(self.fc(x))

    def relu(self, x: Tensor) -> Tensor:
        return 2 * x


class InPlace(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x), inplace=True)


act = nn.GELU()


class OfTheFile(Layers):
    """Its activation is a module of the file, which `unfuse` would not find."""

    def forward(self, x: Tensor) -> Tensor:
        return act(self.fc(x))


@pytest.mark.parametrize("cls", [Own, Shadowed, InPlace, OfTheFile], ids=lambda cls: cls.__name__)
def test_what_is_something_else(cls: type[nn.Module]) -> None:
    assert not ro.fuse(cls())
    assert not [name for name in vars(act) if "retainops" in name]


class Halved(nn.Module):
    """As diffusers' GEGLU, whose activation is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 16)

    def gelu(self, gate: Tensor) -> Tensor:
        return F.gelu(gate.float()).to(gate.dtype) if gate.device.type == "mps" else F.gelu(gate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        x, gate = x.chunk(2, dim=-1)
        return x * self.gelu(gate)


class Formed(nn.Module):
    """As diffusers' GELU, whose method has a form."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.fc, self.approximate = nn.Linear(8, 8), approximate

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = self.gelu(x)
        return x  # noqa: RET504  (the lines are what it is about)


class Sloped(Formed):
    """Its method reads something that may be set to another value at any time."""

    slope = 1.0

    def gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x * getattr(self, "slope", 1.0))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file counts as a library's."""
    monkeypatch.setattr(_probe, "LIBRARIES", ("tests",))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("build", "op", "point"),
    [
        (Halved, "gated(gelu)", "gate"),
        (Formed, "bias_act(fc, gelu)", "c"),
        (functools.partial(Formed, "none"), "bias_act(fc, gelu)", "c"),
    ],
)
def test_methods(build: Any, op: str, point: str, x: Tensor) -> None:
    torch._dynamo.reset()
    model = build()
    theirs = steps(model, x)
    assert [row.op for row in ro.fuse(model)] == [op]
    values: list[Tensor] = []
    others = pickle.loads(pickle.dumps(model)), torch.compile(model, fullgraph=True, backend="aot_eager")
    for other in (model, copy.deepcopy(model), *others):
        with ro.retain(other) as kept:
            assert_same(steps(other, x), theirs)
        values.append(kept[point].grad)
    ro.unfuse(model)
    assert "retainops" not in str(vars(model))
    original = model.gelu

    def seen(value: Tensor) -> Tensor:
        value.retain_grad()
        values.append(value)
        return original(value)

    model.gelu = seen
    steps(model, x)
    for grad in values[:-1]:
        torch.testing.assert_close(grad, values[-1].grad)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("attribute", ["approximate", "gelu"])
def test_a_method_that_computes_something_else_later(attribute: str, x: Tensor) -> None:
    model = Formed()
    ro.fuse(model)
    setattr(model, attribute, {"approximate": "none", "gelu": torch.sin}[attribute])
    with ro.retain(model) as kept:
        ours = steps(model, x)
    assert kept.c.grad is not None
    vars(model).pop("gelu", None)
    ro.unfuse(model)
    if attribute == "gelu":
        model.gelu = torch.sin
    assert_same(ours, steps(model, x))


def test_methods_that_are_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ro.fuse(Halved())  # somebody's own, which may do more than to return a value
    monkeypatch.setattr(_probe, "LIBRARIES", ("tests",))
    assert not ro.fuse(Sloped())


class Lazy:
    """As a package that is loaded when it is asked for something, and cannot be."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


lazy = Lazy()


class Looked(Layers):
    """Calls that `ro.fuse` sees, and must not make."""

    computed = 0

    @functools.cached_property
    def act(self) -> Any:
        self.computed += 1
        raise RuntimeError("not yet")

    def forward(self, x: Tensor) -> Tensor:
        return lazy.act(self.fc(x)) if self.training else self.act(self.fc(x))


def test_to_look_has_no_effect() -> None:
    model = Looked()
    assert not ro.fuse(model)
    assert model.computed == 0


class InLambda(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return sum(map(lambda t: F.gelu(self.fc(t)), x.split(1)))  # noqa: C417  (a lambda is what it is about)


class OfAnother(Layers):
    def forward(self, x: Tensor) -> Tensor:
        def run(self: Any, x: Tensor) -> Tensor:
            return F.gelu(self.fc(x))

        return run(SimpleNamespace(fc=lambda x: 2 * x), x)


def test_functions_inside_a_forward(x: Tensor) -> None:
    (row,) = ro.fuse(InLambda())
    assert row.why == "bias_act(fc, F.gelu): it is in a loop, and its points would be of several calls"
    model = OfAnother()
    assert not ro.fuse(model)  # that self is another one
    assert torch.equal(model(x), F.gelu(2 * x))


class NoUnit(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gate(x)) * self.up(x) + F.gelu(self.up(x))


class Guarded(nn.Module):
    """A property that is called has effects of its own, and is not looked at."""

    @property
    def act(self) -> Any:
        raise ZeroDivisionError

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * x


def test_what_is_said() -> None:
    assert [row.why for row in ro.fuse(NoUnit())] == [
        "gated(torch.tanh): it is tanh, and there is no gated unit of it",
        "bias_act(gate, torch.tanh): gate has no bias to fuse with tanh",
        "bias_act(up, F.gelu): up has no bias to fuse with gelu",
    ]
    assert not ro.fuse(Guarded())
