"""Functions that cannot be fused for their parameters or what they return, and what is no function of Python."""

from __future__ import annotations

import functools

import pytest
import torch

import retainops as ro
from tests.elementwise.functions import WEIGHT


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
        condition: r"returns a value that has no gradient, of operator.gt \(.*test_signatures.py:\d+\)",
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
