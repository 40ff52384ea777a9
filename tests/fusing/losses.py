"""What the tests of losses in a forward share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

N, V = 6, 10


class Model(nn.Module):
    """A projection, and a loss as it is written in many places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(8, V)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)


@pytest.fixture
def target() -> torch.Tensor:
    return torch.tensor([1, 9, -100, 0, 3, 3])
