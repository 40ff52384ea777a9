"""The rules of `ro.fuse`: what is recognised, and what takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from retainops.fusing._patterns import Pattern
from retainops.nn.point import HoldsPoints

Part = type[HoldsPoints]
"""A class whose methods a module gets, in front of its own: a `forward`, or what the code of a pattern calls."""


@dataclass(frozen=True)
class Change:
    """Something else that a rule does than to change the class of its module.

    Attributes:
        op: what the table says is there now.
        apply: `apply()` does it. The rule's `undo` undoes it, also on a copy of the module.
    """

    op: str
    apply: Callable[[], None]


class Rule:
    """One rule; `ro.fuse_rule` makes it of a function, and docs/fuse.md has examples.

    Attributes:
        changes: whether its verdicts are `Change`s: others may then still want the module.
        name: that of the function. A rule of the same name takes the place of an earlier one.
        patterns: code of the module's methods; none: the rule is about the module as a whole.
    """

    def __init__(self, decide: Callable[..., Part | Change | str | None], patterns: tuple[Pattern, ...] = ()) -> None:
        self.decide, self.patterns = decide, patterns
        self.name: str = decide.__name__
        self.__doc__ = decide.__doc__
        self.changes = False
        self.undone: Callable[[nn.Module], str | None] = lambda module: None

    def undo(self, function: Callable[[nn.Module], str | None]) -> Callable[[nn.Module], str | None]:
        """Decorator: a function that undoes what a `Change` of this rule did to a module, and says what; else None."""
        self.undone, self.changes = function, True
        return function

    def __repr__(self) -> str:
        return f"Rule({self.name})"


RULES: dict[str, Rule] = {}
"""Of several rules that want a module the last one registered gets it."""


@overload
def fuse_rule(decide: Callable[[Any], Part | Change | str | None], /) -> Rule: ...
@overload
def fuse_rule(*, before: str | Iterable[str], after: str | Iterable[str]) -> Callable[[Callable[..., Any]], Rule]: ...
def fuse_rule(
    decide: Callable[[Any], Part | Change | str | None] | None = None,
    /,
    *,
    before: str | Iterable[str] = (),
    after: str | Iterable[str] = (),
) -> Rule | Callable[[Callable[..., Any]], Rule]:
    """Decorator: register a rule of `ro.fuse`.

    Alone, it is for a function of a module that says what its class is to inherit from: a class of retainops.nn, or
    another that holds points, whose `forward` works with the module's own attributes. It returns None for a module that
    it does not know, and a string for one that it knows and leaves alone: the reason.

    With `before` and `after` it is for code inside the methods of a module: what to look for, and what to put there,
    which calls a method of the class that the function returns. The function is called with the module and, by name,
    the attribute that each `self.NAME` stands for, and what each `NAME(...)` calls.

    Args:
        before: a pattern of Python code, or several. A name in capitals stands for any expression, `self.NAME` for any
            attribute, a name in small letters for any variable, one that starts with "_" for one used nowhere else;
            `NAME(X)` for a call of an attribute of self or of a global function, `*REST` and `**REST` for the arguments
            that are left, and `NAME` as the first statement of a block for the statements that are.
        after: what each becomes.

    Raises:
        TypeError: it decorates something that cannot be called.
        ValueError: there are not as many `after` as `before`.

    Example:
        >>> @ro.fuse_rule
        ... def mish(module):
        ...     return ro.nn.Mish if type(module) is torch.nn.Mish else None
    """
    olds, news = ([texts] if isinstance(texts, str) else list(texts) for texts in (before, after))
    if len(olds) != len(news):
        raise ValueError(f"fuse_rule: before has {len(olds)} patterns and after {len(news)}; expected as many")
    patterns = tuple(Pattern(old, new) for old, new in zip(olds, news, strict=True))

    def register(function: Callable[..., Any]) -> Rule:
        if not callable(function):
            raise TypeError(f"fuse_rule: it decorates a {type(function).__name__}; expected a function of a module")
        rule = Rule(function, patterns)
        RULES.pop(rule.name, None)
        RULES[rule.name] = rule
        return rule

    return register if decide is None else register(decide)
