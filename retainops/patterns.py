"""Patterns of names: which points of a model are asked, and in what form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn

from retainops.buffers import Into
from retainops.names import listed, matches, near
from retainops.part import Part
from retainops.relevance import Relevance
from retainops.stats import Stats
from retainops.wants import Want

Names = str | Sequence[str] | Callable[[str], bool]
Patterns = Names | Mapping[str, Want]
Matcher = tuple[str, Callable[[str], bool], Want]
"""A pattern as it was written, as a test of a name, and what is wanted of the names that pass."""


def matchers_of(who: str, what: Patterns, want: Want) -> list[Matcher]:
    """What was asked, in order. `who` is whom errors name."""
    if isinstance(what, Mapping):
        if want is not None:
            raise ValueError(f"{who}: want is given, and the mapping gives one to each pattern; leave out want")
        pairs = list(what.items())
    elif isinstance(what, (Into, Stats, Part, Relevance)):
        raise TypeError(
            f"{who}: the patterns are {what!r}; expected names, and in what form after them: to ask every point for "
            f'it, {who}(..., "*", {what!r})'
        )
    elif isinstance(what, nn.Module):
        raise TypeError(
            f"{who}: the patterns are a module, {type(what).__name__}; expected names: its points are those that begin "
            "with its own, such as 'layers.0.*'"
        )
    elif callable(what):
        _check_want(who, want)
        return [(getattr(what, "__name__", repr(what)), what, want)]
    elif isinstance(what, Iterable):
        pairs = [(pattern, want) for pattern in ([what] if isinstance(what, str) else what)]
    else:
        raise TypeError(
            f"{who}: the patterns are {what!r}; expected a string, such as 'layers.*', several in a list, a callable "
            "on a name, or a mapping from pattern to what is wanted"
        )
    if not pairs:
        raise ValueError(f'{who}: no pattern given; "*" asks for every point')
    for pattern, each in pairs:
        if not isinstance(pattern, str):
            raise TypeError(f"{who}: a pattern is {type(pattern).__name__}; expected a string, such as 'layers.*'")
        _check_want(who, each)
    return [(pattern, _glob(pattern), each) for pattern, each in pairs]


def _glob(pattern: str) -> Callable[[str], bool]:
    return lambda name: matches(name, pattern)


def _check_want(who: str, want: Want) -> None:
    if want is not None and not isinstance(want, (Into, Stats, Part, Relevance)):
        raise TypeError(
            f"{who}: a want is {type(want).__name__}; expected None for the gradient, Into(buffer) or Stats(...), or "
            "of attention Part(...) or Relevance(...)"
        )


def choose(
    who: str, names: list[str], matchers: list[Matcher], mapping: bool = False, kind: str = "point"
) -> dict[str, Want]:
    """What is wanted of each name that matches, by the last matcher that it passes.

    Args:
        mapping: each matcher was given its own want, so one that decides nothing is a mistake.
        kind: what the names are of, in errors.
    """
    wants: dict[str, Want] = {}
    decides: dict[str, str] = {}
    matched: dict[str, list[str]] = {}
    for pattern, passes, want in matchers:
        chosen = [name for name in names if passes(name)]
        if not chosen:
            raise KeyError(f"{who}: '{pattern}' matches no {kind}; there are: {listed(names)}{_meant(pattern, names)}")
        if isinstance(want, Into) and len(chosen) > 1:
            raise ValueError(
                f"{who}: one Into buffer for {listed(chosen)}; give each name its own: "
                f"{{'{chosen[0]}': Into(...), ...}}"
            )
        wants.update(dict.fromkeys(chosen, want))
        decides.update(dict.fromkeys(chosen, pattern))
        matched[pattern] = chosen
    for pattern in matched if mapping else ():
        if pattern not in decides.values():
            later = list(dict.fromkeys(decides[name] for name in matched[pattern]))
            raise ValueError(
                f"{who}: '{pattern}' decides nothing: {' and '.join(map(repr, later))} after it "
                f"match{'es' if len(later) == 1 else ''} all of its points, and of several the last one counts; put "
                "the general one first"
            )
    return wants


def _meant(pattern: str, names: list[str]) -> str:
    for longer in (f"*.{pattern}", f"{pattern}.*"):
        if any(matches(name, longer) for name in names):
            return f"; a pattern matches the whole name: '{longer}' matches some"
    return near(pattern, names)
