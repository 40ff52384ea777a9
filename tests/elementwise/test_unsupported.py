"""The errors for what has no kernel: operations, control flow, in-place operations; and what they say to do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.elementwise.standins import WRITTEN_AS
from tests.elementwise.functions import WEIGHT


def operations():
    """name -> (a function that cannot be fused, what its error names)."""

    def alone(x):
        return F.softmax(x, dim=-1)

    def method(x):
        return x.cumsum(0)

    def attribute(x):
        return x * x.shape[0]

    def attribute_alone(x):
        return x * getattr(x, "scale", 2.0)

    def attribute_is(x):
        return x * 2 if x.dtype is torch.float32 else x

    def attribute_in_a_set(x):
        return x * 2 if x.device in {torch.device("cpu")} else x

    def attribute_with_a_default(x):
        return x * 2 if getattr(x, "scale", None) is None else x

    def has_an_attribute(x):
        return x * 2 if not hasattr(x, "scale") else x

    def indexed(x):
        return x[0] * 2

    def matmul(x, w):
        return x @ w

    def floor(x):
        return x // 2

    def rounded(x):
        return torch.div(x, 2, rounding_mode="floor")

    def cast(x):
        return x.to(torch.float16)

    def reduced(x):
        return x - torch.max(x)

    def reduced_along(x):
        return torch.max(x, 0)[0]

    def power(x, n):
        return x**n

    def exponential(x):
        return 2**x

    def of_math(x):
        return x * math.sin(x)

    def of_numpy(x):
        return np.sin(x) * 2

    def numpys_where(x):
        return np.where(x > 0, x, 2)

    def numpys_array(x):
        return x * np.asarray(x)

    def numpys_number(x):
        return np.float64(2) * x

    def constant(x):
        return x * WEIGHT

    def imaginary(x):
        return x * 1j

    def beta(x):
        return F.softplus(x, beta=2)

    def not_a_condition(x):
        return torch.where(2 * x, x, x)

    def conditions(x):
        return x * ((x > 0) + (x < 1))

    def difference(x):
        return x * (1 - (x > 0))

    def hooked(x):
        return (x * 2).register_hook(print)

    def array(x):
        return x * np.ones(3)

    def without_grad(x):
        with torch.no_grad():
            m = x * 2
        return m * x

    def under_autocast(x):
        with torch.autocast("cpu", enabled=False):
            m = torch.exp(x)
        return m * x

    return {
        alone: "torch.nn.functional.softmax",
        method: "Tensor.cumsum",
        attribute: "the attribute Tensor.shape",
        attribute_alone: "the attribute Tensor.scale",
        attribute_is: "the attribute Tensor.dtype",
        attribute_in_a_set: "the attribute Tensor.device",
        attribute_with_a_default: "the attribute Tensor.scale",
        has_an_attribute: "the attribute Tensor.scale",
        indexed: "operator.getitem",
        matmul: "operator.matmul",
        floor: "operator.floordiv",
        rounded: "a rounding_mode is not supported",
        cast: "Tensor.to",
        reduced: "torch.max",
        reduced_along: "both must be tensors",
        power: "the exponent must be a number that is known when the function is traced",
        exponential: r"torch.exp\(x \* math.log\(a\)\)",
        of_math: r"reading a value on the host \(float\).*use torch's: torch.sin\(x\) for math.sin\(x\)",
        of_numpy: r"numpy.sin at .*; use torch's functions, torch.sin\(x\) for numpy.sin",
        numpys_where: "numpy.where at ",
        numpys_array: "numpy.asarray",
        numpys_number: r"numpy.multiply at .*;.* and float\(c\) for a number c of numpy's",
        constant: "a tensor that is not a parameter.*make it a parameter",
        imaginary: "an operand is complex",
        beta: "only softplus",
        not_a_condition: "is no condition; expected a comparison, or a boolean tensor",
        conditions: "is arithmetic on conditions alone; use torch.where",
        difference: r"operator.sub \(.*\) has a condition for an operand, as PyTorch has none; use ~condition",
        hooked: "Tensor.register_hook at ",
        array: "an argument that is numpy.ndarray at .*; expected a parameter or a number",
        without_grad: r"operator.mul under torch.no_grad, or .*; what shall have no gradient is c.detach\(\)",
        under_autocast: "torch.exp under torch.autocast at .*; call the fused function under it",
    }


def control_flow():
    def branch(x):
        if x > 0:
            return x * 2
        return -x

    def loop(x):
        while x < 1:
            x = x * 2
        return x

    def both(x):
        return x * (x > 0 and x < 1)

    def negated(x):
        return torch.where(not (x > 0), x, -x)

    def asserted(x):
        assert x > 0
        return x * 2

    def chained(x):
        return torch.where(0 < x < 1, x, -x)

    def iterated(x):
        return sum(v * 2 for v in x)

    def length(x):
        return x * len(x)

    return [branch, loop, both, negated, asserted, chained, iterated, length]


def in_place():
    def augmented(x, w):
        c = x * w
        c += 1
        return c

    def augmented_input(x):
        x *= 2
        return x

    def method(x):
        return x.mul(2).add_(1)

    def relu(x):
        return F.relu(x * 2, inplace=True)

    def element(x):
        y = x * 2
        y[0] = 1
        return y

    def out(x):
        return torch.add(x, 1, out=x)

    def data(x):
        y = x * 2
        y.data = x
        return y

    def function(x):
        return torch.sin_(x)

    return [augmented, augmented_input, method, relu, element, out, data, function]


@pytest.mark.parametrize(("fn", "says"), operations().items(), ids=lambda x: getattr(x, "__name__", None))
def test_what_is_not_supported_is_named(fn, says: str) -> None:
    with pytest.raises(NotImplementedError, match=says) as caught:
        ro.fuse_pointwise(fn)
    line = fn.__code__.co_firstlineno
    lines = [f"{__file__}:{n}" for n in range(line + 1, line + 5)]
    assert str(caught.value).startswith(f"{fn.__name__}: ")
    assert any(place in str(caught.value) for place in lines), str(caught.value)


def test_the_error_lists_what_is_supported() -> None:
    with pytest.raises(NotImplementedError, match="supported are: add, sub, mul, div, .*, where, "):
        ro.fuse_pointwise(lambda x: torch.erfinv(x))


@pytest.mark.parametrize(
    ("fn", "remedy"),
    [
        (lambda x: torch.softmax(x, -1), "do it outside the function: ro.softmax is fused"),
        (lambda x: F.layer_norm(x, (3,)), "do it outside the function: ro.layer_norm is fused"),
        (lambda x: x - x.mean(), "do it outside the function, and make the result a parameter"),
        (lambda x, w: x @ w, "do it outside the function, and make the result a parameter"),
        (lambda x: x.to(torch.float16) * 2, "do it outside the function, and pass the result"),
        (lambda x: x / x.shape[-1], "do it outside the function, and pass the result"),
        (lambda x: F.dropout(x * 2), "do it outside the function, and pass the result"),
        (lambda x: F.leaky_relu(x), r"write it as torch.where\(x > 0, x, 0.01 \* x\)"),
        (lambda x, gated=True: x * 2 if gated else x, "a flag is a global or a closure, and no parameter"),
        (lambda x, n: sum([x * i for i in range(n)]), "is a global or a closure, and no parameter"),
        (lambda x: x.mul_(2), r"make a new value and bind the name to it: c = c \+ 1"),
    ],
    ids=["softmax", "layer_norm", "mean", "matmul", "cast", "shape", "dropout", "leaky", "flag", "loop", "in place"],
)
def test_the_error_says_what_to_do(fn, remedy: str) -> None:
    with pytest.raises(NotImplementedError, match=f"is not supported in a fused function; .*{remedy}"):
        ro.fuse_pointwise(fn)


@pytest.mark.parametrize("name", [name for name in WRITTEN_AS if name not in ("softsign", "tanhshrink")])
def test_the_error_says_how_to_write_it(name: str) -> None:
    """But for functions that are Python, of operations that are supported."""
    with pytest.raises(NotImplementedError, match="; write it as ") as caught:
        ro.fuse_pointwise(lambda x: getattr(F, name)(x))
    assert f"write it as {WRITTEN_AS[name]}, for its defaults" in str(caught.value)


@pytest.mark.parametrize("name", WRITTEN_AS)
def test_what_the_error_says_to_write_is_that_function(name: str) -> None:
    written = {"torch": torch, "F": F}
    exec(f"def f(x):\n    return {WRITTEN_AS[name]}", written)
    fused = ro.fuse_pointwise(written["f"])
    x = torch.cat([torch.linspace(-9, 9, 41), torch.tensor([-200.0, 200.0])]).requires_grad_()
    found, want = (f(x) for f in (fused, getattr(F, name)))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (found, want)))


@pytest.mark.parametrize("fn", control_flow(), ids=lambda f: f.__name__)
def test_control_flow_by_a_value(fn) -> None:
    with pytest.raises(
        NotImplementedError, match=r"control flow by the value|iteration over|reading a value on the host"
    ):
        ro.fuse_pointwise(fn)


@pytest.mark.parametrize("fn", in_place(), ids=lambda f: f.__name__)
def test_in_place_operations(fn) -> None:
    with pytest.raises(NotImplementedError, match=r"in-place|in place|out= would write|setting the attribute"):
        ro.fuse_pointwise(fn)


class Sign(torch.autograd.Function):
    """With a backward that its operations do not have."""

    @staticmethod
    def forward(ctx, x):
        return torch.where(x > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_function_with_a_backward_of_its_own(mode) -> None:
    with mode():
        assert "sin(x)" in ro.fuse_pointwise(lambda x: torch.sin(x)).source
        with pytest.raises(NotImplementedError, match="a Function has a backward of its own: call it outside"):
            ro.fuse_pointwise(lambda x: x * Sign.apply(x))


def test_an_error_that_the_function_catches_comes_through() -> None:
    def f(x):
        try:
            return x - x.mean()
        except Exception:
            return x * 2

    with pytest.raises(NotImplementedError, match="f: Tensor.mean at "):
        ro.fuse_pointwise(f)


def test_a_stand_in_of_another_function_is_no_parameter() -> None:
    with pytest.raises(NotImplementedError, match="a tensor that is not a parameter at .*make it a parameter"):
        ro.fuse_pointwise(lambda x: ro.fuse_pointwise(lambda y: y * x)(x))


def test_bits_of_integers_are_subtracted() -> None:
    f, bits = ro.fuse_pointwise(lambda x, bits, mask: x - (bits & mask)), torch.tensor([5, 6])
    assert f(torch.ones(2), bits, torch.tensor(4)).tolist() == [-3.0, -3.0]


def test_conditions_without_grad_are_the_same_ones() -> None:
    def f(x):
        with torch.no_grad():
            positive = x > 0
        return torch.where(positive, x, 2 * x)

    assert "tl.where(x > 0.0, x, 2.0 * x)" in ro.fuse_pointwise(f).source
