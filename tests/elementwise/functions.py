"""A fused function with interiors of several shapes, the same in eager PyTorch, and a tensor that is no parameter."""

from __future__ import annotations

import torch

import retainops as ro

WEIGHT = torch.ones(3)


@ro.fuse_pointwise
def gate(a, b, bias, scale: float = 0.5):
    """A gate."""
    c = a * b
    h = torch.tanh(c + bias)
    t = torch.sigmoid(bias) * scale
    return h * torch.sigmoid(c) + t


def eager_gate(a, b, bias, scale=0.5):
    c = a * b
    h = torch.tanh(c + bias)
    t = torch.sigmoid(bias) * scale
    return h * torch.sigmoid(c) + t, {"c": c, "h": h, "t": t}
