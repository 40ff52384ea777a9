"""A part of a point's gradient: of chosen heads, queries and keys alone."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

Choice = int | slice | Sequence[int] | None
Places = tuple[tuple[int, tuple[int, ...]], ...]
"""Dims, counted from the end, and which places of them."""
AXES = ("heads", "queries", "keys")


class Part:
    """Ask attention for the gradient of chosen heads, queries and keys: memory, and mostly time, of those alone.

    Args:
        heads, queries, keys: which; an int, a slice, a sequence of ints, or None for all. Negative ints count from the
            end; of `[]` the gradient has no elements. All dims stay, also those of an int: `slot.grad` is (..., heads,
            queries, keys) of what was chosen, in the order in which it was.

    Raises:
        TypeError: a choice of another type.
        ValueError: heads, queries and keys are all None. Later, by the op: of a point without such dims.
        IndexError: later, by the op: a choice that is out of range.

    Example:
        >>> kept = ro.Retained(p=ro.Part(heads=[0, 3], queries=-1))  # what the last token looks at
        >>> ro.attention(q, k, v, is_causal=True, retain=kept).sum().backward()
        >>> kept.p.grad.shape
        torch.Size([batch, 2, 1, keys])
    """

    __slots__ = ("chosen",)

    def __init__(self, heads: Choice = None, queries: Choice = None, keys: Choice = None) -> None:
        given = dict(zip(AXES, (heads, queries, keys), strict=True))
        self.chosen = {axis: _checked(axis, choice) for axis, choice in given.items() if choice is not None}
        if not self.chosen:
            raise ValueError('Part: nothing chosen; choose heads, queries or keys, or ask for all: Retained("p")')

    def resolve(self, op: str, point: str, shape: torch.Size) -> Places:
        """The chosen places in the last three dims of a point of this shape; all of a dim that is not named.

        Raises:
            ValueError: the point has not as many dims.
            IndexError: a place that it does not have.
        """
        found: list[tuple[int, tuple[int, ...]]] = []
        for dim, axis in zip((-3, -2, -1), AXES, strict=True):
            if axis not in self.chosen:
                continue
            if len(shape) < -dim:
                raise ValueError(
                    f"{op}: Part({axis}=...) of point '{point}', which has shape {tuple(shape)}; expected "
                    "(..., heads, queries, keys)"
                )
            choice, size = self.chosen[axis], shape[dim]
            if isinstance(choice, slice):
                found.append((dim, tuple(_places(choice, size))))
                continue
            outside = [i for i in choice if not -size <= i < size]
            if outside:
                raise IndexError(
                    f"{op}: Part({axis}={list(choice)}) of point '{point}', whose shape is {tuple(shape)}: "
                    f"{', '.join(map(str, outside))} out of range of its {size} {axis}; expected {-size} to {size - 1}"
                )
            found.append((dim, tuple(i % size for i in choice)))
        return tuple(found)

    def shape(self, op: str, point: str, shape: torch.Size) -> torch.Size:
        """The shape of what is chosen."""
        sizes = list(shape)
        for dim, places in self.resolve(op, point, shape):
            sizes[dim] = len(places)
        return torch.Size(sizes)

    def of(self, op: str, point: str, x: torch.Tensor) -> torch.Tensor:
        """What is chosen of a tensor: a new one."""
        return picked(x, self.resolve(op, point, x.shape))

    def check(self, op: str, point: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Raise if a point like this has no such part."""
        self.resolve(op, point, shape)

    def __repr__(self) -> str:
        return f"Part({', '.join(f'{axis}={_shown(choice)}' for axis, choice in self.chosen.items())})"


def _places(choice: slice, size: int) -> range:
    start, stop = choice.start or 0, choice.stop
    if stop is not None and 0 <= start <= stop <= size and choice.step in (None, 1):
        return range(start, stop)  # whatever the size: in a graph with dynamic shapes it stays unknown
    return range(size)[choice]


def picked(x: torch.Tensor, places: Places) -> torch.Tensor:
    """These places of a tensor: a new one. No list of places goes to the device, so nothing waits for it."""
    for dim, at in places:
        runs = [x.narrow(dim, start, stop - start) for start, stop in _runs(at)]
        x = torch.cat(runs or [x.narrow(dim, 0, 0)], dim)
    return x if places else x.clone()


def _runs(at: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive places, as start and stop."""
    found: list[tuple[int, int]] = []
    for i in at:
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return found


def _checked(axis: str, choice: Choice) -> slice | tuple[int, ...]:
    if isinstance(choice, slice):
        return choice
    try:
        # Sets and floats are no choice; ints of NumPy are.
        places = [choice] if not isinstance(choice, Sequence) or isinstance(choice, str) else choice
        if any(isinstance(i, bool) for i in places):
            raise TypeError
        return tuple(operator.index(i) for i in places)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"Part: {axis} is {choice!r}; expected an int, a slice, or a sequence of ints such as [0, 3]"
        ) from None


def _shown(choice: slice | tuple[int, ...]) -> str:
    if not isinstance(choice, slice):
        return str(list(choice)) if len(choice) != 1 else str(choice[0])
    ends = ["" if i is None else str(i) for i in (choice.start, choice.stop)]
    return ":".join(ends if choice.step is None else [*ends, str(choice.step)])
