"""A module with one of everything that `ro.fuse` finds in torch.nn, and what its steps give."""

from __future__ import annotations

import torch
from torch import nn


class Norm(nn.Module):
    """An RMSNorm as LLaMA's."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n) + 0.5)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class TinyRMSNorm(Norm):
    """Known by its name; the forward is its base's."""


class Block(nn.Module):
    """One of everything."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = TinyRMSNorm(n), nn.LayerNorm(n), nn.GroupNorm(2, n)
        self.gate, self.up, self.down = (nn.Linear(n, n) for _ in range(3))
        self.act, self.gelu = nn.SiLU(), nn.GELU()
        self.fc = nn.Linear(n, n)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        h = self.down(self.act(self.gate(h)) * self.up(h))
        x = x + h
        residual = x
        x = self.norm2(x)
        x = self.fc(x)
        x = self.gelu(x)
        return self.softmax(self.norm3(x)) + residual


OPS = {"add_norm(norm2)", "bias_act(fc, gelu)", "gated(act)", "rms_norm", "layer_norm", "group_norm", "softmax"}


POINTS = ["norm1.xhat", "norm2.summed", "norm2.xhat", "norm3.xhat", "gate", "up", "act", "c", "softmax.p"]


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradient of a projection of it with respect to x and each parameter."""
    x, parameters = x.detach().requires_grad_(), list(model.parameters())
    model.zero_grad()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), x.grad, *(p.grad.clone() for p in parameters)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
