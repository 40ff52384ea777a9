"""The pointwise family: y = f(c), c = a o b, each in one kernel, whose point is c.

For each operation o (mul, add, sub, div) and each function f (sin, cos, tanh, sigmoid, exp, relu, gelu, gelu_tanh,
silu, softplus, square) there is `o_f(a, b)`: `mul_sin` is sin(a * b), `sub_square` is (a - b)^2, and so on.
`ro.points(ro.pointwise.mul_sin)` shows what can be asked for. docs/ops/pointwise.md derives them all.

Example:
    >>> kept = ro.Retained("c")
    >>> ro.pointwise.sub_square(a, b, retain=kept).sum().backward()
    >>> kept.c.grad
"""

from collections.abc import Callable
from typing import Any

from retainops.ops.pointwise import BINARY, FAMILY, UNARY

globals().update(FAMILY)
__all__ = list(FAMILY)


def __getattr__(name: str) -> Callable[..., Any]:
    if name in FAMILY:  # of a row that was added since
        return FAMILY[name]
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; there is o_f for each o of {', '.join(BINARY)} and each f of "
        f"{', '.join(UNARY)}, such as mul_sin"
    )


def __dir__() -> list[str]:
    return sorted(FAMILY)
