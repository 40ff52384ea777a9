"""A small model with points, and what PyTorch's own `retain_grad()` says of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.readings import Readings
from tests.conftest import random_leaves
from tests.oracle import assert_near

D = 6
ACTS = ["layers.0.act", "layers.1.act"]
SINES = ["layers.0.sine.c", "layers.1.sine.c"]
IN_BLOCKS = ["layers.0.act", "layers.0.sine.c", "layers.1.act", "layers.1.sine.c"]
ALL = [*IN_BLOCKS, "out"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.sine = nn.Linear(D, D), ro.nn.Point(), ro.nn.MulSin(nn.Parameter(torch.rand(D) + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sine(self.act(self.lin(x)))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.out = ro.nn.Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def oracle(model: Model, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Each point's gradient of `scale * model(x).sum()` by PyTorch's own retain_grad()."""
    values: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> torch.Tensor:
        value.retain_grad()
        values[name] = value
        return value

    for i, block in enumerate(model.layers):
        act = keep(f"layers.{i}.act", block.lin(x))
        x = torch.sin(keep(f"layers.{i}.sine.c", act * block.sine.scale))
    inputs = [*model.parameters()]
    before = [p.grad for p in inputs]
    (keep("out", x + 0).sum() * scale).backward()
    for p, grad in zip(inputs, before, strict=True):
        p.grad = grad
    return {name: value.grad for name, value in values.items()}


def make(device: str = "cpu", blocks: int = 2) -> tuple[Model, torch.Tensor]:
    torch.manual_seed(3)
    return Model(blocks).to(device), random_leaves(device)(4, D, requires_grad=False)


def assert_kept(kept: ro.Retained, expected: dict[str, torch.Tensor], names: list[str]) -> None:
    assert list(kept) == names
    for name in names:
        assert_near(kept[name].grad, expected[name], 4)


def requests_in(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, ro.nn.HoldsPoints) and m._requests]


def steps_of_two_sizes(call: Callable, x: torch.Tensor) -> None:
    for part in (x, x[:3]):
        call(part).sum().backward()


Steps = list[tuple[int, Readings]]


def collect() -> tuple[Steps, Callable[[int, Readings], None]]:
    """A sink of a watcher, and what comes to it."""
    steps: Steps = []
    return steps, lambda step, readings: steps.append((step, readings))


def train(model: nn.Module, x: torch.Tensor, watcher: ro.Watcher, steps: int, scale: float = 1.0) -> None:
    """Steps of a loop that is watched."""
    for _ in range(steps):
        (model(x).sum() * scale).backward()
        model.zero_grad()
        watcher.step()


def assert_read(readings: Readings, expected: dict[str, torch.Tensor], names: list[str]) -> None:
    assert list(readings) == names
    for name in names:
        assert readings[name]["l2"] == pytest.approx(expected[name].norm().item(), rel=1e-5)
        assert readings[name]["nonfinite"] == 0
        assert isinstance(readings[name]["nonfinite"], int)
