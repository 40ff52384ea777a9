"""What the tests of cross_entropy alone share: logits, targets, and a loss with its gradient."""

from __future__ import annotations

from typing import Any

import torch


def drawn(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 3.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return (scale * x).to(device, dtype)


def targets(classes: int, *shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(classes)).to(device)


def with_gradient(loss: Any, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """A loss, and the gradient of the first input."""
    x = inputs[0].detach().requires_grad_()
    y = loss(x, *inputs[1:], **options)
    (dx,) = torch.autograd.grad(y, x, torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape))
    return y.detach(), dx
