"""Functions of two values and their derivatives: `f(a, b)`, and `f_grad(a, b, dc)` = (da, db), dc the gradient of c."""

import triton

from retainops.kernels.unary import divide


@triton.jit
def mul(a, b):
    return a * b


@triton.jit
def mul_grad(a, b, dc):
    return dc * b, dc * a


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def add_grad(a, b, dc):
    return dc, dc


@triton.jit
def sub(a, b):
    return a - b


@triton.jit
def sub_grad(a, b, dc):
    return dc, -dc


@triton.jit
def div(a, b):
    return divide(a, b)


@triton.jit
def div_grad(a, b, dc):
    da = divide(dc, b)
    return da, -dc * divide(divide(a, b), b)
