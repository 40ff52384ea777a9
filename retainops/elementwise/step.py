"""One operation as a rule describes it: text with places for its operands, its result and its gradient."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

HELPERS = {
    "elementary": (
        *("compared", "erf", "expm1", "lerp", "log", "log1p", "maximum", "maximum_grad", "minimum", "minimum_grad"),
        *("power", "power_grad", "rounded", "rsqrt", "sign", "sqrt"),
    ),
    "unary": (
        *("cos", "divide", "exp", "gelu", "gelu_grad", "gelu_tanh", "gelu_tanh_grad", "reciprocal", "relu"),
        *("relu_grad", "sigmoid", "silu", "silu_grad", "sin", "softplus", "softplus_grad", "square", "tanh"),
    ),
}
"""The device functions that rules name, by their file in kernels/."""


class Step(NamedTuple):
    """One operation on its operands.

    Attributes:
        operands: nodes of the graph, and numbers.
        value: the result, in the kernels' language.
        grads: the gradient of each operand; None where there is none.
        formula: the result, as a reader would write it; "": as `value`.
        takes: places of the operands that are conditions: true or false.
        gives: whether the result is a condition.
        tensors: whether numbers among the operands must be tensors in the kernel.
        compares: whether operands are compared: Triton 3.6 rounds a number that stands there to float32.
    """

    operands: tuple[Any, ...]
    value: str
    grads: tuple[str | None, ...]
    formula: str = ""
    takes: tuple[int, ...] = ()
    gives: bool = False
    tensors: bool = False
    compares: bool = False


class Refused(Exception):
    """Arguments that an operation cannot take here; the text says why."""


def literal(x: float) -> str:
    """A number as kernels spell it."""
    x = float(x)
    if math.isnan(x):
        return 'float("nan")'
    if math.isinf(x):
        return 'float("inf")' if x > 0 else '-float("inf")'
    return repr(x)


def number(name: str, x: Any) -> float:
    """An argument that must be one; `name` is what it is called where it is not."""
    if type(x) in (bool, int, float):
        return x
    if isinstance(x, numbers.Real):
        return float(x)
    raise Refused(f"{name} must be a number that is known when the function is traced")
