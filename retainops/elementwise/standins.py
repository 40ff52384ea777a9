"""What a traced function is given for its arguments: values that record each operation on them as a step."""

from __future__ import annotations

import numbers
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from retainops.elementwise.rules import ROWS, row_of, step_of
from retainops.elementwise.step import Refused

_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}", "<retainops")


class Tracer(GraphAppendingTracer):
    """Records steps; what is not one is an error that names it, and the line that asked for it.

    Of each node, `meta` has the `step`, the `name` of the operation, and in words `what` it is and where.
    """

    def __init__(self, graph: fx.Graph, name: str) -> None:
        super().__init__(graph)
        self.name = name
        self.refused: NotImplementedError | None = None
        self._autocasts = _autocasts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        if kind != "placeholder" and row_of(kind, target) is None:
            _ = [a.node for a in args if isinstance(a, fx.Proxy)]  # an attribute among them is what is refused
            what = _spelled(kind, target, args)
            in_place = what.endswith("_") and not what.endswith("__")
            self.refuse(f"{what}{', an in-place operation,' if in_place else ''}")
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) or (isinstance(a, fx.Proxy) and a.tracer is not self):
            self.refuse("a tensor that is not a parameter", "make it a parameter")
        if isinstance(a, numbers.Real):  # numpy's among them
            return a if isinstance(a, (int, float)) else int(a) if isinstance(a, numbers.Integral) else float(a)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            if isinstance(a, (fx.Proxy, tuple, list, dict)):  # of what is in one it was said
                raise
            of = f"{type(a).__module__}.{type(a).__qualname__}"
            self.refuse(f"an argument that is {of}", "expected a parameter or a number")

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any) -> fx.Node:
        if kind == "placeholder":
            return super().create_node(kind, target, args, kwargs, *rest)
        what, row = _spelled(kind, target, args), row_of(kind, target)
        assert row is not None
        try:
            step = step_of(row, args, kwargs)
        except Refused as e:
            self.refuse(f"this use of {what}", str(e))
        if any(step.grads):
            self._check_modes(what)
        node = super().create_node(kind, target, args, kwargs, *rest)
        node.meta.update(step=step, name=row.names[0], what=f"{what} ({_where()})")
        return node

    def _check_modes(self, what: str) -> None:
        """The graph does not say under what its operations ran."""
        if not torch.is_grad_enabled():
            remedy = "what shall have no gradient is c.detach(); a Function has a backward of its own: call it outside"
            self.refuse(f"{what} under torch.no_grad, or in a torch.autograd.Function,", remedy)
        if _autocasts() != self._autocasts:
            self.refuse(f"{what} under torch.autocast", "call the fused function under it")

    def to_bool(self, obj: fx.Proxy) -> bool:
        what = "control flow by the value of a tensor (if, while, and, or, not, assert)"
        self.refuse(what, "use torch.where; a flag is a global or a closure, and no parameter")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refuse("iteration over a tensor")

    def refuse(self, what: str, remedy: str = "") -> NoReturn:
        """Raise: the function does what its kernels cannot."""
        remedy = remedy or _remedy(what)
        told = f"{self.name}: {what} at {_where()} is not supported in a fused function; {remedy}"
        self.refused = NotImplementedError(told)
        raise self.refused


_FUSED = ("softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "cross_entropy")
_REDUCING = ("sum", "mean", "prod", "var", "std", "norm", "amax", "amin", "max", "min", "logsumexp", "cumsum")
_PRODUCTS = ("matmul", "mm", "bmm", "linear", "einsum")
_OUTSIDE = (
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "size", "dim", "numel", "item"),
    *("dropout", "numpy"),
)
"""What has no place in a kernel, but beside it."""
WRITTEN_AS = {
    "leaky_relu": "torch.where(x > 0, x, 0.01 * x)",
    "elu": "torch.where(x > 0, x, torch.expm1(torch.clamp(x, max=0)))",
    "selu": "1.0507009873554805 * torch.where(x > 0, x, 1.6732632423543772 * torch.expm1(torch.clamp(x, max=0)))",
    "relu6": "torch.clamp(x, 0, 6)",
    "hardtanh": "torch.clamp(x, -1, 1)",
    "hardsigmoid": "torch.clamp(x + 3, 0, 6) / 6",
    "hardswish": "x * torch.clamp(x + 3, 0, 6) / 6",
    "logsigmoid": "-F.softplus(-x)",
    "softsign": "x / (1 + torch.abs(x))",
    "tanhshrink": "x - torch.tanh(x)",
}
"""Functions that a few supported ones make, with their defaults."""


def _remedy(what: str) -> str:
    """What to do in place of an operation."""
    name = what.rpartition(".")[2]
    if "in-place" in what:
        return "make a new value and bind the name to it: c = c + 1"
    name = name.replace("log_sigmoid", "logsigmoid")  # as torch.nn.functional's calls itself
    if name in WRITTEN_AS:
        return f"write it as {WRITTEN_AS[name]}, for its defaults"
    if what.startswith("numpy."):
        return "use torch's functions, torch.sin(x) for numpy.sin(x), and float(c) for a number c of numpy's"
    if what.endswith("(float)"):
        return "of functions of math, use torch's: torch.sin(x) for math.sin(x)"
    if what.startswith("reading a value"):
        return "a number that shapes the function, as a loop's does, is a global or a closure, and no parameter"
    if what.startswith("the attribute") or name in _OUTSIDE:
        return "do it outside the function, and pass the result"
    if name in _FUSED:
        return f"do it outside the function: ro.{name} is fused"
    if name in _REDUCING + _PRODUCTS:
        return "an element depends on others there: do it outside the function, and make the result a parameter"
    return f"supported are: {', '.join(row.names[0] for row in ROWS)}"


def _autocasts() -> int:
    """How many autocasts are around this."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _spelled(kind: str, target: Any, args: tuple[Any, ...]) -> str:
    """An operation by its full name."""
    if target is getattr:
        return f"the attribute Tensor.{args[1]}"
    if kind == "call_method":
        return f"Tensor.{target}"
    module = getattr(target, "__module__", None) or "torch"
    known = {"_operator": "operator", "torch._C._nn": "torch.nn.functional", "torch._tensor": "Tensor"}
    return f"{known.get(module, module)}.{getattr(target, '__name__', target)}"


def _where() -> str:
    """The line of the user's code that runs now."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "an unknown line"


class Value(fx.Proxy):
    """A stand-in that lets no operation on it pass for another one."""

    tracer: Tracer

    def __array_ufunc__(self, function: Any, *_: Any, **__: Any) -> None:
        self.tracer.refuse(f"numpy.{function.__name__}")

    def __array_function__(self, function: Any, *_: Any, **__: Any) -> None:
        self.tracer.refuse(f"numpy.{function.__name__}")

    @property
    def __array_struct__(self) -> None:
        self.tracer.refuse("numpy.asarray, or another function of numpy's,")

    def __getattr__(self, name: str) -> Any:
        # Refused at once: `x.dtype is torch.float16` would be False and no operation that anybody sees.
        if not name.startswith("__") and not callable(getattr(torch.Tensor, name, None)):
            self.tracer.refuse(f"the attribute Tensor.{name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            self.tracer.refuse(f"setting the attribute Tensor.{name}")
        super().__setattr__(name, value)


def _refusing(what: str) -> Callable[[Value], None]:
    def method(self: Value, *_: Any) -> None:
        self.tracer.refuse(what)

    return method


# Python falls back to others where these are missing: `x += 1` to x + 1, which leaves the tensor x as it was.
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_READING = ("float", "int", "complex", "index", "round", "trunc", "floor", "ceil", "contains", "len")
for _name in (*_ARITHMETIC, *_BITWISE):
    setattr(Value, f"__i{_name}__", _refusing(f"operator.i{_name}, an in-place operation,"))
for _name in ("setitem", "delitem"):
    setattr(Value, f"__{_name}__", _refusing("assignment to an element, an in-place operation,"))
for _name in _READING:
    setattr(Value, f"__{_name}__", _refusing(f"reading a value on the host ({_name})"))
