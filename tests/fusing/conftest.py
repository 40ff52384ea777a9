"""What the tests of `ro.fuse` share."""

from __future__ import annotations

import pytest
import torch

from tests.fusing.blocks import Block


@pytest.fixture
def block() -> Block:
    torch.manual_seed(2)
    return Block()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
