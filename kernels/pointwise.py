"""The pointwise family: one pair of kernels for ops of any number of inputs, which take their maths as functions.

`FORWARD(*inputs)` returns the output. `BACKWARD(*inputs, dy)` returns three tuples: the gradients of the first GRADS
inputs (the others have none), the values of the points, and the gradients of the points. All else (layouts, sums over
broadcast dims, retention) is the same for every op. What nobody asked for is a None pointer, and arithmetic that only
it needs is compiled away.
"""

import triton
import triton.language as tl

from retainops.kernels.points import retain
from retainops.kernels.tiles import load, load_each, store, store_grad, tile


def _forward_name(specialization):
    """What profilers show: the kernel goes by the name of its op."""
    return specialization.constants["FORWARD"].__name__.removesuffix("_forward") + "_fwd_kernel"


def _backward_name(specialization):
    return specialization.constants["BACKWARD"].__name__.removesuffix("_backward") + "_bwd_kernel"


@triton.jit(repr=_forward_name)
def pointwise_fwd_kernel(
    X,
    Y,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORWARD: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of y = FORWARD(*x). Interiors are held in DTYPE: fp32, or fp64 for fp64."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    x = load_each(X, INPUTS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    store(Y, FORWARD(*x), at, SHAPE, BLOCK_M, BLOCK_N)


@triton.jit(repr=_backward_name)
def pointwise_bwd_kernel(
    X,
    DY,
    DX,
    DC,
    SHAPE,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BACKWARD: tl.constexpr,
    INPUTS: tl.constexpr,
    GRADS: tl.constexpr,
    POINTS: tl.constexpr,
):
    """One tile of the gradients of the inputs and the points. Interiors are recomputed, never read."""
    at = tile(SHAPE, BLOCK_M, BLOCK_N)
    x = load_each(X, INPUTS, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dy = load(DY, at, SHAPE, DTYPE, BLOCK_M, BLOCK_N)
    dx, c, dc = BACKWARD(*x, dy)
    for i in tl.static_range(GRADS):
        store_grad(DX[i], dx[i], at, SHAPE, BLOCK_M, BLOCK_N)
    # Last, when what the gradients need is out of the registers.
    for i in tl.static_range(POINTS):
        retain(DC[i], dc[i], c[i], at, SHAPE, BLOCK_M, BLOCK_N)


def unary_of_binary(name, unary, unary_grad, binary, binary_grad):
    """The maths of y = unary(c), c = binary(a, b), with the point c."""

    @triton.jit
    def forward(a, b):
        return unary(binary(a, b))

    @triton.jit
    def backward(a, b, dy):
        c = binary(a, b)
        dc = unary_grad(c, dy)
        return binary_grad(a, b, dc), (c,), (dc,)

    return named(name, forward, backward)


def named(name, forward, backward):
    """The pair, under the name of an op."""
    forward.__name__, backward.__name__ = f"{name}_forward", f"{name}_backward"
    return forward, backward
