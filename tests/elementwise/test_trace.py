"""What becomes of a function: its points, its conditions, and the errors for what has no kernel."""

from __future__ import annotations

import functools
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.elementwise.standins import WRITTEN_AS
from retainops.elementwise.trace import trace

SCALE = 2.0
WEIGHT = torch.ones(3)


def names(fn) -> list[str]:
    return list(ro.fuse_pointwise(fn).points)


def test_every_local_name_is_a_point() -> None:
    def f(a, b, bias):
        c = a * b
        h = torch.tanh(c + bias)
        y = h * torch.sigmoid(c)
        return y  # noqa: RET504

    fused = ro.fuse_pointwise(f)
    assert {name: p.formula for name, p in fused.points.items()} == {
        "c": "a * b",
        "h": "tanh(c + bias)",
        "y": "h * sigmoid(c)",
    }
    assert [p.shape for p in fused.points.values()] == ["broadcast of a and b", *["broadcast of a, b and bias"] * 2]
    assert repr(fused) == "<fused function f(a, b, bias), points: c, h, y>"


def test_a_rebound_name_is_its_last_value() -> None:
    def f(x, w):
        c = x * w
        c = torch.sin(c)
        x = c + x
        return x * 2

    assert {n: p.formula for n, p in ro.points(ro.fuse_pointwise(f)).items()} == {"c": "sin(x * w)", "x": "c + x"}


def test_loops_unroll_and_helpers_are_traced_through() -> None:
    def helper(v):
        inside = v * 3
        return torch.cos(inside)

    def f(x, w):
        for i in range(3):
            x = helper(x) + i * w
        return (total := sum([x, w])) * SCALE  # noqa: F841

    fused = ro.fuse_pointwise(f)
    assert fused.source.count("= cos(") + fused.source.count(" cos(") >= 3
    assert list(fused.points) == ["x", "total"]  # not i, a number, nor what the helper calls its own


def test_names_that_no_gradient_reaches_are_no_points() -> None:
    def f(x, w):
        dead = x * 7  # noqa: F841
        mask = x > w
        stopped = (x * w).detach()
        only_compared = x + w
        used = torch.where(mask & (only_compared > 0), x, stopped)
        also = used  # noqa: F841
        parts = [used, x]  # noqa: F841
        same = x
        return used * same

    assert names(f) == ["used", "also"]
    assert "7.0" not in ro.fuse_pointwise(f).source


def test_two_names_of_one_value(path) -> None:
    def f(x):
        first = x * 3
        second = first
        return torch.sin(second) + first

    x = torch.tensor([0.5, -1.0], device=path.device, requires_grad=True)
    kept = ro.Retained("first", "second")
    ro.fuse_pointwise(f)(x, retain=kept).sum().backward()
    assert torch.equal(kept.first.grad, kept.second.grad)
    torch.testing.assert_close(kept.first.grad, (torch.cos(3 * x) + 1).detach())


def test_functions_without_a_source() -> None:
    namespace = {"torch": torch}
    exec("def typed(x):\n    c = x * 2\n    return torch.tanh(c)\n", namespace)
    assert names(namespace["typed"]) == ["c"]
    assert names(lambda x: (d := x * x) + 1) == ["d"]  # noqa: F841


def test_tracing_leaves_the_trace_function_of_a_debugger() -> None:
    seen = []

    def watching(frame, event, arg):
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(watching)
    try:
        ro.fuse_pointwise(lambda x: x * 2)
        assert sys.gettrace() is watching
        with pytest.raises(NotImplementedError):
            ro.fuse_pointwise(lambda x: x @ x)
        assert sys.gettrace() is watching
    finally:
        sys.settrace(before)


def test_parameters_that_are_used_as_conditions_are_conditions() -> None:
    def f(x, mask, other):
        return torch.where(mask & ~other, x, -x) + x * mask

    traced = trace(f)
    assert {node.target for node in traced.conditions if node.op == "placeholder"} == {"mask", "other"}


def operations():
    """name -> (a function that cannot be fused, what its error names)."""

    def alone(x):
        return F.softmax(x, dim=-1)

    def method(x):
        return x.cumsum(0)

    def attribute(x):
        return x * x.shape[0]

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

    return {
        alone: "torch.nn.functional.softmax",
        method: "Tensor.cumsum",
        attribute: "the attribute Tensor.shape",
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

    return [augmented, augmented_input, method, relu, element, out, data]


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
        (lambda x: x.mul_(2), r"make a new value and bind the name to it: c = c \+ 1"),
    ],
    ids=["softmax", "layer_norm", "mean", "matmul", "cast", "shape", "dropout", "leaky", "in place"],
)
def test_the_error_says_what_to_do(fn, remedy: str) -> None:
    with pytest.raises(NotImplementedError, match=f"is not supported in a fused function; .*{remedy}"):
        ro.fuse_pointwise(fn)


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


def signatures():
    def many(*tensors):
        return tensors[0] * 2

    def named(x, **options):
        return x * 2

    def taken(x, retain):
        return x * retain

    def method(self, x):
        return self.scale * x

    def default(x, bias=None):
        return x * 2

    def tensor_default(x, bias=WEIGHT):
        return x * bias

    def nothing():
        return torch.ones(3)

    def pair(x):
        return x * 2, x * 3

    def no_tensor(x):
        return 3.0

    def another_tensor(x):
        return torch.ones(3) * 2

    def none(x):
        x * 2

    def generator(x):
        yield x * 2

    async def coroutine(x):
        return x * 2

    def argument(x, w):
        return w

    def condition(x):
        return x > 0

    def of_a_condition(mask):
        return torch.where(mask, mask, 2.0 * mask)

    def constant(x):
        return (x * 2).detach()

    return {
        many: r"the parameter \*tensors",
        named: r"the parameter \*\*options",
        taken: "a parameter retain",
        method: "is a method",
        default: "the default of bias is None; expected a number",
        tensor_default: "the default of bias is Tensor",
        nothing: "has no parameters",
        pair: "returns a tuple of 2; a fused function returns one tensor",
        no_tensor: "returns 3.0",
        another_tensor: "returns a tensor that was not computed from its parameters",
        none: "returns None",
        generator: "a generator or a coroutine",
        coroutine: "a generator or a coroutine",
        argument: "returns its argument w",
        condition: r"returns a value that has no gradient, of operator.gt \(.*test_trace.py:\d+\)",
        of_a_condition: "returns a value that has no gradient, of torch.where",
        constant: "returns a value that has no gradient, of Tensor.detach",
    }


@pytest.mark.parametrize(("fn", "says"), signatures().items(), ids=lambda x: getattr(x, "__name__", None))
def test_functions_of_another_form(fn, says: str) -> None:
    with pytest.raises(TypeError, match=says) as caught:
        ro.fuse_pointwise(fn)
    assert str(caught.value).startswith(fn.__name__)


@pytest.mark.parametrize(
    "fn",
    [torch.tanh, functools.partial(torch.add, 1), torch.nn.ReLU(), "f", None],
    ids=lambda fn: type(fn).__name__,  # and not str: addresses in names differ between processes
)
def test_what_is_no_python_function(fn) -> None:
    with pytest.raises(TypeError, match=r"fuse_pointwise: .* expected a function written in Python"):
        ro.fuse_pointwise(fn)


def test_a_wrapper_is_what_is_called() -> None:
    def inner(x):
        c = x * 2
        return torch.tanh(c)

    @functools.wraps(inner)
    def wrapper(v):
        outside = v * 3
        return inner(outside)

    assert names(wrapper) == ["outside"]
    with pytest.raises(TypeError, match=r"the parameter \*args"):
        ro.fuse_pointwise(functools.wraps(inner)(lambda *args: inner(*args)))


def test_an_error_of_the_users_own_comes_through() -> None:
    def f(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ro.fuse_pointwise(f)
