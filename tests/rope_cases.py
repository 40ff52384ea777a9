"""What the tests of rope share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retainops.ops.rope import ROPE
from tests.oracle import all_points, assert_near, clones, eager, random_like


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def angles(*shape: int, device: str = "cpu") -> torch.Tensor:
    return 3 * drawn(*shape, dtype=torch.float64, device=device, seed=5)


def tables(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of an angle for each element: those of a pair need not be the same ones."""
    theta = angles(*shape, device=device)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def inputs(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    interleaved: bool = False,
    half_tables: bool = False,
    seq: int = 20,
    rot: int = 12,
    dim: int = 16,
) -> list[Any]:
    """Of 2 batches, with 4 heads of q and 2 of k, transposed as models have them, and partial rotary embedding."""
    q, k = (drawn(2, seq, heads, dim, dtype=dtype, device=device, seed=heads) for heads in (4, 2))
    cos, sin = tables(2, seq, rot // 2 if half_tables else rot, dtype=dtype, device=device)
    return [*(x.transpose(1, 2).requires_grad_() for x in (q, k)), cos, sin, interleaved, half_tables]


def gradients(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [random_like(y, seed) for seed, y in enumerate(outputs)]


def compare(*ours: Any, dys: Sequence[torch.Tensor] | None = None, scale: float = 1.0) -> None:
    """Outputs, gradients and retained gradients are eager's."""
    theirs, kept = clones(ours), all_points(ROPE)
    outputs = ROPE.call(*ours, retain=kept)
    want, values = eager(ROPE, theirs)
    dys = gradients(outputs) if dys is None else dys
    torch.autograd.backward(outputs, dys)
    torch.autograd.backward(want, dys)
    for y, w in zip(outputs, want, strict=True):
        assert_near(y, w, scale)
        assert y.stride() == w.stride()
    for x, t in zip(ours[:2], theirs[:2], strict=True):
        assert_near(x.grad, t.grad, 2 * scale)
        x.grad = None
    for name, value in values.items():
        assert torch.equal(kept[name].grad, value.grad)
