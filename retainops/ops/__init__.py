"""The ops, each family in a room of its own. Importing this registers them."""

from retainops.ops import chains, cross_entropy, gated, group_norm, linear_cross_entropy, norm, pointwise, rope, softmax

__all__ = [
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
