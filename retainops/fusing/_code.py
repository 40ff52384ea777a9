"""The methods of classes: where they hold a pattern, and the same methods with something else in its place."""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from retainops.fusing._patterns import Pattern, Rewriter, Site, needed, there

Methods = tuple[tuple[str, Any], ...]
"""The names and functions of a class."""


def sites_of(cls: type, pattern: Pattern, done: tuple[Site, ...] = ()) -> tuple[Site, ...]:
    """Where the methods of a class hold a pattern, once other sites are done; none where there is no source to read."""
    return sites_in(methods(cls), pattern, done)


@functools.cache
def sites_in(functions: Methods, pattern: Pattern, done: tuple[Site, ...] = (), owner: int = 0) -> tuple[Site, ...]:
    """Where some functions hold a pattern; `owner` is the number of the parameter that is the module."""
    found: list[Site] = []
    for name, function in functions:
        tree, marks = _read(name, function, tuple(site for site in done if site.method == name), owner)
        if tree is not None and needed(pattern) <= marks:
            rewriter = Rewriter(tree, pattern, frozenset(), owner)
            rewriter.visit(tree)  # which changes nothing: none is wanted
            found += rewriter.sites
    return tuple(found)


EXPERTS_GATE = "_apply_gate"
"""By this name transformers gives a function to its classes of experts, and calls it once for all of them."""


@functools.lru_cache(maxsize=64)
def _read(
    name: str, function: Any, done: tuple[Site, ...], owner: int
) -> tuple[ast.FunctionDef | None, frozenset[Any]]:
    """A method's tree once sites are done, for reading only, since it is shared, and what is there. None: it has no
    source, or the class has it by another name, and so may others, which call it in a loop."""
    tree = parsed(function)
    file = function.__module__ or ""  # a function made by exec may be of no module
    given = (EXPERTS_GATE,) if file.startswith("transformers.") else ()
    if tree is None or name not in (tree.name, "forward", *given):
        return None, frozenset()
    tree.name = name
    _rewrite(tree, list(done), owner)
    return tree, there(tree)


def rewritten(functions: Methods, sites: tuple[Site, ...], owner: int = 0) -> dict[str, FunctionType]:
    """The methods of a class, as `methods` gives them, with what their patterns say at these sites.

    They are made from the source, in the globals of their own module: as those change, so do they.

    Raises:
        LookupError: the class holds no such pattern there, or a decorator cannot be applied again.
    """
    made = {}
    for name in dict.fromkeys(site.method for site in sites):
        function = dict(functions).get(name)
        tree = parsed(function) if function else None
        if tree is None:
            raise LookupError(f"its method {name} has no source that can be read")
        tree.name = name
        _rewrite(tree, [site for site in sites if site.method == name], owner)
        made[name] = _compiled(tree, function)
    return made


def _rewrite(tree: ast.FunctionDef, sites: list[Site], owner: int) -> None:
    for pattern in dict.fromkeys(site.pattern for site in sites):
        wanted = frozenset(site.place for site in sites if site.pattern == pattern)
        rewriter = Rewriter(tree, pattern, wanted, owner)
        rewriter.visit(tree)
        if wanted - {site.place for site in rewriter.sites}:
            raise LookupError(f"{tree.name} is another one than when it was fused: the model's code has changed")


def methods(cls: type) -> Methods:
    """The functions of the class that defines forward, as they are now, but for those that a subclass overrides, and
    for `__init__`, which has been called.
    """
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if owner is nn.Module:
        return ()
    there = ((k, v) for k, v in vars(owner).items() if isinstance(v, FunctionType) and k != "__init__")
    return tuple((name, value) for name, value in there if getattr(cls, name) is value)


def parsed(function: Any) -> ast.FunctionDef | None:
    """The tree of a function; None: its source cannot be read, or is not that of its code."""
    inner = inspect.unwrap(function)
    if not isinstance(inner, FunctionType):
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
    if (closed := closes_over(inner)) is not None:
        raise LookupError(f"its method {tree.name} {closed}")
    # In a class of that name: decorators may ask whether it is a method. Annotations are text where the file says so.
    owner = inner.__qualname__.split(".")[-2:-1]
    body: list[ast.stmt] = [tree]
    if owner and owner[0].isidentifier():
        body = ast.parse(f"class {owner[0]}: pass").body
        body[0].body = [tree]  # type: ignore[attr-defined]
    code = compile(
        ast.fix_missing_locations(ast.Module(body, [])),
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
    if body[0] is not tree:
        made = dict(vars(made[owner[0]]))
    new, own = made[tree.name], inspect.unwrap(made[tree.name])
    # Its defaults are the very objects that the original's are.
    own.__defaults__, own.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    own.__name__, own.__qualname__ = inner.__name__, inner.__qualname__
    new.__name__, new.__qualname__ = function.__name__, function.__qualname__
    return new


def unread(cls: type) -> str | None:
    """Why nothing can be put into the forward of a class; None: something can."""
    function = dict(methods(cls)).get("forward")
    if function is None:
        return None
    if parsed(function) is None:
        return "the source of its forward cannot be read, or is not that of its code"
    closed = closes_over(function)
    return None if closed is None or closed == SUPER else f"its forward {closed}"


SUPER = "calls super()"  # many do, and it hides nothing


def keeps(function: Any, number: int) -> bool:
    """Whether a function has a parameter of that number, and it is never another object."""
    tree = parsed(function)
    if tree is None:
        return False
    names = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)]
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    return number < len(names) and names[number] not in bound


def closes_over(function: Any) -> str | None:
    """What a function has of a class or a function around it, which one made again would lack; None: nothing."""
    names = inspect.unwrap(function).__code__.co_freevars
    if names == ("__class__",):
        return SUPER
    return f"uses {names[0]} of the function that it was made in" if names else None


def called(module: nn.Module, function: Any, name: str) -> Any:
    """What a method of a module calls by a name, as `Site.called` has it; None: nothing that stays the same.

    To look must have no effect: no property is computed, no package loaded that a module loads when asked.
    """
    root, *path = name.split(".")
    if root == "self":
        of_class = inspect.getattr_static(type(module), path[0], None)
        if hasattr(type(of_class), "__get__") and not isinstance(of_class, (FunctionType, staticmethod)):
            return None
        return getattr(module, path[0], None) if of_class is not None else _held(module, path[0])
    value = inspect.unwrap(function).__globals__.get(root)
    for attribute in path:
        value = vars(value).get(attribute) if isinstance(value, ModuleType) else None
    return None if isinstance(value, nn.Module) else value


def _held(module: nn.Module, name: str) -> Any:
    """An attribute that a module has itself."""
    places = (vars(module), module._modules, module._parameters, module._buffers)
    return next((place[name] for place in places if name in place), None)


def wrapping(original: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """A function under another one's name.

    It has code of its own, which torch.compile counts recompilations by, and none of the other's attributes: by some of
    them Dynamo knows a function that it is to skip.
    """
    own = FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__, argdefs=function.__defaults__
    )
    return functools.wraps(original, updated=())(own)


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
