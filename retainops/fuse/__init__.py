"""`fuse_pointwise`: one forward and one backward kernel from a function of the user's."""

from retainops.fuse.decorator import FusedPointwise, fuse_pointwise

__all__ = ["FusedPointwise", "fuse_pointwise"]
