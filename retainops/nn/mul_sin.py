"""MulSin: the module of mul_sin."""

from __future__ import annotations

import torch
from torch import nn

from retainops.nn.point import HoldsPoints
from retainops.ops.mul_sin import MUL_SIN


class MulSin(HoldsPoints):
    """sin(x * scale) in one kernel, the activation of SIREN; its point is c = x * scale.

    Args:
        scale: a number, or a tensor that broadcasts with x. An `nn.Parameter` is learned; another tensor is a buffer.

    Raises:
        TypeError: `scale` is neither a number nor a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 64), ro.nn.MulSin(30.0), nn.Linear(64, 3))
        >>> with ro.retain(model, "1.c", ro.Stats("l2")) as kept:
        ...     model(x).sum().backward()
        >>> kept["1.c"].l2
    """

    op = MUL_SIN

    def __init__(self, scale: float | torch.Tensor) -> None:
        super().__init__()
        if isinstance(scale, nn.Parameter) or not isinstance(scale, torch.Tensor):
            if not isinstance(scale, (int, float, torch.Tensor)):
                raise TypeError(f"MulSin: scale is {type(scale).__name__}; expected a number or a torch.Tensor")
            self.scale = scale
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale if isinstance(self.scale, (int, float)) else tuple(self.scale.shape)}"
