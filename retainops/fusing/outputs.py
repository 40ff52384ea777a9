"""The outputs of modules as points, whatever it is that the modules compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from retainops.fusing._code import wrapping
from retainops.nn.point import HoldsPoints, Point
from retainops.points import check_no_transform
from retainops.registry import PointInfo

OUT = "out"
"""The point's name."""


class Output(HoldsPoints):
    """For a module whose output is a point; its class gets its own forward with `with_point` around it."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        return (PointInfo(OUT, "forward(...)", "of its output"),)


def with_point(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward, with what it returns as the point."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        return _as_point(self, output, (*args, *kwargs.values())) if is_asked(self) else output

    return wrapping(forward, call)


def is_asked(module: Any) -> bool:
    """Whether a module's output is asked for at the moment: the module is then called, and nothing in its place."""
    return isinstance(module, Output) and any(OUT in request for request in module._requests)


def _as_point(module: Output, output: Any, inputs: tuple[Any, ...]) -> Any:
    """The output, or where it is several values the first of them, as the point."""
    check_no_transform(type(module).__name__)
    kind = type(output)
    if isinstance(output, torch.Tensor):
        return module.point(OUT, output, _may_be_held(output, inputs))
    if isinstance(output, dict):  # a ModelOutput of transformers is one
        first, value = next(iter(output.items()), (None, None))
        if isinstance(value, torch.Tensor):
            new = {**output} if kind is dict else output
            new[first] = module.point(OUT, value, _may_be_held(value, inputs))
            return new
    elif _is_built_of_its_items(kind) and output and isinstance(output[0], torch.Tensor):
        first = output[0]
        point = module.point(OUT, first, _may_be_held(first, inputs))
        values = [point if value is first else value for value in output]
        return output._make(values) if hasattr(output, "_make") else kind(values)
    name = next(request[OUT].name for request in module._requests if OUT in request)
    raise TypeError(
        f"point '{name}': {type(module).__name__} returned a {kind.__name__}; expected a torch.Tensor, or a tuple, "
        "list or dict that starts with one; leave this point out of the pattern"
    )


def _is_built_of_its_items(kind: Any) -> bool:
    """A list, a tuple, a named tuple, or one of `torch.return_types`."""
    return kind in (tuple, list) or (issubclass(kind, tuple) and (hasattr(kind, "_make") or hasattr(kind, "n_fields")))


def _may_be_held(output: torch.Tensor, inputs: tuple[Any, ...]) -> bool:
    """Whether others may have this memory too, as of a module that returns its input, or a view of it.

    In compiled code that is not known.
    """
    if torch.compiler.is_compiling():
        return True
    storage = output.untyped_storage()._cdata
    return any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == storage for x in inputs)


def without(module: nn.Module) -> str | None:
    """Why a module's output can be no point; None: it can."""
    if isinstance(module, Point):
        return "it is a point itself"
    if type(module).forward is nn.Module.forward:
        return "it has no forward"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "its parameters are made in its first call; call it once before"
    own = module.point_infos() if isinstance(module, HoldsPoints) else ()
    child = module._modules.get(OUT)
    if isinstance(getattr(child, "_orig_mod", child), Point) or any(info.name == OUT for info in own):
        return f"it has a point called {OUT}"
    return None
