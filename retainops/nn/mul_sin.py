"""MulSin and Siren: modules of mul_sin."""

from __future__ import annotations

import torch

from retainops.nn._held import Held, hold, shown
from retainops.nn.point import HoldsPoints
from retainops.registry import PointInfo, find


class MulSin(HoldsPoints):
    """sin(x * scale) in one kernel, the activation of SIREN; its point is c = x * scale.

    Args:
        scale: a number, or a tensor that broadcasts with x. An `nn.Parameter` is learned; another tensor is a buffer.

    Shapes:
        x: (...); the output: the broadcast shape of x and scale.

    Raises:
        TypeError: `scale` is neither a number nor a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 64), ro.nn.MulSin(30.0), nn.Linear(64, 3))
        >>> with ro.retain(model, "1.c", ro.Stats("l2")) as kept:
        ...     model(x).sum().backward()
        >>> kept["1.c"].l2
    """

    op = find("mul_sin")
    scale: Held

    def __init__(self, scale: Held) -> None:
        super().__init__()
        hold(self, "scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={shown(self.scale)}"


class Siren(HoldsPoints):
    """sin(w0 * x) in one kernel; its point is c = w0 * x.

    Args:
        w0: a number, or a tensor that broadcasts with x. An `nn.Parameter` is learned; another tensor is a buffer.

    Shapes:
        x: (...); the output: the broadcast shape of x and w0.

    Raises:
        TypeError: `w0` is neither a number nor a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 64), ro.nn.Siren(30.0), nn.Linear(64, 3))

    Source: Sitzmann et al. 2020 (arXiv 2006.09661).
    """

    op = find("mul_sin")
    w0: Held

    def __init__(self, w0: Held = 30.0) -> None:
        super().__init__()
        hold(self, "w0", w0)

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo("c", "w0 * x", "broadcast of x and w0"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.w0)

    def extra_repr(self) -> str:
        return f"w0={shown(self.w0)}"
