"""Softmax and LogSoftmax: modules of softmax and log_softmax."""

from __future__ import annotations

import torch

from retainops.nn._held import Held, hold, shown
from retainops.nn.point import HoldsPoints
from retainops.ops.softmax import LOG_SOFTMAX, SOFTMAX


class Softmax(HoldsPoints):
    """softmax(scale * x) in one kernel, masked; its points are scaled = scale * x, masked, and p, the output.

    With a dim alone it is `torch.nn.Softmax`. Along another dim than the last, x is viewed with that dim last; a mask
    and the points go with the view.

    Args:
        dim: the dim to normalise.
        scale: a number, or a floating-point tensor of no dims (for which the reference path is taken). An
            `nn.Parameter` is learned; another tensor is a buffer.
        causal: as of `softmax`.

    Shapes:
        x and the output: (..., n), n in dim; mask: what broadcasts to x, or None.

    Raises:
        TypeError: `dim` is not an integer, or `scale` neither a number nor a tensor.
        IndexError: x has no such dim.

    Example:
        >>> weights = ro.nn.Softmax(scale=head_dim**-0.5, causal=True)
        >>> weights(q @ k.mT, mask) @ v
    """

    op = SOFTMAX
    scale: Held

    def __init__(self, dim: int = -1, *, scale: Held = 1.0, causal: bool = False) -> None:
        super().__init__()
        if not isinstance(dim, int):
            name = type(self).__name__
            raise TypeError(f"{name}: dim is {type(dim).__name__}; expected an integer, such as -1 for the last dim")
        self.dim, self.causal = dim, causal
        hold(self, "scale", scale)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.dim == -1:
            return self.call(x, self.scale, mask, self.causal)
        return self.call(x.movedim(self.dim, -1), self.scale, mask, self.causal).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        shows = [f"dim={self.dim}"]
        if isinstance(self.scale, torch.Tensor) or self.scale != 1:
            shows.append(f"scale={shown(self.scale)}")
        return ", ".join(shows + ["causal=True"] * self.causal)


class LogSoftmax(Softmax):
    """log(softmax(scale * x)) in one kernel, as `torch.nn.LogSoftmax`; its point is scaled = scale * x, masked.

    Arguments, shapes and errors are those of `Softmax`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 10), ro.nn.LogSoftmax())
    """

    op = LOG_SOFTMAX
