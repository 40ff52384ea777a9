"""Gated units: y = act * up, act = f(gate). Shazeer 2020 (arXiv 2002.05202)."""

import triton

from retainops.kernels.pointwise import named


def gated(name, unary, unary_grad):
    """The maths of f(gate) * up, with the point act = f(gate)."""

    @triton.jit
    def forward(gate, up):
        return unary(gate) * up

    @triton.jit
    def backward(gate, up, dy):
        act = unary(gate)
        dact = dy * up
        return (unary_grad(gate, dact), dy * act), (act,), (dact,)

    return named(name, forward, backward)


def packed(name, unary, unary_grad):
    """The same where gate and up are halves of one tensor: they are interiors too, so points."""

    @triton.jit
    def forward(gate, up):
        return unary(gate) * up

    @triton.jit
    def backward(gate, up, dy):
        act = unary(gate)
        dact = dy * up
        dgate = unary_grad(gate, dact)
        dup = dy * act
        return (dgate, dup), (gate, up, act), (dgate, dup, dact)

    return named(name, forward, backward)
