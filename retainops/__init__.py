"""Fused Triton ops for PyTorch whose interior values can still be asked for their gradient."""

from retainops import nn, pointwise
from retainops._version import __version__
from retainops.buffers import Into
from retainops.dispatch import backend, explain
from retainops.elementwise import fuse_pointwise
from retainops.fusing import fuse, fuse_rule, unfuse
from retainops.models import points, retain
from retainops.nonfinite import NonFiniteGradient
from retainops.ops.attention import attention
from retainops.ops.bias_dropout_add import bias_dropout_add
from retainops.ops.chains import mish, scale_shift, siren, softcap, squared_relu
from retainops.ops.cross_entropy import cross_entropy
from retainops.ops.gated import geglu, glu, reglu, swiglu
from retainops.ops.group_norm import group_norm
from retainops.ops.linear_cross_entropy import linear_cross_entropy
from retainops.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from retainops.ops.rope import rope
from retainops.ops.softmax import log_softmax, softmax
from retainops.part import Part
from retainops.points import point
from retainops.pointwise import (
    add_gelu,
    add_relu,
    add_silu,
    mul_gelu,
    mul_sigmoid,
    mul_silu,
    mul_sin,
    mul_tanh,
)
from retainops.relevance import Relevance
from retainops.retained import Retained
from retainops.samples import per_sample_norms
from retainops.slots import Slot
from retainops.stats import Stats
from retainops.watcher import Watcher, watch

bias_gelu = add_gelu

__all__ = [
    "Into",
    "NonFiniteGradient",
    "Part",
    "Relevance",
    "Retained",
    "Slot",
    "Stats",
    "Watcher",
    "__version__",
    "add_gelu",
    "add_layer_norm",
    "add_relu",
    "add_rms_norm",
    "add_silu",
    "attention",
    "backend",
    "bias_dropout_add",
    "bias_gelu",
    "cross_entropy",
    "explain",
    "fuse",
    "fuse_pointwise",
    "fuse_rule",
    "geglu",
    "glu",
    "group_norm",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "mish",
    "mul_gelu",
    "mul_sigmoid",
    "mul_silu",
    "mul_sin",
    "mul_tanh",
    "nn",
    "per_sample_norms",
    "point",
    "points",
    "pointwise",
    "reglu",
    "retain",
    "rms_norm",
    "rope",
    "scale_shift",
    "siren",
    "softcap",
    "softmax",
    "squared_relu",
    "swiglu",
    "unfuse",
    "watch",
]


def __getattr__(name: str) -> object:
    # On demand, and not with the library: it loads triton's compiler.
    if name == "testing":
        import importlib

        return importlib.import_module("retainops.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
