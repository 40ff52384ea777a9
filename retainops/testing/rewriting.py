"""From a `@triton.jit` function to a Python function that the interpreter can run.

First what Python would do otherwise than Triton's compiler, as functions; then a rewriter that calls them.
"""

from __future__ import annotations

import ast
import functools
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

from retainops.testing.builder import semantic


def assigned(value: Any) -> Any:
    """What a name holds after `name = value`: the compiler makes scalars of numbers."""
    if isinstance(value, tuple):
        items = map(assigned, value)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return semantic.to_tensor(value, False)


def boolean(conjunction: bool, *operands: Callable[[], Any]) -> Any:
    """`a and b`, `a or b`: only compile-time operands cut the evaluation short."""
    result = None
    for operand in operands:
        value = operand()
        if isinstance(value, tl.tensor):
            if isinstance(result, tl.tensor):
                value = semantic.logical_and(result, value) if conjunction else semantic.logical_or(result, value)
            result = value
        elif bool(value) != conjunction:
            return value
        elif not isinstance(result, tl.tensor):
            result = value
    return result


def loop(start: Any, stop: Any = None, step: Any = 1, **_hints: Any) -> Iterator[tl.tensor]:
    """`range` and `tl.range`: the index is a scalar of the bounds' common integer type."""
    start, stop = (0, start) if stop is None else (start, stop)
    bounds = [semantic.to_tensor(b) for b in (start, stop, step)]
    dtype = functools.reduce(semantic.integer_promote_impl, (b.dtype for b in bounds))
    for i in range(*(b.handle.data.item() for b in bounds)):
        yield semantic.scalar_constant(i, dtype)


class BlockTruth(TypeError):
    """The truth of a block was asked for."""


def truth(x: Any) -> bool:
    """Whether `if x:` takes its branch."""
    x = x.condition if isinstance(x, tl.condition) else x
    if not isinstance(x, tl.tensor):
        return bool(x)
    if x.handle.data.size != 1:
        raise BlockTruth(f"a block of shape {x.handle.data.shape} is neither true nor false; use &, | and tl.where")
    return bool(x.handle.data.item())


def negation(x: Any) -> Any:
    """`not x`."""
    return semantic.not_(x) if isinstance(x, tl.tensor) else not x


def holds(x: Any) -> bool:
    """Whether `assert x` passes: every lane counts."""
    return bool(x.handle.data.all() if isinstance(x, tl.tensor) else x)


def least(*values: Any) -> Any:
    """`min`."""
    return _value(tl.core.builtin_min(*values))


def greatest(*values: Any) -> Any:
    """`max`."""
    return _value(tl.core.builtin_max(*values))


def _value(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


_BUILTINS = {"range": loop, "min": least, "max": greatest}
_HELPERS: dict[str, Callable[..., Any]] = {f"__{f.__name__}": f for f in (assigned, boolean, holds, negation, truth)}
_codes: weakref.WeakSet[CodeType] = weakref.WeakSet()
_interpreted: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()


class _Rewriter(ast.NodeTransformer):
    """Makes Python's evaluation that of Triton's compiler: assignments, conditions, `and`, `or`, `not`, `a < b < c`."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = _call("__assigned", [self.visit(node.value)])
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return self.visit(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)))

    def _visit_condition(self, node: Any, helper: str = "__truth") -> ast.AST:
        self.generic_visit(node)
        node.test = _call(helper, [node.test])
        return node

    visit_If = visit_While = visit_IfExp = _visit_condition

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return self._visit_condition(node, "__holds")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return _call("__negation", [node.operand]) if isinstance(node.op, ast.Not) else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        operands = [ast.Lambda(_parameters(), self.visit(value)) for value in node.values]
        return _call("__boolean", [ast.Constant(isinstance(node.op, ast.And)), *operands])

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        if len(node.ops) == 1:
            return self.generic_visit(node)
        pairs = zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)
        return self.visit(ast.BoolOp(ast.And(), [ast.Compare(left, [op], [right]) for left, op, right in pairs]))


def _call(name: str, args: list[Any]) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), args, [])


def _parameters(*names: str) -> ast.arguments:
    return ast.arguments(posonlyargs=[], args=[ast.arg(n) for n in names], kwonlyargs=[], kw_defaults=[], defaults=[])


def interpreted(jit: JITFunction) -> Callable[..., Any]:
    """The function to run in place of `jit`; made once, and forgotten with it.

    It lives in the globals of the original and adds no name to them; its line numbers are the original's.
    """
    if jit.fn not in _interpreted:
        _interpreted[jit.fn] = _interpret(jit)
    return _interpreted[jit.fn]


def _interpret(jit: JITFunction) -> Callable[..., Any]:
    original = jit.fn
    names = _HELPERS | _free_names(original)
    body = ast.parse(textwrap.dedent("".join(jit.raw_src))).body[0]
    assert isinstance(body, ast.FunctionDef)
    body.decorator_list, body.returns = [], None
    for argument in [*body.args.posonlyargs, *body.args.args, *body.args.kwonlyargs]:
        argument.annotation = None
    none = ast.Constant(None)
    body.args.defaults = [none for _ in body.args.defaults]
    body.args.kw_defaults = [default and none for default in body.args.kw_defaults]
    body.body = [_Rewriter().visit(statement) for statement in body.body]

    parameters = _parameters(*names)
    result = ast.Return(ast.Name(original.__name__, ast.Load()))
    factory = ast.FunctionDef("factory", parameters, [body, result], [])
    module = ast.fix_missing_locations(ast.Module([factory], []))
    ast.increment_lineno(module, jit.starting_line_number - 1)
    scope: dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec"), original.__globals__, scope)
    function: Callable[..., Any] = scope["factory"](**names)
    function.__defaults__ = original.__defaults__ and tuple(map(_value, original.__defaults__))
    function.__kwdefaults__ = original.__kwdefaults__ and {k: _value(v) for k, v in original.__kwdefaults__.items()}
    _codes.add(function.__code__)
    return function


def _free_names(function: Any) -> dict[str, Any]:
    """Names that the rewritten function must find elsewhere than the original: builtins, constexprs, a closure's."""
    names = {name: f for name, f in _BUILTINS.items() if name not in function.__globals__}
    for name in function.__code__.co_names:
        if isinstance(value := function.__globals__.get(name), tl.constexpr):
            names[name] = value.value
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return names | {name: _value(cell.cell_contents) for name, cell in cells}


def running_line() -> str:
    """Which line of interpreted code is running, as "file:line"."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code not in _codes:
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
