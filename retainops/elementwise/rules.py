"""The operations that `fuse_pointwise` takes: how a kernel computes each, and its derivative.

A rule is text with places: `{0}`, `{1}`, ... are the operands, `{y}` the result and `{dy}` its gradient. Derivatives
are those of eager PyTorch: NaN or infinite where eager's are, and ties shared as eager shares them.
"""

from __future__ import annotations

import inspect
import numbers
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.nn import functional as F

from retainops.elementwise.clamp import clamp
from retainops.elementwise.step import Refused, Step, literal, number


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Step:
    if number("alpha", alpha) == 1:
        return Step((input, other), "{0} + {1}", ("{dy}", "{dy}"))
    a = literal(alpha)
    return Step((input, other), f"{{0}} + {a} * {{1}}", ("{dy}", f"{a} * {{dy}}"))


def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Step:
    if number("alpha", alpha) == 1:
        return Step((input, other), "{0} - {1}", ("{dy}", "-{dy}"))
    a = literal(alpha)
    return Step((input, other), f"{{0}} - {a} * {{1}}", ("{dy}", f"-{a} * {{dy}}"))


def _mul(input: Any, other: Any) -> Step:
    return Step((input, other), "{0} * {1}", ("{dy} * {1}", "{dy} * {0}"))


def _div(input: Any, other: Any, *, rounding_mode: Any = None) -> Step:
    if rounding_mode is not None:
        raise Refused("a rounding_mode is not supported")
    grads = "divide({dy}, {1})", "-{dy} * divide({y}, {1})"
    return Step((input, other), "divide({0}, {1})", grads, "{0} / {1}", tensors=True)


def _pow(input: Any, exponent: Any) -> Step:
    if isinstance(input, numbers.Real):
        raise Refused("the base must be a tensor: write a ** x as torch.exp(x * math.log(a))")
    exponent = number("the exponent", exponent)
    e = literal(exponent)
    shown = repr(exponent) if exponent >= 0 else f"({exponent!r})"
    return Step((input,), f"power({{0}}, {e})", (f"power_grad({{0}}, {e}, {{dy}})",), f"{{0}} ** {shown}")


def _where(condition: Any, input: Any, other: Any) -> Step:
    grads = None, "tl.where({0}, {dy}, 0.0)", "tl.where({0}, 0.0, {dy})"
    both = isinstance(input, numbers.Real) and isinstance(other, numbers.Real)
    return Step((condition, input, other), "tl.where({0}, {1}, {2})", grads, "where({0}, {1}, {2})", (0,), tensors=both)


def _gelu(input: Any, approximate: str = "none") -> Step:
    if approximate == "none":
        return Step((input,), "gelu({0})", ("gelu_grad({0}, {dy})",))
    if approximate != "tanh":
        raise Refused('approximate must be "none" or "tanh"')
    return Step((input,), "gelu_tanh({0})", ("gelu_tanh_grad({0}, {dy})",), "gelu({0}, approximate='tanh')")


def _softplus(input: Any, beta: Any = 1, threshold: Any = 20) -> Step:
    if beta != 1 or threshold != 20:
        raise Refused("only softplus(x) with its default beta and threshold is supported")
    return Step((input,), "softplus({0})", ("softplus_grad({0}, {dy})",))


def _lerp(input: Any, end: Any, weight: Any) -> Step:
    grads = "{dy} * (1.0 - {2})", "{dy} * {2}", "{dy} * ({1} - {0})"
    return Step((input, end, weight), "lerp({0}, {1}, {2})", grads, tensors=True)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Step:
    value = number("value", value)
    if value == 1:
        return Step((input, tensor1, tensor2), "{0} + {1} * {2}", ("{dy}", "{dy} * {2}", "{dy} * {1}"))
    v = literal(value)
    grads = "{dy}", f"{{dy}} * ({v} * {{2}})", f"{{dy}} * ({v} * {{1}})"
    formula = f"{{0}} + {value!r} * {{1}} * {{2}}"
    return Step((input, tensor1, tensor2), f"{{0}} + {v} * {{1}} * {{2}}", grads, formula)


def _unary(value: str, grad: str | None, formula: str = "") -> Callable[..., Step]:
    def rule(input: Any) -> Step:
        return Step((input,), value, (grad,), formula)

    return rule


def _pair(name: str) -> Callable[..., Step]:
    grads = f"{name}_grad({{0}}, {{1}}, {{dy}})", f"{name}_grad({{1}}, {{0}}, {{dy}})"

    def rule(input: Any, other: Any) -> Step:
        if isinstance(input, numbers.Real) or isinstance(other, numbers.Real):
            raise Refused("both must be tensors: a number is a bound for torch.clamp")
        return Step((input, other), f"{name}({{0}}, {{1}})", grads)

    return rule


def _compared(sign: str) -> Callable[..., Step]:
    def rule(input: Any, other: Any) -> Step:
        return Step((input, other), f"{{0}} {sign} {{1}}", (None, None), gives=True, compares=True)

    return rule


def _logical(sign: str) -> Callable[..., Step]:
    def rule(input: Any, other: Any) -> Step:
        return Step((input, other), f"{{0}} {sign} {{1}}", (None, None), takes=(0, 1), gives=True)

    return rule


def _logical_not(input: Any) -> Step:
    return Step((input,), "~{0}", (None,), takes=(0,), gives=True)


def _isnan(input: Any) -> Step:
    return Step((input,), "{0} != {0}", (None,), "isnan({0})", gives=True)


class Row(NamedTuple):
    """One operation of the table.

    Attributes:
        names: it is `torch.<name>`, `Tensor.<name>`, and `<name>` of torch.nn.functional and torch.special, of each
            that there is.
        rule: from its arguments, by PyTorch's names, to a `Step`; raises Refused for those that it cannot take.
        operators: Python's.
        example: arguments for the docs.
    """

    names: tuple[str, ...]
    rule: Callable[..., Step]
    operators: tuple[Callable[..., Any], ...] = ()
    example: tuple[Any, ...] = ("x",)


ROWS = (
    Row(("add",), _add, (operator.add,), ("x", "y")),
    Row(("sub", "subtract"), _sub, (operator.sub,), ("x", "y")),
    Row(("mul", "multiply"), _mul, (operator.mul,), ("x", "y")),
    Row(("div", "divide", "true_divide"), _div, (operator.truediv,), ("x", "y")),
    Row(("neg", "negative"), _unary("-{0}", "-{dy}"), (operator.neg,)),
    Row(("pow",), _pow, (operator.pow,), ("x", 3)),
    Row(("square",), _unary("square({0})", "{dy} * (2.0 * {0})")),
    Row(("sqrt",), _unary("sqrt({0})", "divide({dy}, 2.0 * {y})")),
    Row(("rsqrt",), _unary("rsqrt({0})", "-0.5 * {dy} * ({y} * {y} * {y})")),
    Row(("reciprocal",), _unary("reciprocal({0})", "-{dy} * ({y} * {y})")),
    Row(("abs", "absolute"), _unary("tl.abs({0})", "{dy} * sign({0})", "abs({0})"), (operator.abs,)),
    Row(("exp",), _unary("exp({0})", "{dy} * {y}")),
    Row(("expm1",), _unary("expm1({0})", "{dy} * ({y} + 1.0)")),
    Row(("log",), _unary("log({0})", "divide({dy}, {0})")),
    Row(("log1p",), _unary("log1p({0})", "divide({dy}, {0} + 1.0)")),
    Row(("sin",), _unary("sin({0})", "{dy} * cos({0})")),
    Row(("cos",), _unary("cos({0})", "-{dy} * sin({0})")),
    Row(("tanh",), _unary("tanh({0})", "{dy} * (1.0 - {y} * {y})")),
    Row(("sigmoid", "expit"), _unary("sigmoid({0})", "{dy} * (1.0 - {y}) * {y}")),
    Row(("erf",), _unary("erf({0})", "{dy} * (1.1283791670955126 * exp(-{0} * {0}))")),  # 2 / sqrt(pi)
    Row(("relu",), _unary("relu({0})", "relu_grad({0}, {dy})")),
    Row(("gelu",), _gelu),
    Row(("silu",), _unary("silu({0})", "silu_grad({0}, {dy})")),
    Row(("softplus",), _softplus),
    Row(("maximum", "max"), _pair("maximum"), (), ("x", "y")),
    Row(("minimum", "min"), _pair("minimum"), (), ("x", "y")),
    Row(("clamp", "clip"), clamp, (), ("x", "low", "high")),
    Row(("clamp_min",), lambda input, min: clamp(input, min), (), ("x", "low")),
    Row(("clamp_max",), lambda input, max: clamp(input, None, max), (), ("x", "high")),
    Row(("where",), _where, (), ("condition", "x", "y")),
    Row(("lerp",), _lerp, (), ("x", "y", "weight")),
    Row(("addcmul",), _addcmul, (), ("x", "y", "z")),
    Row(("detach",), _unary("{0}", None, "detach({0})")),
    Row(("lt", "less"), _compared("<"), (operator.lt,), ("x", "y")),
    Row(("le", "less_equal"), _compared("<="), (operator.le,), ("x", "y")),
    Row(("gt", "greater"), _compared(">"), (operator.gt,), ("x", "y")),
    Row(("ge", "greater_equal"), _compared(">="), (operator.ge,), ("x", "y")),
    Row(("eq",), _compared("=="), (operator.eq,), ("x", "y")),
    Row(("ne", "not_equal"), _compared("!="), (operator.ne,), ("x", "y")),
    Row(("isnan",), _isnan),
    Row(("logical_and", "bitwise_and"), _logical("&"), (operator.and_,), ("p", "q")),
    Row(("logical_or", "bitwise_or"), _logical("|"), (operator.or_,), ("p", "q")),
    Row(("logical_xor", "bitwise_xor"), _logical("^"), (operator.xor,), ("p", "q")),
    Row(("logical_not", "bitwise_not"), _logical_not, (operator.invert,), ("p",)),
)

_OWNERS = (torch, F, torch.special)
FUNCTIONS = {
    f: row
    for row in ROWS
    for f in (
        *row.operators,
        *(getattr(owner, name) for owner in _OWNERS for name in row.names if hasattr(owner, name)),
    )
}
METHODS = {name: row for row in ROWS for name in row.names if hasattr(torch.Tensor, name)}
METHODS["where"] = Row(("where",), lambda input, condition, other: _where(condition, input, other))


def row_of(kind: str, target: Any) -> Row | None:
    """The operation that a node of a graph is; None: one that is not in the table."""
    return METHODS.get(target) if kind == "call_method" else FUNCTIONS.get(target)


def step_of(row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    """An operation on these arguments.

    Raises:
        Refused: it cannot take them.
    """
    kwargs = dict(kwargs)
    if kwargs.pop("inplace", False):
        raise Refused("inplace=True would change a tensor in place")
    if kwargs.pop("out", None) is not None:
        raise Refused("out= would write to a tensor")
    try:
        arguments = inspect.signature(row.rule).bind(*args, **kwargs)
    except TypeError as e:
        raise Refused(f"these arguments are not supported ({e})") from None
    found = row.rule(*arguments.args, **arguments.kwargs)
    return found._replace(operands=tuple(map(_operand, found.operands)))


def _operand(x: Any) -> Node | float:
    if isinstance(x, Node) or type(x) in (bool, int, float):
        return x
    if isinstance(x, numbers.Real):
        return float(x)
    raise Refused(f"an operand is {type(x).__name__}; expected a tensor or a real number")
