"""The functions of kernels/unary.py, binary.py and chains.py again, for results that are rounded to 16 bits.

Rounded to 11 bits or 8 a result keeps nothing of a function that is accurate to 24. What it costs shows there: with
two bytes an element a kernel waits for instructions, not for memory. So here each function is as accurate as 16 bits
need, to about 2**-16 of itself, and without a branch, so that elements overlap. Only functions that this makes cheaper
are here. For all others, and for float32 and float64, there are those of the other files.

NaN, infinities and signed zeros stand where eager has them, for finite gradients. What is below 2**-118 may be zero, of
either sign: ex2 and the fast division flush subnormal numbers.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def over(x, y):
    """x / y in two instructions; zero for y beyond 2**126."""
    return libdevice.fast_dividef(x, y)


@triton.jit
def divide(x, y):
    """Any x / y. Scaled, so that the reciprocal of neither a huge y nor a subnormal one is lost."""
    scale = tl.where(tl.abs(y) < 5.9604644775390625e-08, 16777216.0, 0.25)  # 2**-24, 2**24
    return (x * scale) * over(1.0, y * scale)


@triton.jit
def div(a, b):
    return divide(a, b)


@triton.jit
def div_grad(a, b, dc):
    """Of the three quotients by b the compiler makes one reciprocal."""
    return divide(dc, b), -dc * divide(divide(a, b), b)


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2x)), and where that cancels the first two terms of the series."""
    far = 1.0 - over(2.0, 1.0 + tl.exp2(2.8853900817779268 * x))  # 2 / log(2)
    return tl.where(tl.abs(x) < 0.0625, x * (1.0 - 0.3333333333333333 * (x * x)), far)


@triton.jit
def tanh_grad(x, dy):
    """1 - tanh(x)^2 = 4 r (1 - r), r = 1 / (1 + exp(2|x|)), which does not cancel."""
    r = over(1.0, 1.0 + tl.exp2(2.8853900817779268 * tl.abs(x)))
    return dy * (4.0 * (r - r * r))


@triton.jit
def sigmoid(x):
    return over(1.0, 1.0 + exp(-x))


@triton.jit
def sigmoid_grad(x, dy):
    y = sigmoid(x)
    return dy * (y - y * y)


@triton.jit
def exp(x):
    return tl.exp2(1.4426950408889634 * x)  # 1 / log(2)


@triton.jit
def exp_grad(x, dy):
    return dy * exp(x)


@triton.jit
def gelu(x):
    return x * normal_cdf(x)


@triton.jit
def gelu_grad(x, dy):
    return dy * (normal_cdf(x) + 0.3989422804014327 * x * bell(x))  # 1 / sqrt(2 pi)


@triton.jit
def bell(x):
    """exp(-x^2 / 2)"""
    return tl.exp2(-0.7213475204444817 * (x * x))


@triton.jit
def normal_cdf(x):
    """(1 + erf) / 2, as eager's, so as far off and 0 where that is; erf of |x| as in Abramowitz and Stegun 7.1.26.

    These coefficients minimise the largest relative error of 1 - erf: 2.5e-7 up to 4, growing to 2e-6 at 6 and beyond.
    """
    t = over(1.0, 1.0 + 0.26 * tl.abs(x))
    p = -0.14979002090297555
    p = 0.47232920646268345 + t * p
    p = -0.23431663080260812 + t * p
    p = 0.3491129217010634 + t * p
    p = 0.14003307837437493 + t * p
    p = 0.21570598907185606 + t * p
    p = 0.20692523609691724 + t * p
    erf = 1.0 - t * p * bell(x)
    return 0.5 + tl.where(x < 0.0, -0.5, 0.5) * erf


@triton.jit
def gelu_tanh(x):
    """(1 + tanh(z)) / 2 = sigmoid(2z), which does not cancel."""
    return over(x, 1.0 + exp_minus_2z(x * x, x))


@triton.jit
def gelu_tanh_grad(x, dy):
    square = x * x
    e = exp_minus_2z(square, x)
    s = over(1.0, 1.0 + e)
    return dy * (s + x * s * rest(e, s) * (1.5957691216057308 + 0.21406444881780076 * square))


@triton.jit
def exp_minus_2z(square, x):
    """z = sqrt(2 / pi) (x + 0.044715 x^3). Infinite from where eager's 1 + tanh(z) is 0."""
    exponent = x * (-2.302208198144325 - 0.1029432395800235 * square)
    return tl.exp2(tl.where(exponent > 26.0, float("inf"), exponent))


@triton.jit
def rest(e, s):
    """1 - s = e s, 0 where e is: s = 1 / (1 + e) need not be 1 then. The minimum drops NaN, which is inf times 0."""
    return tl.minimum(e * s, 1.0)


@triton.jit
def silu(x):
    return over(x, 1.0 + exp(-x))


@triton.jit
def silu_grad(x, dy):
    e = exp(-x)
    s = over(1.0, 1.0 + e)
    return dy * (s * (1.0 + x * rest(e, s)))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + z), z = exp(-|x|): in float32 this is x above 20.

    The polynomial for log(1 + z) / z on [0, 1] minimises the largest relative error: 8.4e-6.
    """
    z = exp(-tl.abs(x))
    p = -0.02386910435208409
    p = 0.10122216206863817 + z * p
    p = -0.2100485746677839 + z * p
    p = 0.3252066330534448 + z * p
    p = -0.499361356857995 + z * p
    p = 0.9999915978029261 + z * p
    return tl.maximum(x, 0.0) + z * p  # the maximum drops NaN, the sum has it


@triton.jit
def softplus_grad(x, dy):
    return dy * sigmoid(x)


@triton.jit
def softcap_forward(x, cap):
    return cap * tanh(divide(x, cap))


@triton.jit
def softcap_backward(x, cap, dy):
    c = divide(x, cap)
    dc = tanh_grad(c, dy * cap)
    dcap = dy * tanh(c) - dc * divide(c, cap)
    return (divide(dc, cap), dcap), (c,), (dc,)


@triton.jit
def mish_forward(x):
    """tanh(softplus(x)) = n / (n + 2), n = z (z + 2), z = exp(x): 1 above 20."""
    z = exp(tl.minimum(x, 20.0))  # the minimum drops NaN, the product has it
    n = z * (z + 2.0)
    return x * (n * over(1.0, n + 2.0))


@triton.jit
def mish_backward(x, dy):
    """1 - t^2 = 4 (1 + z)^2 / (n + 2)^2, and times the slope of softplus, z / (1 + z), 4 z (1 + z) / (n + 2)^2."""
    z = exp(tl.minimum(x, 20.0))
    n = z * (z + 2.0)
    r = over(1.0, n + 2.0)
    t, dt = n * r, dy * x
    u = 2.0 * r + 2.0 * (z * r)
    ds = dt * tl.where(x > 20.0, 0.0, u * u)
    dx = dy * t + dt * tl.where(x > 20.0, 0.0, u * (2.0 * (z * r)))
    return (dx,), (softplus(x), t), (ds, dt)
