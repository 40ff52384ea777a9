"""Patterns of code: what they match, and what comes in its place.

A pattern is Python. In it a name in capitals stands for any expression but a literal, `self.NAME` in capitals for any
attribute, and another name for any variable, the same one throughout: one that it reads after its first statement, and
does not assign to, stands for none that it assigns to; one that starts with "_" must be used nowhere else. `self` is
the first parameter, whatever its name; in what processors.py looks at, the second. The name of a function that is
called stands for itself; in capitals for whatever is called by name, an attribute of self or a global function. Of a
call's arguments `*REST` and `**REST` stand for those that are left; a name in capitals that is the first statement of a
block stands for all that the others leave of it.
"""

from __future__ import annotations

import ast
import copy
import functools
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, *FUNCTIONS)
"""What may run several times: a function in a method, too, given to map or called twice."""
Found = dict[str, Any]
"""From each name of a pattern to what it stands for: an expression, arguments, or the name of a variable or an
attribute."""


Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class Pattern:
    """Code, and what to put in its place."""

    before: str
    after: str


@dataclass(frozen=True)
class Site:
    """Where a method holds a pattern.

    Attributes:
        method, pattern, place: which, and its lines and columns, of start and end: a * b * c starts where a * b does.
        attributes: (name in the pattern, attribute) of each `self.NAME`.
        called: (name in the pattern, what is called) of each `NAME(...)`: "self.act", "F.silu".
        looped: whether it is in a loop.
    """

    method: str
    pattern: Pattern
    place: Place
    attributes: tuple[tuple[str, str], ...]
    called: tuple[tuple[str, str], ...]
    looped: bool


@functools.cache
def needed(pattern: Pattern) -> frozenset[Any]:
    """Kinds of nodes, and names, without which code cannot hold a pattern: some, never one too many. They are quick to
    look for."""
    statements = ast.parse(textwrap.dedent(pattern.before)).body
    nodes = [statements[0].value] if isinstance(statements[0], ast.Expr) else statements
    marks: set[Any] = set()
    for node in (n for top in nodes for n in ast.walk(top)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.func.id.isupper():
            marks.add(node.func.id)
        name = getattr(node, "attr", None) or (node.arg if isinstance(node, ast.keyword) else None)
        if name is not None and not name.isupper():
            marks.add(name)
        # Names may stand for anything, and `*REST` for no argument at all.
        if not isinstance(node, (ast.Name, ast.expr_context)) and not (_rest(node) or _block(node)).isupper():
            marks.add(type(node))
    return frozenset(marks)


def there(tree: ast.AST) -> frozenset[Any]:
    """The kinds of nodes, and the names, that code has."""
    marks: set[Any] = set()
    for node in ast.walk(tree):
        marks |= {type(node), *(getattr(node, field, None) for field in ("id", "attr", "arg"))}
    return frozenset(marks)


def bind(pattern: Any, node: Any, found: Found) -> bool:
    """Whether a node is what a pattern says, given what its names stand for so far; they are added to."""
    if isinstance(pattern, list):
        if pattern and _block(pattern[0]).isupper():
            left = max(len(node) - len(pattern) + 1, 0)
            block = found.setdefault(_block(pattern[0]), node[:left])
            if [*map(ast.dump, block)] != [*map(ast.dump, node[:left])]:
                return False
            pattern, node = pattern[1:], node[left:]
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
        return bool(node.id == found.get("self", "self"))
    if isinstance(pattern, ast.Attribute) and pattern.attr.isupper():
        return bind(pattern.value, node.value, found) and found.setdefault(pattern.attr, node.attr) == node.attr
    if isinstance(pattern, ast.Call):
        arguments = (pattern.args, node.args), (pattern.keywords, node.keywords)
        return _bind_callee(pattern.func, node.func, found) and all(_bind_list(p, n, found) for p, n in arguments)
    fields = [f for f in pattern._fields if f not in ("ctx", "type_comment", "kind")]
    return all(bind(getattr(pattern, f), getattr(node, f), found) for f in fields)


def _bind_callee(pattern: ast.expr, node: ast.expr, found: Found) -> bool:
    if not isinstance(pattern, ast.Name):
        return bind(pattern, node, found)
    if pattern.id.isupper():
        return _is_dotted(node) and _same(found.setdefault(pattern.id, node), node)
    return isinstance(node, ast.Name) and node.id == pattern.id


def _is_dotted(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_dotted(node.value))


def _bind_list(pattern: list[Any], node: list[Any], found: Found) -> bool:
    """Arguments, of which the last one of the pattern may stand for all that are left."""
    n = len(pattern) - 1
    if n < 0 or not isinstance(pattern[n], (ast.Starred, ast.keyword)) or not (rest := _rest(pattern[n])).isupper():
        return bind(pattern, node, found)
    found[rest] = node[n:]
    return bind(pattern[:n], node[:n], found)


def _rest(node: Any) -> str:
    """The name of `*NAME` or `**NAME`."""
    starred = isinstance(node, ast.Starred) or (isinstance(node, ast.keyword) and node.arg is None)
    return node.value.id if starred and isinstance(node.value, ast.Name) else ""


def _block(node: Any) -> str:
    """The name that is a whole statement."""
    return node.value.id if isinstance(node, ast.Expr) and isinstance(node.value, ast.Name) else ""


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

    def visit_Expr(self, node: ast.Expr) -> Any:
        block = self.found.get(_block(node))
        return copy.deepcopy(block) if isinstance(block, list) else self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        attr = self.found.get(node.attr, node.attr) if node.attr.isupper() else node.attr
        return ast.Attribute(self.visit(node.value), attr, node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        args, keywords = ([*self.each(nodes)] for nodes in (node.args, node.keywords))
        return ast.Call(self.visit(node.func), args, keywords)

    def each(self, nodes: Any) -> Iterator[Any]:
        for node in nodes:
            rest = self.found.get(_rest(node))
            yield from copy.deepcopy(rest) if isinstance(rest, list) else [self.visit(node)]


class Rewriter(ast.NodeTransformer):
    """Finds a pattern in a method; where `wanted` says so, it puts what is to be there in its place.

    `self` in the pattern is the method's parameter number `owner`: 1 in a function of another object, to which the
    module is given.
    """

    def __init__(self, method: ast.FunctionDef, pattern: Pattern, wanted: frozenset[Place], owner: int = 0) -> None:
        self.method, self.pattern, self.wanted = method, pattern, wanted
        self.before, self.after = (ast.parse(textwrap.dedent(code)).body for code in (pattern.before, pattern.after))
        self.sites: list[Site] = []
        self.loops = 0
        names = Counter(name for statement in self.before for name in _loads(statement))
        self.uses = {name: n for name, n in names.items() if name.startswith("_")}
        self.assigned = {name for statement in self.before for name in _stores(statement)}
        self.later = {name for statement in self.before[1:] for name in _loads(statement)} - self.assigned
        self.owner = next(iter(_parameters(method)[owner:]), "self")
        calls = [n for statement in self.before for n in ast.walk(statement) if isinstance(n, ast.Call)]
        self.callees = {n.func.id for n in calls if isinstance(n.func, ast.Name) and n.func.id.isupper()}

    @functools.cached_property
    def loads(self) -> Counter[str]:
        return Counter(_loads(self.method))

    @functools.cached_property
    def locals(self) -> frozenset[str]:
        return frozenset(_locals(self.method))

    def at(self, node: ast.AST, found: Found) -> bool:
        """Note a match; whether it is to be replaced."""
        if any(self.loads[found[name]] != uses for name, uses in self.uses.items()):
            return False
        assigned = {found[name] for name in self.assigned}
        if any(found[name] in assigned for name in self.later if name.islower() and name in found):
            return False
        called = {name: self.called(found[name]) for name in self.callees}
        if None in called.values():
            return False
        place = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        attributes = tuple((k, v) for k, v in found.items() if isinstance(v, str) and k.isupper())
        callees = tuple((k, v) for k, v in called.items() if v is not None)
        self.sites.append(Site(self.method.name, self.pattern, place, attributes, callees, self.loops > 0))
        return place in self.wanted

    def called(self, node: ast.AST) -> str | None:
        """What a callee is to those outside of the method; None: nothing, or not an attribute of self alone."""
        root, *path = ast.unparse(node).split(".")
        if root == self.owner:
            return f"self.{path[0]}" if len(path) == 1 else None
        return None if root in self.locals else ast.unparse(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if node is not self.method and self.owner in _parameters(node):
            return node  # another self
        loops = isinstance(node, LOOPS) and node is not self.method
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
        found: Found = {"self": self.owner}
        if isinstance(node, ast.expr) and bind(self.before[0].value, node, found) and self.at(node, found):  # type: ignore[attr-defined]
            new = _Substitute(found).visit(copy.deepcopy(self.after[0].value))  # type: ignore[attr-defined]
            return ast.fix_missing_locations(ast.copy_location(new, node))
        return node

    def statements(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        i, n = 0, len(self.before)
        while i < len(statements):
            found: Found = {"self": self.owner}
            window = statements[i : i + n]
            if bind(self.before, window, found) and self.at(window[0], found):
                for new in copy.deepcopy(self.after):
                    new = _Substitute(found).visit(new)
                    yield ast.fix_missing_locations(ast.copy_location(new, window[0]))
                i += n
            else:
                yield statements[i]
                i += 1


def _parameters(node: ast.AST) -> list[str]:
    if not isinstance(node, FUNCTIONS):
        return []
    return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _loads(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]


def _stores(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _locals(method: ast.FunctionDef) -> Iterator[str]:
    """The names that stand for something of the method's own, or of a function inside it, and for no global."""
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif node is not method and not isinstance(node, ast.keyword):  # parameters, functions, caught exceptions
            yield from (getattr(node, field) for field in ("arg", "name", "rest") if hasattr(node, field))
