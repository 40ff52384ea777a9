"""`ro.fuse` and `ro.unfuse`: from the rules' verdicts on each module to a changed model, and back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from retainops.fusing import rules as _rules  # noqa: F401 - registers them, and before those of code
from retainops.fusing._classes import (
    Fused,
    add_output,
    become,
    clash,
    fused_class,
    has_forward,
    has_output,
    is_fused,
    remove_output,
    restore,
    twice,
    why_not,
)
from retainops.fusing._code import called, methods, sites_of, unread
from retainops.fusing._patterns import Site
from retainops.fusing.code_rules import may_concern
from retainops.fusing.outputs import Output, without
from retainops.fusing.parts import FUNCTION
from retainops.fusing.registry import RULES, Change, Part, Rule
from retainops.fusing.table import Row, Table
from retainops.models import modules_of
from retainops.names import listed
from retainops.nn.guests import requests_of
from retainops.nn.point import HoldsPoints
from retainops.patterns import Names, choose, matchers_of


def fuse(model: nn.Module, *, rules: Sequence[Rule | str] | None = None, outputs: Names = ()) -> Table:
    """Replace what a model computes by the ops of retainops, where a rule knows it: in place, and reversibly.

    The modules stay the objects that they are, with their parameters, names and hooks; their classes become subclasses
    of their classes. State dicts are the same before and after. `ro.retain(model, ...)` then reaches the interiors,
    which `ro.points(model)` lists, and `ro.unfuse(model)` gives every module its own class back.

    What is not known for certain is left as it is. A model that is fused already is not changed, but for `outputs` that
    it had none of.

    Args:
        model: any module: of torch.nn, transformers, timm, diffusers, or your own; compiled or not.
        rules: which rules, by name or as `ro.fuse_rule` gives them; None: every one that is registered.
        outputs: of which modules what they return is to be a point, named by the module's path and `out`: a pattern of
            paths as `ro.retain` takes it ("model.layers.*" is each layer and all that is in it), several, or a callable
            on the path. With `rules=[]` nothing else is done.

    Returns:
        A table of `Row`s, one for each place: what is there now, or why it was left.

    Raises:
        TypeError: `model` is not a module, or `outputs` no pattern, patterns or callable.
        KeyError: there is no rule of a name, or no module of a pattern in `outputs`; the message lists them.
        RuntimeError: its points are asked for, in a `with ro.retain(model, ...)` or in a step of `ro.watch`.

    Example:
        >>> print(ro.fuse(model))
        >>> with ro.retain(model, "model.layers.*.mlp.act", ro.Stats("l2")) as kept:
        ...     model(input_ids, labels=labels).loss.backward()
    """
    model = _checked("fuse", model)
    _not_asked("fuse", model)
    return _Fusing(_chosen(rules)).run(model, _matching(model, outputs))


def unfuse(model: nn.Module) -> Table:
    """Undo `ro.fuse`: every module is what it was. It works on copies of a fused model, too.

    Args:
        model: a fused model, or one of its modules.

    Returns:
        A table of what was restored, and of what could not be.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: its points are asked for, in a `with ro.retain(model, ...)` or in a step of `ro.watch`.

    Example:
        >>> ro.fuse(model)
        >>> ro.unfuse(model)
    """
    model = _checked("unfuse", model)
    _not_asked("unfuse", model)
    rows = []
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        vars(module).pop(FUNCTION, None)
        if is_fused(module) and "forward" in vars(module):  # which may hold the fused one
            rows.append(Row(name, kind, None, "a forward was set on the module itself since; undo that first"))
        elif is_fused(module):
            restore(module)
            rows.append(Row(name, kind, "restored"))
        elif isinstance(module, Fused):
            rows.append(Row(name, kind, None, "something made another class of its class since; undo that first"))
        for rule in RULES.values():
            if (op := rule.undone(module)) is not None:
                rows.append(Row(name, kind, f"restored, from {op}"))
    return Table(type(model).__name__, "unfused", rows, "nothing in it was fused")


def _checked(function: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}; expected a torch.nn.Module")
    return getattr(model, "_orig_mod", model)  # what torch.compile wrapped


def _not_asked(function: str, model: nn.Module) -> None:
    if any(requests_of(m) or (isinstance(m, HoldsPoints) and m._requests) for m in model.modules()):
        raise RuntimeError(
            f"{function}: ro.retain(model, ...) or ro.watch(model, ...) holds requests in its modules; {function} it "
            "after that `with`, or after watcher.close()"
        )


def _chosen(rules: Sequence[Rule | str] | None) -> list[Rule]:
    if rules is None:
        return list(reversed(RULES.values()))
    for rule in rules:
        if not isinstance(rule, Rule) and rule not in RULES:
            raise KeyError(f"fuse: no rule is called {rule!r}; there are: {listed(RULES)}")
    return [rule if isinstance(rule, Rule) else RULES[rule] for rule in rules]


def _matching(model: nn.Module, outputs: Names) -> list[nn.Module]:
    """The modules in a model whose paths match."""
    if not callable(outputs) and (isinstance(outputs, Mapping) or not isinstance(outputs, Iterable)):
        raise TypeError(
            f"fuse: outputs is {type(outputs).__name__}; expected a pattern of modules' paths, such as 'layers.*', "
            "several, or a function of a path"
        )
    if not callable(outputs) and not outputs:
        return []
    there = {path: module for path, module in modules_of(model) if path}
    return [there[path] for path in choose("fuse", list(there), matchers_of("fuse", outputs, None), kind="module")]


class _Fusing:
    """One call of `fuse`: what it did so far."""

    def __init__(self, rules: list[Rule]) -> None:
        self.of_modules = [rule for rule in rules if not rule.patterns]
        self.of_code = [(rule, pattern) for rule in rules for pattern in rule.patterns]
        self.parameters = {rule: inspect.signature(rule.decide).parameters for rule, _ in self.of_code}
        self.rows: list[Row] = []
        self.undo: list[Callable[[], Any]] = []
        self.adopt: list[Callable[[], Any]] = []

    def run(self, model: nn.Module, outputs: Sequence[nn.Module] = ()) -> Table:
        places = {module: name for name, module in model.named_modules()}
        had = [module for module in places if has_output(module)]
        try:
            for module in had:  # the rules look at what it is besides
                self.step(remove_output, add_output, module)
            given = {module: self.by_kind(name, module) for module, name in places.items()}
            for module, parts in given.items():  # once the norms are fused, of which a rule of code asks
                if parts is not None:
                    self.by_code(places[module], module, parts)
            for module in had:
                self.step(add_output, remove_output, module)
            for module in outputs:
                self.output(places[module], module)
            for step in self.adopt:
                step()
        except BaseException:  # wholly, or not at all
            for step in reversed(self.undo):
                step()
            raise
        order = {name: i for i, name in enumerate(places.values())}
        rows = sorted(self.rows, key=lambda row: order[row.name])
        return Table(type(model).__name__, "fused", rows, "no rule knows what it computes")

    def by_kind(self, name: str, module: Any) -> tuple[Part, ...] | None:
        """Ask the rules for modules as a whole: what its class is to inherit besides what code calls; None: done."""
        kind = type(module).__name__
        if isinstance(module, HoldsPoints):
            if isinstance(module, Fused):
                self.rows.append(Row(name, kind, None, "already fused"))
            return None
        for rule in self.of_modules:
            verdict: Any = rule.decide(module)
            if verdict is None:
                continue
            if isinstance(verdict, Change):
                verdict.apply()
                self.undo.append(functools.partial(rule.undone, module))
                self.rows.append(Row(name, kind, verdict.op))
                continue  # its class may be another rule's
            reason = verdict if isinstance(verdict, str) else _why_not(module, (verdict,), ())
            if reason is not None:
                self.rows.append(Row(name, kind, None, reason))
                if rule.changes:
                    continue
                return ()
            self.rows.append(Row(name, kind, verdict.op.name))
            if not has_forward(verdict):
                return (verdict,)
            self.become(module, (verdict,), ())
            return None
        return ()

    def step(self, do: Callable[..., None], undo: Callable[..., None], module: nn.Module, *arguments: Any) -> None:
        do(module, *arguments)
        self.undo.append(functools.partial(undo, module))

    def become(self, module: Any, parts: tuple[Part, ...], sites: tuple[Site, ...]) -> None:
        self.step(become, restore, module, parts, sites)

    def output(self, name: str, module: nn.Module) -> None:
        """Make a module's output a point, unless it cannot be one."""
        if has_output(module):
            reason: str | None = "its output is a point already"
        elif isinstance(module, Fused) and not is_fused(module):
            reason = "something made another class of its class since"
        elif isinstance(module, HoldsPoints):
            reason = without(module) or why_not(module)
        else:
            reason = without(module) or _why_not(module, (Output,), ())
        if reason is None:
            self.step(add_output, remove_output, module)
        self.rows.append(Row(name, type(module).__name__, "output" if reason is None else None, reason or ""))

    def by_code(self, name: str, module: Any, parts: tuple[Part, ...]) -> None:
        """Ask the rules for code about each place in its methods."""
        cls: Any = type(module)
        kind = cls.__name__
        functions = dict(methods(cls))
        sites: tuple[Site, ...] = ()
        found: dict[Row, None] = {}  # code may say the same in two branches
        for rule, pattern in self.of_code:
            for site in sites_of(cls, pattern, sites):
                texts = dict((*site.attributes, *site.called))
                names = [name for name in self.parameters[rule] if name in texts]
                given = dict(site.attributes)
                given |= {k: called(module, functions[site.method], v) for k, v in site.called if k in names}
                given = {name: given[name] for name in names}
                verdict: Any = rule.decide(module, **given)
                if verdict is None:
                    continue
                shown = [texts[name].removeprefix("self.") for name in names]
                label = f"{rule.name}({', '.join(shown)})" if names else rule.name
                more = (*dict.fromkeys((*parts, verdict)),)
                if isinstance(verdict, str):
                    reason: str | None = verdict
                elif site.looped:
                    reason = "it is in a loop, and its points would be of several calls"
                elif any(_alike(part, verdict) for part in parts) and not getattr(verdict, "many", False):
                    reason = "a second of its kind, whose points would have the same names"
                else:
                    reason = _why_not(module, more, (*sites, site))
                if reason is not None:
                    found[Row(name, kind, None, f"{label}: {reason}")] = None
                    continue
                found[Row(name, kind, label)] = None
                parts, sites = more, (*sites, site)
                if hasattr(verdict, "adopt"):
                    self.adopt.append(functools.partial(verdict.adopt, module, **given))
        if self.of_code and not found and (reason := unread(cls)) is not None and may_concern(module):
            found[Row(name, kind, None, reason)] = None
        self.rows += found
        if parts:
            self.become(module, parts, sites)


def _alike(one: Part, other: Part) -> bool:
    return issubclass(one, other) or issubclass(other, one)


def _why_not(module: Any, parts: Any, sites: tuple[Site, ...]) -> str | None:
    """Why a module cannot be given these; None: it can."""
    cls: Any = type(module)
    reason = why_not(module)
    if reason is None and (name := clash(module, parts)) is not None:
        reason = f"it has a '{name}' of its own, and so has what it would be given"
    if reason is None:
        try:
            reason = twice(module, fused_class(cls, parts, sites))
        except (LookupError, TypeError) as error:
            reason = str(error)
    return reason
