"""Which Triton is installed: how many registers a kernel takes depends on it, and so does what spills."""

from __future__ import annotations

from tests.conftest import HAS_TRITON

OLDEST = (3, 6)
"""The oldest one that is supported."""


def _installed() -> tuple[int, ...] | None:
    if not HAS_TRITON:
        return None
    import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2])


IS_OLDEST = _installed() == OLDEST
