"""In what order gradients came to points."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

MOST_CALLS = 16
"""Of how many backward calls a slot knows when their gradients came: the first, and the last ones."""


@dataclass(slots=True)
class Arrival:
    """When gradients came to a slot since `reset()`.

    Attributes:
        number: of the first; numbers count up over all gradients of all slots.
        compiled: it came out of a compiled graph, which hands over all that it has at once, in any order.
        calls: of backward calls, the numbers of the first and the last that came in each.
    """

    number: int
    compiled: bool
    calls: dict[int, tuple[int, int]] = field(default_factory=dict)


class Arrives(Protocol):
    """A slot."""

    _arrival: Arrival | None


_numbers = itertools.count()


def noted(arrival: Arrival | None, compiled: bool) -> Arrival:
    """What is known of a slot once one more gradient came to it; None: nothing was."""
    number, call = next(_numbers), torch._C._current_graph_task_id()
    if arrival is None:
        arrival = Arrival(number, compiled)
    if call >= 0:  # and not outside of backward
        arrival.calls[call] = arrival.calls.get(call, (number,))[0], number
        if len(arrival.calls) > MOST_CALLS:
            del arrival.calls[list(arrival.calls)[1]]
    return arrival


def last_first(points: Iterable[str]) -> list[str]:
    """Points of one op in the order in which its backward, which makes all at once, is to note that they came."""
    return [*points][::-1]


def in_backward_order(slots: Mapping[str, Arrives]) -> list[str]:
    """The names of the points that a gradient came to, in the order of backward as far as it is known.

    They are in the order in which gradients first came. But backward calls may each have gone through some of the
    points: before a point are those that came before it in any of them, unless that is a circle.
    """
    arrivals = _arrivals(slots)
    before = _right_before(arrivals)
    order: list[str] = []
    done: set[str] = set()
    entered: set[str] = set()
    for name in arrivals:
        path = [name]
        while path:
            here = path[-1]
            entered.add(here)
            if left := [other for other in before[here] if other not in entered]:
                path.append(min(left, key=lambda other: arrivals[other].number))
                continue
            path.pop()
            if here not in done:
                done.add(here)
                order.append(here)
    return _compiled_reversed(order, arrivals, list(slots))


def _right_before(arrivals: Mapping[str, Arrival]) -> dict[str, set[str]]:
    """Of each point those that came right before it, in any backward call; several where a compiled graph gave them."""
    found: dict[str, set[str]] = {name: set() for name in arrivals}
    for call in {call: None for arrival in arrivals.values() for call in arrival.calls}:
        came = [name for name, arrival in arrivals.items() if call in arrival.calls]
        came.sort(key=lambda name: arrivals[name].calls[call][0])
        previous: list[str] = []
        for compiled, group in itertools.groupby(came, key=lambda name: arrivals[name].compiled):
            for those in [list(group)] if compiled else [[name] for name in group]:
                for name in those:
                    found[name].update(previous)
                previous = those
    return found


def _compiled_reversed(order: list[str], arrivals: Mapping[str, Arrival], names: list[str]) -> list[str]:
    """Of points out of compiled graphs in a row, one registered (or asked for) later is earlier in backward."""
    places = {name: i for i, name in enumerate(names)}
    found: list[str] = []
    for compiled, group in itertools.groupby(order, key=lambda name: arrivals[name].compiled):
        run = list(group)
        found += sorted(run, key=places.__getitem__, reverse=True) if compiled else run
    return found


def came_between(slots: Mapping[str, Arrives], name: str) -> list[str]:
    """The points that a gradient came to between two that came to this point in one backward call."""
    arrivals = _arrivals(slots)
    own = arrivals[name].calls
    return [
        other
        for other, arrival in arrivals.items()
        if any(own[call][0] < n < own[call][1] for call, both in arrival.calls.items() if call in own for n in both)
    ]


def _arrivals(slots: Mapping[str, Arrives]) -> dict[str, Arrival]:
    """By name, in the order in which gradients first came."""
    found = [(name, slot._arrival) for name, slot in slots.items() if slot._arrival is not None]
    return dict(sorted(found, key=lambda named: named[1].number))
