"""A kernel that stores what a function of kernels/narrow.py gives, and what the one that it stands for gives."""

import triton
import triton.language as tl


@triton.jit
def both_kernel(X, Y, Z, BLOCK: tl.constexpr, NARROW: tl.constexpr, WIDE: tl.constexpr, PATH: tl.constexpr):
    """y = narrow(*x) and z = wide(*x), or of tuples of results the one at PATH."""
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    x = ()
    for i in tl.static_range(len(X)):
        x += (tl.load(X[i] + at),)
    y, z = NARROW(*x), WIDE(*x)
    for i in tl.static_range(len(PATH)):
        y, z = y[PATH[i]], z[PATH[i]]
    tl.store(Y + at, y)
    tl.store(Z + at, z)
