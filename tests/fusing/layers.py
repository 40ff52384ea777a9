"""Layers, an input and a step, for the tests of activations that a forward calls as functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

Tensor = torch.Tensor


class Layers(nn.Module):
    """A gate, an up projection, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.fc = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 8)


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients, of the parameters that have some."""
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
