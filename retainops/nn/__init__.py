"""Modules whose interior values can be asked for with `ro.retain(model, ...)`."""

from retainops.nn.chains import BiasDropoutAdd, Mish, ScaleShift, SoftCap, SquaredReLU
from retainops.nn.gated import GEGLU, GLU, GatedMLP, ReGLU, SwiGLU
from retainops.nn.mul_sin import MulSin, Siren
from retainops.nn.point import HoldsPoints, Point

__all__ = [
    "GEGLU",
    "GLU",
    "BiasDropoutAdd",
    "GatedMLP",
    "HoldsPoints",
    "Mish",
    "MulSin",
    "Point",
    "ReGLU",
    "ScaleShift",
    "Siren",
    "SoftCap",
    "SquaredReLU",
    "SwiGLU",
]
