"""The ops, each family in a room of its own. Importing this registers them."""

from retainops.ops import chains  # and with it pointwise: tables of ops are in the order of registration

# isort: split
from retainops.ops import (
    bias_dropout_add,
    cross_entropy,
    gated,
    group_norm,
    linear_cross_entropy,
    norm,
    pointwise,
    rope,
    softmax,
)

__all__ = [
    "bias_dropout_add",
    "chains",
    "cross_entropy",
    "gated",
    "group_norm",
    "linear_cross_entropy",
    "norm",
    "pointwise",
    "rope",
    "softmax",
]
