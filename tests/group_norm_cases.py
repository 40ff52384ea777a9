"""What the tests of group_norm share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from retainops.ops.group_norm import GROUP_NORM, group_norm
from tests.oracle import all_points, assert_near, clones, eager, leaves, random_like

CHANNELS_LAST = torch.channels_last


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def inputs_of(x: torch.Tensor, groups: int) -> list[Any]:
    w, b = (drawn(x.shape[1], dtype=x.dtype, device=x.device.type, seed=s) for s in (4, 5))
    return [x.detach().requires_grad_(), groups, w, b, 1e-3]


def compare(*ours: Any, scale: float = 1.0, dy: Callable[[torch.Tensor], torch.Tensor] = random_like) -> None:
    """Output, gradients and retained gradient are eager's, and lie as they do in eager."""
    theirs, kept = clones(ours), all_points(GROUP_NORM)
    y = group_norm(*ours, retain=kept)
    want, values = eager(GROUP_NORM, theirs)
    assert_near(y, want, 4 * scale)
    assert y.stride() == want.stride()
    y.backward(dy(y))
    want.backward(dy(y))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 8 * scale)
    assert_near(kept.xhat.grad, values["xhat"].grad, 4 * scale)
