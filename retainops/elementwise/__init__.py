"""`fuse_pointwise`: one forward and one backward kernel from a function of the user's."""

from retainops.elementwise.decorator import FusedPointwise, fuse_pointwise

__all__ = ["FusedPointwise", "fuse_pointwise"]
