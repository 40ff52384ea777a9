"""The ops, each family in a room of its own. Importing this registers them."""

from retainops.ops import chains, gated, pointwise

__all__ = ["chains", "gated", "pointwise"]
