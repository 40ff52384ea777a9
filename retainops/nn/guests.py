"""Points in modules of other libraries, whose code calls an op of ours through a registry of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from retainops.nn.point import LOCK, HoldsPoints
from retainops.registry import Op, PointInfo
from retainops.retained import Retained

ATTRIBUTE = "_retainops_asked"
"""Of the other library's module, where it is there at all: what is asked of it at the moment."""


class Asked:
    """Requests, as an attribute of a module. A copy or a pickle of the module carries none, nor this class."""

    def __init__(self, requests: tuple[Retained, ...]) -> None:
        self.requests = requests

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ()


class Guest:
    """The points of an op that a module of another class calls: to `ro.retain` what `HoldsPoints` is.

    Nothing of it stays in the module: while something is asked, the module has one attribute more.

    Args:
        module: the one that calls the op.
        op: its record.
    """

    def __init__(self, module: nn.Module, op: Op) -> None:
        self.module, self.op = module, op

    def point_infos(self) -> tuple[PointInfo, ...]:
        """The op's points; `ro.retain` calls them by the module's path, a dot, and their name."""
        return self.op.points

    def ask(self, request: Retained) -> None:
        """Let the module's calls answer this request too."""
        with LOCK:
            self.module.__dict__[ATTRIBUTE] = Asked((*requests_of(self.module), request))

    def cease(self, request: Retained) -> None:
        """Let them no longer answer it."""
        with LOCK:
            left = tuple(other for other in requests_of(self.module) if other is not request)
            if left:
                self.module.__dict__[ATTRIBUTE] = Asked(left)
            else:
                self.module.__dict__.pop(ATTRIBUTE, None)


Holder = HoldsPoints | Guest

_finders: list[Callable[[nn.Module], Op | None]] = []


def find_by(finder: Callable[[nn.Module], Op | None]) -> None:
    """Let an integration say which modules call an op of ours, and which op; None of the others."""
    if finder not in _finders:
        _finders.append(finder)


def holders(module: nn.Module) -> list[Holder]:
    """What holds a module's points: itself, a guest, or both, as in an attention module that `ro.fuse` fused."""
    op = next((op for op in (find(module) for find in _finders) if op is not None), None)
    own: list[Holder] = [module] if isinstance(module, HoldsPoints) else []
    return own if op is None else [*own, Guest(module, op)]


def requests_of(module: nn.Module) -> tuple[Retained, ...]:
    """What is asked at the moment of a module of another library."""
    asked = getattr(module, ATTRIBUTE, None)
    return asked.requests if isinstance(asked, Asked) else ()
