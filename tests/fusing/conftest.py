"""What the tests of `ro.fuse` share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from retainops.fusing.registry import RULES
from tests.fusing.blocks import Block


@pytest.fixture
def block() -> Block:
    torch.manual_seed(2)
    return Block()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.fixture
def registry() -> Iterator[None]:
    """Rules that a test adds are gone after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)
