"""The ops, each in a room of its own. Importing this registers them."""

from retainops.ops.mul_sin import mul_sin

__all__ = ["mul_sin"]
