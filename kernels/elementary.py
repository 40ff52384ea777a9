"""More elementary functions, for the kernels that `retainops.fuse_pointwise` writes.

As in kernels/unary.py: the formulas of eager PyTorch, so infinite or NaN where eager is, and as accurate.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from retainops.kernels.unary import reciprocal


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return reciprocal(sqrt(x))


@triton.jit
def log(x):
    return libdevice.log(x)


@triton.jit
def log1p(x):
    return libdevice.log1p(x)


@triton.jit
def expm1(x):
    return libdevice.expm1(x)


@triton.jit
def erf(x):
    return libdevice.erf(x)


@triton.jit
def sign(x):
    """1, 0 or -1; 0 for nan."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, tl.zeros_like(x)))


@triton.jit
def maximum(x, y):
    """The larger one; nan if one is nan."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def maximum_grad(x, y, dz):
    """The gradient of x: of equal ones each has half."""
    return tl.where(x < y, 0.0, tl.where(x == y, 0.5 * dz, dz))


@triton.jit
def minimum(x, y):
    """The smaller one; nan if one is nan."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def minimum_grad(x, y, dz):
    """The gradient of x: of equal ones each has half."""
    return tl.where(x > y, 0.0, tl.where(x == y, 0.5 * dz, dz))


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """x to a constant exponent, by the shortcuts that PyTorch takes."""
    if EXPONENT == 0.0:
        return tl.full((1, 1), 1.0, x.dtype)
    elif EXPONENT == 1.0:
        return x
    elif EXPONENT == 2.0:
        return x * x
    elif EXPONENT == 3.0:
        return x * x * x
    elif EXPONENT == 0.5:
        return sqrt(x)
    elif EXPONENT == -0.5:
        return rsqrt(x)
    elif EXPONENT == -1.0:
        return reciprocal(x)
    elif EXPONENT == -2.0:
        return reciprocal(x * x)
    elif x.dtype == tl.float64:
        return libdevice.pow(x, tl.full((1, 1), EXPONENT, x.dtype))
    else:
        # libdevice's flushes numbers below the smallest normal one: they are taken times 2**24.
        tiny = tl.abs(x) < 1.1754943508222875e-38
        y = libdevice.pow(tl.where(tiny, x * 16777216.0, x), tl.full((1, 1), EXPONENT, x.dtype))
        return tl.where(tiny, y * unscaled(EXPONENT), y)


@triton.constexpr_function
def unscaled(exponent):
    """The power of 2**-24, as far as it matters: beyond 2**120 the other factor is 0 or inf."""
    return 2.0 ** max(-120.0, min(120.0, -24.0 * exponent))


@triton.jit
def power_grad(x, EXPONENT: tl.constexpr, dy):
    if EXPONENT == 0.0:
        return tl.full((1, 1), 0.0, x.dtype)
    else:
        return dy * (EXPONENT * power(x, EXPONENT - 1.0))


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), from whichever end is nearer."""
    span = end - start
    return tl.where((weight < 0.5) & (weight > -0.5), start + weight * span, end - span * (1.0 - weight))


@triton.jit
def rounded(NUMBER: tl.constexpr, X, DTYPE: tl.constexpr):
    """A number as eager PyTorch compares it with an input X: in X's dtype."""
    y = tl.full((1, 1), NUMBER, DTYPE)
    if X.ptr is not None:
        y = y.to(X.ptr.dtype.element_ty).to(DTYPE)
    return y


@triton.jit
def compared(y, Y, X):
    """y, which is a number if the input Y is one, as eager PyTorch compares it with an input X."""
    if Y.number is not None and X.ptr is not None:
        return y.to(X.ptr.dtype.element_ty).to(y.dtype)
    else:
        return y
