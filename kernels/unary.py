"""Functions of one value and their derivatives: `f(x)`, and `f_grad(x, dx)` with dx the gradient of f(x).

Each follows the formula of eager PyTorch, so it is infinite or NaN where eager is, and is as accurate: libdevice's
functions in place of the fast ones, divisions rounded to nearest.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest: in fp32 Triton's own `/` is an approximation."""
    if x.dtype == tl.float32 and y.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def reciprocal(x):
    return divide(tl.full((1, 1), 1.0, x.dtype), x)


@triton.jit
def reciprocal_grad(x, dy):
    y = reciprocal(x)
    return -dy * (y * y)


@triton.jit
def sin(x):
    return tl.sin(x)


@triton.jit
def sin_grad(x, dy):
    return dy * tl.cos(x)


@triton.jit
def cos(x):
    return tl.cos(x)


@triton.jit
def cos_grad(x, dy):
    return dy * -tl.sin(x)


@triton.jit
def tanh(x):
    return libdevice.tanh(x)


@triton.jit
def tanh_grad(x, dy):
    y = libdevice.tanh(x)
    return dy * (1.0 - y * y)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + libdevice.exp(-x))


@triton.jit
def sigmoid_grad(x, dy):
    y = sigmoid(x)
    return dy * (1.0 - y) * y


@triton.jit
def exp(x):
    return libdevice.exp(x)


@triton.jit
def exp_grad(x, dy):
    return dy * libdevice.exp(x)


@triton.jit
def relu(x):
    return tl.where(x <= 0.0, 0.0, x)  # and not x > 0: nan stays nan


@triton.jit
def relu_grad(x, dy):
    return tl.where(x <= 0.0, 0.0, dy)


@triton.jit
def gelu(x):
    """x times the normal distribution's cdf; Hendrycks and Gimpel 2016 (arXiv 1606.08415)."""
    return x * normal_cdf(x)


@triton.jit
def gelu_grad(x, dy):
    pdf = libdevice.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return dy * (normal_cdf(x) + x * pdf)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + libdevice.erf(x * 0.7071067811865476))  # 1 / sqrt(2)


@triton.jit
def gelu_tanh(x):
    """The approximation of gelu: 0.5 x (1 + tanh(z)), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return 0.5 * x * (1.0 + libdevice.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))


@triton.jit
def gelu_tanh_grad(x, dy):
    """Where 1 + tanh(z) and 1 - tanh(z)^2 = 4 s (1 - s) do not cancel, left of 0; right of 0 one minus that.

    There s = (1 + tanh(z)) / 2 = e / (1 + e), e = exp(2z). It is 0 where eager's sum is, but for the last few values.
    """
    a, square = tl.abs(x), x * x
    e = libdevice.exp(-a * (1.5957691216057308 + 0.07135481627260025 * square))
    e = tl.where(0.01 + e == 0.01, 0.0, e)
    rest = reciprocal(1.0 + e)
    s = e * rest
    slope = s - a * s * rest * (1.5957691216057308 + 0.21406444881780076 * square)
    return dy * tl.where(x < 0.0, slope, 1.0 - slope)


@triton.jit
def silu(x):
    return divide(x, 1.0 + libdevice.exp(-x))


@triton.jit
def silu_grad(x, dy):
    s = sigmoid(x)
    return dy * (s * (1.0 + x * (1.0 - s)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and x itself above 20, as in PyTorch."""
    return tl.where(x > 20.0, x, libdevice.log1p(libdevice.exp(x)))


@triton.jit
def softplus_grad(x, dy):
    z = libdevice.exp(x)
    return tl.where(x > 20.0, dy, divide(dy * z, z + 1.0))


@triton.jit
def square(x):
    return x * x


@triton.jit
def square_grad(x, dy):
    return dy * (2.0 * x)
