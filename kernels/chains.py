"""Chains that models use, each as its maths. The derivations: docs/ops/chains.md, bias_dropout_add.md."""

import triton
import triton.language as tl

from retainops.kernels.unary import divide, exp, reciprocal, relu, softplus, tanh, tanh_grad


@triton.jit
def softcap_forward(x, cap):
    """cap * tanh(x / cap)."""
    return cap * tanh(divide(x, cap))


@triton.jit
def softcap_backward(x, cap, dy):
    c = divide(x, cap)
    dc = tanh_grad(c, dy * cap)
    dcap = dy * tanh(c) - dc * divide(c, cap)
    return (divide(dc, cap), dcap), (c,), (dc,)


@triton.jit
def scale_shift_forward(x, scale, shift):
    """x * (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


@triton.jit
def scale_shift_backward(x, scale, shift, dy):
    factor = 1.0 + scale
    return (dy * factor, dy * x, dy), (x * factor,), (dy,)


@triton.jit
def squared_relu_forward(x):
    """relu(x)^2."""
    r = relu(x)
    return r * r


@triton.jit
def squared_relu_backward(x, dy):
    r = relu(x)
    dr = dy * (2.0 * r)
    return (tl.where(x <= 0.0, 0.0, dr),), (r,), (dr,)


@triton.jit
def mish_forward(x):
    """x * tanh(softplus(x)), and tanh(softplus(x)) = n / (n + 2), n = z^2 + 2z, z = exp(x): 1 above 20."""
    z = exp(tl.minimum(x, 20.0))  # the minimum drops NaN, the product has it
    n = z * z + 2.0 * z
    return tl.where(x > 20.0, x, divide(x * n, n + 2.0))


@triton.jit
def mish_backward(x, dy):
    """1 - t^2 = 4 (1 + z)^2 / (n + 2)^2, and times the slope of softplus, z / (1 + z), 4 z (1 + z) / (n + 2)^2."""
    z = exp(tl.minimum(x, 20.0))
    n = z * z + 2.0 * z
    r = reciprocal(n + 2.0)
    t, dt = n * r, dy * x
    u = 2.0 * r + 2.0 * (z * r)
    ds = dt * tl.where(x >= 20.0, 0.0, u * u)
    dx = dy * t + dt * tl.where(x > 20.0, 0.0, u * (2.0 * (z * r)))
    return (dx,), (softplus(x), t), (ds, dt)


@triton.jit
def bias_dropout_add_forward(x, bias, residual, p, scale, u):
    """residual + dropout(x + bias): what is kept is multiplied by scale = 1 / (1 - p)."""
    return residual + tl.where(u >= p, (x + bias) * scale, 0.0)


@triton.jit
def bias_dropout_add_backward(x, bias, residual, p, scale, u, dy):
    biased = x + bias
    keep = u >= p
    dbiased = tl.where(keep, dy * scale, 0.0)
    dropped = tl.where(keep, biased * scale, 0.0)
    return (dbiased, dbiased, dy), (biased, dropped), (dbiased, dy)
