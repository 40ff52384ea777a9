"""Modules whose interior values can be asked for with `ro.retain(model, ...)`."""

from retainops.nn.mul_sin import MulSin
from retainops.nn.point import HoldsPoints, Point

__all__ = ["HoldsPoints", "MulSin", "Point"]
