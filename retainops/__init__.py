"""Fused Triton ops for PyTorch whose interior values can still be asked for their gradient."""

from retainops import nn
from retainops._version import __version__
from retainops.buffers import Into
from retainops.dispatch import backend, explain
from retainops.models import points, retain
from retainops.ops import mul_sin
from retainops.points import point
from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import Stats

__all__ = [
    "Into",
    "Retained",
    "Slot",
    "Stats",
    "__version__",
    "backend",
    "explain",
    "mul_sin",
    "nn",
    "point",
    "points",
    "retain",
]


def __getattr__(name: str) -> object:
    # On demand, and not with the library: it loads triton's compiler.
    if name == "testing":
        import importlib

        return importlib.import_module("retainops.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
