"""The outputs of modules as points, whatever it is that the modules compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from retainops.nn.point import HoldsPoints, Point
from retainops.registry import PointInfo

OUT = "out"
"""The point's name."""


class Output(HoldsPoints):
    """For a module whose output is a point; its class gets its own forward with `with_point` around it."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo(OUT, "forward(...)", "of its output"),)


def with_point(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward, with what it returns as the point."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return _as_point(self, output) if is_asked(self) else output

    return call


def is_asked(module: Any) -> bool:
    """Whether a module's output is asked for at the moment: the module is then called, and nothing in its place."""
    return isinstance(module, Output) and any(OUT in request for request in module._requests)


def _as_point(module: Output, output: Any) -> Any:
    """The output, or where it is several values the first of them, as the point."""
    if isinstance(output, torch.Tensor):
        return module.point(OUT, output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        values = [module.point(OUT, output[0]), *output[1:]]
        return output._make(values) if hasattr(output, "_make") else type(output)(values)
    name = next(request[OUT].name for request in module._requests if OUT in request)
    raise TypeError(
        f"point '{name}': {type(module).__name__} returned a {type(output).__name__}; expected a torch.Tensor, or a "
        "tuple or list that starts with one; leave this point out of the pattern"
    )


def without(module: nn.Module) -> str | None:
    """Why a module's output can be no point; None: it can."""
    if isinstance(module, Point):
        return "it is a point itself"
    if type(module).forward is nn.Module.forward:
        return "it has no forward"
    own = module.point_infos() if isinstance(module, HoldsPoints) else ()
    if isinstance(module._modules.get(OUT), Point) or any(info.name == OUT for info in own):
        return f"it has a point called {OUT}"
    return None
