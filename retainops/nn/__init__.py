"""Modules whose interior values can be asked for with `ro.retain(model, ...)`."""

from retainops.nn.attention import MultiheadAttention
from retainops.nn.chains import BiasDropoutAdd, Mish, ScaleShift, SoftCap, SquaredReLU
from retainops.nn.gated import GEGLU, GLU, GatedMLP, ReGLU, SwiGLU
from retainops.nn.group_norm import GroupNorm
from retainops.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from retainops.nn.mul_sin import MulSin, Siren
from retainops.nn.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from retainops.nn.point import HoldsPoints, Point
from retainops.nn.rope import Rope
from retainops.nn.softmax import LogSoftmax, Softmax

__all__ = [
    "GEGLU",
    "GLU",
    "AddLayerNorm",
    "AddRMSNorm",
    "BiasDropoutAdd",
    "CrossEntropyLoss",
    "GatedMLP",
    "GroupNorm",
    "HoldsPoints",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LogSoftmax",
    "Mish",
    "MulSin",
    "MultiheadAttention",
    "Point",
    "RMSNorm",
    "ReGLU",
    "Rope",
    "ScaleShift",
    "Siren",
    "SoftCap",
    "Softmax",
    "SquaredReLU",
    "SwiGLU",
]
