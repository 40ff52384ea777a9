"""The examples run, and compute what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def noise() -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="examples draw, and matplotlib is not installed")
    return runpy.run_path(str(EXAMPLES / "gradient_noise_scale.py"))


def test_the_gradient_noise_scale_example_trains_and_draws(
    noise: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise["main"](steps=12, layers=1, out=tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    first, last = capsys.readouterr().out.split("loss ")[1].split(" nats")[0].split(" -> ")
    assert float(last) < float(first)


def test_the_noise_scale_is_that_of_the_gradients_that_were_drawn(noise: dict[str, Any]) -> None:
    """Tokens' gradients of mean G and covariance S: on average over many batches tr(S) and |G|^2, without bias."""
    torch.manual_seed(0)
    tokens, size = 16, 8
    mean = torch.randn(size, dtype=torch.float64)
    pairs = []
    for _ in range(4000):
        rows = (mean + 2.0 * torch.randn(tokens, size, dtype=torch.float64)) / tokens  # of a mean over tokens
        pairs.append(noise["noise_scale"](rows.norm(dim=1), rows.sum(0)))
    trace, square = torch.tensor(pairs, dtype=torch.float64).mean(0)
    torch.testing.assert_close(trace, torch.tensor(4.0 * size, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(square, mean.square().sum(), rtol=0.05, atol=0)
