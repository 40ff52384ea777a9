"""What the tests of slots and of buffers share."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Path, random_leaves


@pytest.fixture
def ab(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rand = random_leaves(path.device)
    return rand(6, 50), rand(50)


def dc_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cos(a * b).detach()
