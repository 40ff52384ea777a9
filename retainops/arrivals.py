"""In what order gradients came to points."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch


class Arrival(NamedTuple):
    """When gradients came to a slot since `reset()`.

    Attributes:
        number: of the first; counts up over all slots.
        compiled: it came out of a compiled graph, which hands over all that it has at once, in any order.
        after: the numbers of the slots that one came to right before, in the same backward call.
    """

    number: int
    compiled: bool
    after: set[int]


class Arrives(Protocol):
    """A slot."""

    _arrival: Arrival | None


class _Last(threading.local):  # backward of each device has a thread of its own
    task, number, compiled = -1, -1, False


_numbers = itertools.count()
_last = _Last()


def noted(arrival: Arrival | None, compiled: bool) -> Arrival:
    """What is known of a slot once one more gradient came to it; None: nothing was."""
    if arrival is None:
        arrival = Arrival(next(_numbers), compiled, set())
    task = torch._C._current_graph_task_id()
    if task == _last.task >= 0 and arrival.number != _last.number and not (compiled or _last.compiled):
        arrival.after.add(_last.number)
    _last.task, _last.number, _last.compiled = task, arrival.number, compiled
    return arrival


def last_first(points: Iterable[str]) -> list[str]:
    """Points of one op in the order in which its backward, which makes all at once, is to note that they came."""
    return [*points][::-1]


def in_backward_order(slots: Mapping[str, Arrives]) -> list[str]:
    """The names of the points that a gradient came to, in the order of backward as far as it is known.

    Several backward calls may each have gone through some of the points: before a point are those that came before it
    in any of them. Where that is a circle, it is broken at the first that came.
    """
    left = sorted((arrival.number, name, arrival) for name, arrival in _arrivals(slots))
    numbers, done = {number for number, *_ in left}, set[int]()
    order: list[tuple[str, bool]] = []
    while left:
        place = next((i for i, (*_, arrival) in enumerate(left) if arrival.after & numbers <= done), 0)
        number, name, arrival = left.pop(place)
        done.add(number)
        order.append((name, arrival.compiled))
    return list(_compiled_reversed(order, slots))


def _compiled_reversed(order: list[tuple[str, bool]], slots: Mapping[str, Arrives]) -> Iterator[str]:
    """Of points out of compiled graphs in a row, one registered (or asked for) later is earlier in backward."""
    places = {name: i for i, name in enumerate(slots)}
    for compiled, group in itertools.groupby(order, key=lambda named: named[1]):
        names = [name for name, _ in group]
        yield from sorted(names, key=places.__getitem__, reverse=True) if compiled else names


def on_both_sides(slots: Mapping[str, Arrives], name: str) -> list[str]:
    """The points to which gradients came before as well as after one came to this point, which has several then."""
    found = dict(_arrivals(slots))
    names = {arrival.number: other for other, arrival in found.items()}

    def before(point: str) -> set[str]:
        seen: set[str] = set()
        left = [point]
        while left:
            more = {names[number] for number in found[left.pop()].after if number in names} - seen
            seen |= more
            left += more
        return seen

    return sorted(other for other in before(name) - {name} if name in before(other))


def _arrivals(slots: Mapping[str, Arrives]) -> Iterator[tuple[str, Arrival]]:
    return ((name, slot._arrival) for name, slot in slots.items() if slot._arrival is not None)
