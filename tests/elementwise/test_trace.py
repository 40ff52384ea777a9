"""What becomes of a function: its points and its conditions."""

from __future__ import annotations

import functools
import sys

import pytest
import torch

import retainops as ro
from retainops.elementwise.trace import trace

SCALE = 2.0


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


def test_long_formulas_are_shortened() -> None:
    def newton(x, y):
        for _ in range(30):  # 3 ** 30 of the first y, were it written out
            y = y * (1.5 - 0.5 * x * y * y)
        return y * x

    fused = ro.fuse_pointwise(newton)
    assert len(fused.points["y"].formula) < 1000
    assert fused.points["y"].formula.startswith("... * (1.5 - 0.5 * x * ")


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
