"""Unary of binary: y = f(c), c = a o b, for every f and o of two tables. A row adds an op for each row of the other.

A row's kernels are the functions `f` and `f_grad` of kernels/unary.py, or of kernels/binary.py. For results of 16 bits
they are those of kernels/narrow.py, where it has them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from retainops import registry
from retainops.dispatch import run
from retainops.ops._check import check_elementwise
from retainops.ops._pointwise import Maths, Pointwise, functions_of, normal, pointwise
from retainops.registry import Op, Point, PointInfo
from retainops.retained import Retained

UNARY: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "sin": ("sin({})", torch.sin),
    "cos": ("cos({})", torch.cos),
    "tanh": ("tanh({})", torch.tanh),
    "sigmoid": ("sigmoid({})", torch.sigmoid),
    "exp": ("exp({})", torch.exp),
    "relu": ("relu({})", torch.relu),
    "gelu": ("gelu({})", F.gelu),
    "gelu_tanh": ("gelu({}, approximate='tanh')", functools.partial(F.gelu, approximate="tanh")),
    "silu": ("silu({})", F.silu),
    "softplus": ("softplus({})", F.softplus),
    "square": ("square({})", torch.square),
}
"""From the name of f to its formula and its definition."""

ONE_ACCESS = ("gelu", "gelu_tanh", "silu")
"""Those that are a product with a quotient, whose forward does best with one access a thread: see `Pointwise`."""
ONE_ACCESS_OF_QUOTIENTS = (*ONE_ACCESS, "sigmoid", "exp")
"""The same of a / b."""

BINARY: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "mul": ("a * b", operator.mul),
    "add": ("a + b", operator.add),
    "sub": ("a - b", operator.sub),
    "div": ("a / b", operator.truediv),
}
"""From the name of o to its formula and its definition."""

DOC = """{formula} in one kernel, with the gradient of c = {inner} on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in PyTorch's own expression.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = {inner}.

    Returns:
        {formula}, of the broadcast shape and the promoted dtype.
        The interior c is held in float32 (float64 for float64), so in float16 and bfloat16 the result is nearer to the
        true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = {inner}, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.pointwise.{name}(a, b, retain=kept).sum().backward()
        >>> kept.c.grad

    Source: docs/ops/pointwise.md, which derives it.
    """


def unary_of_binary(binary: str, unary: str) -> Op:
    """Register f(a o b), of a row of each table."""
    inner, o = BINARY[binary]
    formula, f = UNARY[unary]
    formula = formula.format(inner)

    def op(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
        check_elementwise(op.__name__, a=a, b=b)
        return run(record, (a, b), retain)

    def reference(a: Any, b: Any, point: Point) -> torch.Tensor:
        c = point("c", o(a, b))
        return f(c)

    op.__name__ = op.__qualname__ = f"{binary}_{unary}"
    op.__module__ = "retainops.pointwise"
    op.__doc__ = DOC.format(formula=formula, inner=inner, name=op.__name__)
    record = pointwise(
        op,
        formula,
        reference,
        Pointwise(
            _maths(binary, unary),
            grads=2,
            equal={1: 0} if binary == "add" else None,
            narrow=_maths(binary, unary, narrow=True),
            one_access=("forward",) if unary in (ONE_ACCESS_OF_QUOTIENTS if binary == "div" else ONE_ACCESS) else (),
        ),
        name=op.__name__,
        points=[PointInfo("c", inner, "broadcast of a and b")],
        sample=_dividend_and_divisor if binary == "div" else normal(2),
    )
    return record


def _dividend_and_divisor(*where: Any) -> tuple[Any, ...]:
    """No divisor near zero: quotients of all magnitudes have no common rounding error to be measured by."""
    a, b = normal(2)(*where)
    return a, b + torch.where(b < 0, -0.5, 0.5).to(b.dtype)


def _maths(binary: str, unary: str, narrow: bool = False) -> Maths:
    def make() -> tuple[Any, Any]:
        from retainops.kernels.pointwise import unary_of_binary

        of_unary = functions_of("unary", unary, f"{unary}_grad", narrow=narrow)
        of_binary = functions_of("binary", binary, f"{binary}_grad", narrow=narrow)
        return unary_of_binary(f"{binary}_{unary}", *of_unary, *of_binary)

    return make


FAMILY = {record.name: record.call for record in (unary_of_binary(o, f) for o in BINARY for f in UNARY)}
"""From the name of each op to its function."""
registry.alias("add_gelu", "bias_gelu")
