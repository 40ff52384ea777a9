"""Names in messages: lists that stay short, and what a name that there is not may have meant."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a path that is a number, as those of layers are."""


def matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern matches a name: "*" crosses dots. A name matches itself, whatever is in it."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def folded(names: Iterable[str]) -> list[str]:
    """Names with those that differ in their numbers alone as one pattern: "layers.*.mlp.act" for every layer's."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(NUMBER.sub("*", name), []).append(name)
    found: list[str] = []
    for pattern, those in alike.items():
        found += [pattern] if len(those) > 1 and pattern.strip("*.") else those
    return found


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names with commas between, those of layers as one, the rest of a long list as a count."""
    names = folded(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f", ... and {more} more" if more > 0 else "")


def near(name: str, names: Iterable[str]) -> str:
    """ "; did you mean 'add_gelu'?" of the names that are most like a wrong one; "" if none is.

    A wrong one of a layer is beside names of that layer: a folded one is no key of what has them.
    """
    numbers = NUMBER.findall(name)
    alike = [other for other in names if numbers and NUMBER.findall(other) == numbers]
    found = difflib.get_close_matches(name, alike or folded(names), n=3)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
