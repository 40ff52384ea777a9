"""Patterns of code: where a class's methods hold one, and the same methods with something else in its place.

A pattern is Python. In it a name in capitals stands for any expression but a literal, `self.NAME` in capitals for any
attribute, and another name for any variable, the same one throughout; one that starts with "_" must be used nowhere
else. The name of a function that is called stands for itself.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

Found = dict[str, Any]
"""From each name of a pattern to what it stands for: an expression, or the name of a variable or an attribute."""


Methods = tuple[tuple[str, Any], ...]
"""The names and functions of a class."""


@dataclass(frozen=True)
class Pattern:
    """Code, and what to put in its place."""

    before: str
    after: str


@dataclass(frozen=True)
class Site:
    """Where a method holds a pattern.

    Attributes:
        method, pattern: which, and the place: line and column within the method.
        attributes: (name in the pattern, attribute) of each `self.NAME`.
        looped: whether it is in a loop.
    """

    method: str
    pattern: Pattern
    place: tuple[int, int]
    attributes: tuple[tuple[str, str], ...]
    looped: bool


def bind(pattern: Any, node: Any, found: Found) -> bool:
    """Whether a node is what a pattern says, given what its names stand for so far; they are added to."""
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(bind(p, n, found) for p, n in zip(pattern, node, strict=True))
    if not isinstance(pattern, ast.AST):
        return bool(pattern == node)
    if isinstance(pattern, ast.Name) and pattern.id != "self":
        if pattern.id.isupper():
            return not isinstance(node, ast.Constant) and _same(found.setdefault(pattern.id, node), node)
        return isinstance(node, ast.Name) and found.setdefault(pattern.id, node.id) == node.id
    if not _of_one_kind(pattern, node):
        return False
    if isinstance(pattern, ast.Name):
        return bool(pattern.id == node.id)
    if isinstance(pattern, ast.Attribute) and pattern.attr.isupper():
        return bind(pattern.value, node.value, found) and found.setdefault(pattern.attr, node.attr) == node.attr
    if isinstance(pattern, ast.Call) and isinstance(pattern.func, ast.Name):
        same = isinstance(node.func, ast.Name) and pattern.func.id == node.func.id
        return same and bind(pattern.args, node.args, found) and bind(pattern.keywords, node.keywords, found)
    fields = [f for f in pattern._fields if f not in ("ctx", "type_comment", "kind")]
    return all(bind(getattr(pattern, f), getattr(node, f), found) for f in fields)


def _of_one_kind(one: Any, other: Any) -> bool:
    return type(one) is type(other)


def _same(one: ast.AST, other: ast.AST) -> bool:
    return one is other or ast.dump(one) == ast.dump(other)


class _Substitute(ast.NodeTransformer):
    def __init__(self, found: Found) -> None:
        self.found = found

    def visit_Name(self, node: ast.Name) -> ast.AST:
        stands_for = self.found.get(node.id)
        if isinstance(stands_for, ast.AST):
            return copy.deepcopy(stands_for)
        return ast.Name(stands_for or node.id, node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        attr = self.found.get(node.attr, node.attr) if node.attr.isupper() else node.attr
        return ast.Attribute(self.visit(node.value), attr, node.ctx)


class Rewriter(ast.NodeTransformer):
    """Finds a pattern in a method; where `wanted` says so, it puts what is to be there in its place."""

    def __init__(self, method: ast.FunctionDef, pattern: Pattern, wanted: frozenset[tuple[int, int]]) -> None:
        self.method, self.pattern, self.wanted = method, pattern, wanted
        self.before, self.after = (ast.parse(textwrap.dedent(code)).body for code in (pattern.before, pattern.after))
        self.sites: list[Site] = []
        self.loops = 0
        self.loads = Counter(_loads(method))
        names = Counter(name for statement in self.before for name in _loads(statement))
        self.uses = {name: n for name, n in names.items() if name.startswith("_")}

    def at(self, node: ast.AST, found: Found) -> bool:
        """Note a match; whether it is to be replaced."""
        if any(self.loads[found[name]] != uses for name, uses in self.uses.items()):
            return False
        place = (node.lineno, node.col_offset)  # type: ignore[attr-defined]
        attributes = tuple((k, v) for k, v in found.items() if isinstance(v, str) and k.isupper())
        self.sites.append(Site(self.method.name, self.pattern, place, attributes, self.loops > 0))
        return place in self.wanted

    def generic_visit(self, node: ast.AST) -> ast.AST:
        loops = isinstance(node, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp))
        self.loops += loops
        try:
            return self.replaced(node)
        finally:
            self.loops -= loops

    def replaced(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(self.before[0], ast.Expr):
            return self.expression(node)
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                setattr(node, field, list(self.statements(statements)))
        return node

    def expression(self, node: ast.AST) -> ast.AST:
        found: Found = {}
        if isinstance(node, ast.expr) and bind(self.before[0].value, node, found) and self.at(node, found):  # type: ignore[attr-defined]
            new = _Substitute(found).visit(copy.deepcopy(self.after[0].value))  # type: ignore[attr-defined]
            return ast.fix_missing_locations(ast.copy_location(new, node))
        return node

    def statements(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        i, n = 0, len(self.before)
        while i < len(statements):
            found: Found = {}
            window = statements[i : i + n]
            if bind(self.before, window, found) and self.at(window[0], found):
                for new in copy.deepcopy(self.after):
                    new = _Substitute(found).visit(new)
                    yield ast.fix_missing_locations(ast.copy_location(new, window[0]))
                i += n
            else:
                yield statements[i]
                i += 1


def _loads(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]


def sites_of(cls: type, pattern: Pattern, done: tuple[Site, ...] = ()) -> tuple[Site, ...]:
    """Where the methods of a class hold a pattern, once other sites are done; none where there is no source to read."""
    return _sites_in(methods(cls), pattern, done)


@functools.cache
def _sites_in(functions: Methods, pattern: Pattern, done: tuple[Site, ...]) -> tuple[Site, ...]:
    found: list[Site] = []
    for name, function in functions:
        if (tree := _parsed(function)) is not None:
            _rewrite(tree, [site for site in done if site.method == name])
            rewriter = Rewriter(tree, pattern, frozenset())
            rewriter.visit(tree)
            found += rewriter.sites
    return tuple(found)


def rewritten(functions: Methods, sites: tuple[Site, ...]) -> dict[str, FunctionType]:
    """The methods of a class, as `methods` gives them, with what their patterns say at these sites.

    They are made from the source, in the globals of their own module: as those change, so do they.

    Raises:
        LookupError: the class holds no such pattern there, or a decorator cannot be applied again.
    """
    made = {}
    for name in dict.fromkeys(site.method for site in sites):
        function = dict(functions).get(name)
        tree = _parsed(function) if function else None
        if tree is None:
            raise LookupError(f"its method {name} has no source that can be read")
        _rewrite(tree, [site for site in sites if site.method == name])
        made[name] = _compiled(tree, function)
    return made


def _rewrite(tree: ast.FunctionDef, sites: list[Site]) -> None:
    for pattern in dict.fromkeys(site.pattern for site in sites):
        wanted = frozenset(site.place for site in sites if site.pattern == pattern)
        rewriter = Rewriter(tree, pattern, wanted)
        rewriter.visit(tree)
        if wanted - {site.place for site in rewriter.sites}:
            raise LookupError(f"{tree.name} is another one than when it was fused: the model's code has changed")


def methods(cls: type) -> Methods:
    """The functions of the class that defines forward, as they are now, but for those that a subclass overrides."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if owner is nn.Module:
        return ()
    there = ((name, value) for name, value in vars(owner).items() if isinstance(value, FunctionType))
    return tuple((name, value) for name, value in there if getattr(cls, name) is value)


def _parsed(function: Any) -> ast.FunctionDef | None:
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType) or inner.__code__.co_freevars:  # super(), or what a factory was given
        return None
    try:
        file, start = inspect.findsource(inner)
        lines = inspect.getblock(file[start:])
        tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
        known = inner.__code__ in _codes_in("".join(file))
    except (OSError, TypeError, SyntaxError):
        return None
    if not known or not isinstance(tree, ast.FunctionDef):
        return None
    ast.increment_lineno(tree, start)
    return tree


class _Codes:
    """The code of the functions in a file: one that was changed since it was imported says something else by now."""

    def __init__(self, code: CodeType) -> None:
        self.found = {self.key(code)}
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                self.found |= _Codes(inner).found

    def __contains__(self, code: CodeType) -> bool:
        return self.key(code) in self.found

    @staticmethod
    def key(code: CodeType) -> tuple[Any, ...]:
        constants = tuple(_Codes.key(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
        return code.co_name, code.co_firstlineno, code.co_code, code.co_names, code.co_varnames, constants


@functools.lru_cache(maxsize=32)
def _codes_in(source: str) -> _Codes:
    return _Codes(compile(source, "", "exec", dont_inherit=True))


def _compiled(tree: ast.FunctionDef, function: Any) -> FunctionType:
    """The function of a tree, its decorators applied again; its lines are those of the file it came from."""
    inner = inspect.unwrap(function)
    if (private := next(_private_names(tree), None)) is not None:
        raise LookupError(f"its method {tree.name} has the private name {private}, spelt as its class says")
    if [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)][:1] != ["self"]:
        raise LookupError(f"the first parameter of its method {tree.name} is not called self")
    # Annotations are kept as text where the file says so.
    code = compile(
        ast.fix_missing_locations(ast.Module([tree], [])),
        inner.__code__.co_filename,
        "exec",
        flags=inner.__code__.co_flags & __future__.annotations.compiler_flag,
        dont_inherit=True,
    )
    made: dict[str, Any] = {}
    try:
        exec(code, inner.__globals__, made)
    except Exception as error:
        raise LookupError(f"{function.__qualname__} cannot be made again: {error}") from error
    new, own = made[tree.name], inspect.unwrap(made[tree.name])
    # Its defaults are the very objects that the original's are.
    own.__defaults__, own.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    own.__qualname__ = new.__qualname__ = function.__qualname__
    return new


def wrappers(function: Any) -> list[Any]:
    """The code of what is around a function, by `__wrapped__`."""
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(getattr(function, "__code__", type(function)))
        function = function.__wrapped__
    return found


def _private_names(tree: ast.AST) -> Iterator[str]:
    """Names such as __x: in a class Python puts the class's name in front of them."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        if isinstance(name, str) and name.startswith("__") and not name.endswith("__"):
            yield name
