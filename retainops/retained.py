"""A request: which points, and in what form; afterwards the holder of the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import TYPE_CHECKING

import torch

from retainops.arrivals import in_backward_order
from retainops.buffers import Into, check_apart
from retainops.names import listed, matches, near
from retainops.part import Part
from retainops.ranks import all_reduce
from retainops.relevance import Relevance
from retainops.slots import Slot
from retainops.stats import Stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Retained(Mapping[str, Slot]):
    """A request for the gradients of an op's points, and afterwards their holder: a mapping from name to `Slot`.

    Args:
        *names: points whose full gradient is wanted.
        **wants: points whose gradient is wanted in another form: `c=ro.Into(buffer)`, `c=ro.Stats("l2")`; of attention
            also `p=ro.Part(heads=0)`, `p=ro.Relevance("chefer")`.

    Raises:
        TypeError: a name is not a string, a want is none of these, or nothing is asked for.
        ValueError: a name is given twice, or two `Into` buffers share memory.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad is kept["c"].grad
        True
    """

    with_grad = without_grad = False
    """Whether a module that holds it was called, in eager, where grad mode is on, and where it is off."""

    def __init__(self, *names: str, **wants: Into | Stats | Part | Relevance) -> None:
        if not names and not wants:
            raise TypeError('Retained: no point named; name at least one, as in Retained("c")')
        self._slots: dict[str, Slot] = {}
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"Retained: a point's name is {type(name).__name__}; expected a string")
            if name in self._slots or name in wants:
                raise ValueError(f"Retained: point '{name}' is named twice; name it once")
            self._slots[name] = Slot(name)
        for name, want in wants.items():
            if not isinstance(want, (Into, Stats, Part, Relevance)):
                raise TypeError(
                    f"Retained: {name}= is {type(want).__name__}; expected Into(buffer) or Stats(...), or of attention "
                    "Part(...) or Relevance(...)"
                )
            self._slots[name] = Slot(name, want)
        check_apart("Retained", wants, {name: name for name in wants})  # of one op they may not even add: it checks

    @classmethod
    def of(cls, slots: Mapping[str, Slot]) -> Retained:
        """A request that is answered in slots of another one, perhaps by other names."""
        new = cls.__new__(cls)
        new._slots = dict(slots)
        return new

    def __getitem__(self, name: str) -> Slot:
        try:
            return self._slots[name]
        except KeyError:
            raise KeyError(
                f"no point '{name}' was retained; there are: {listed(self._slots)}{near(str(name), self._slots)}"
            ) from None

    def __getattr__(self, name: str) -> Slot:
        if not name.startswith("_") and name in self._slots:
            return self._slots[name]
        slots = {} if name.startswith("_") else self.__dict__.get("_slots", {})  # not while a copy is being made
        dotted = next((each for each in slots if each.startswith(f"{name}.")), None)
        meant = near(name, slots) if dotted is None else f"; a name with dots goes in brackets: kept['{dotted}']"
        raise AttributeError(f"Retained has no attribute or point '{name}'; retained points: {listed(slots)}{meant}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def get(self, name: str, default: Slot | None = None) -> Slot | None:  # type: ignore[override]
        return self._slots.get(name, default)  # every point asks; that of `Mapping` searches for what else was meant

    def values(self) -> ValuesView[Slot]:
        return self._slots.values()  # a view of `Mapping` looks up each one by its name: every call iterates over them

    # A request is an object with a state of its own: two equal-looking ones are two.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def reset(self) -> None:
        """Forget every slot's gradient; the next use may have other shapes."""
        for slot in self._slots.values():
            slot.reset()

    def to_dict(self) -> dict[str, dict[str, torch.Tensor | None]]:
        """Name of a point -> {"grad": its gradient, and each statistic asked for}; None for what is not there."""
        return {name: slot._readings() for name, slot in self._slots.items()}

    def all_reduce(self, group: ProcessGroup | None = None, patterns: str | Sequence[str] = "*") -> None:
        """Put the statistics of all ranks together, each by its rule: sums and counts add up, amax is the largest.

        Afterwards every rank has the same ones, of all gradient values of all ranks. A point that no gradient came to
        on this rank, but on another, has them too. Full gradients stay as they are. Call it on every rank of the group,
        after the last backward and before anything is read; it waits for the GPU.

        Of a gradient that is a DTensor each shard counts once, however many ranks of the group hold it.

        Under DistributedDataParallel and `fully_shard` an interior's gradient is that of the rank's own loss. To
        compare with one process, whose loss is the mean over all ranks' batches, divide l2, sum, abs_sum, amax, mean
        and act_grad by the number of ranks (docs/distributed.md).

        Args:
            group: the process group; None: the default one.
            patterns: glob patterns of the names to reduce.

        Raises:
            RuntimeError: there is no process group, the ranks ask for different statistics, or these were reduced over
                this group, or several of its ranks, already.
            ValueError: there are no statistics, or some over rows, which are each rank's own; or the group has several
                ranks of a dim of a DTensor's mesh, but not all of them.

        Example:
            >>> with ro.retain(ddp_model, "layers.*", ro.Stats("l2", "amax")) as kept:
            ...     ddp_model(x).mean().backward()
            >>> kept.all_reduce()
        """
        names = [patterns] if isinstance(patterns, str) else patterns
        chosen = {name: slot for name, slot in self._slots.items() if any(matches(name, p) for p in names)}
        all_reduce(chosen, group, "" if chosen else f", and {listed(names)} matches none of {listed(self._slots)}")

    def state(self) -> dict[str, torch.Tensor]:
        """What is there, flat and detached: {"layers.0.act.grad": ..., "layers.0.act.l2": ...}, for `torch.save`."""
        found = ((f"{name}.{what}", t) for name, of in self.to_dict().items() for what, t in of.items())
        return {name: t.detach() for name, t in found if t is not None}

    def first_nonfinite(self) -> str | None:
        """The name of the first point, in the order of backward, whose gradient has an inf or a nan; None: all finite.

        It reads values, so it waits for the GPU. The order is that in which gradients came since `reset()`, in all
        backward calls together. Where one came to a point several times in a backward call, as it does where a module
        is called several times, the first time counts. A compiled graph hands over all that it has at once: among
        points that come from compiled graphs in a row, one that was registered (or asked for) later counts as earlier
        in backward.

        Raises:
            ValueError: of some point neither the gradient nor the statistic "nonfinite" was asked for.
            RuntimeError: no gradient has come yet.

        Example:
            >>> with ro.retain(model, "*", ro.Stats("nonfinite")) as kept:
            ...     model(x).sum().backward()
            >>> kept.first_nonfinite()
            'layers.7.act'
        """
        silent = [name for name, slot in self._slots.items() if not slot._tells_nonfinite()]
        if silent:
            raise ValueError(
                f'first_nonfinite: nothing tells of {listed(silent)}; ask for the gradient, or for Stats("nonfinite")'
            )
        arrived = in_backward_order(self._slots)
        if not arrived:
            raise RuntimeError("first_nonfinite: no gradient has come to any point; call backward() first")
        return next((name for name in arrived if self._slots[name]._is_finite() is False), None)

    def __repr__(self) -> str:
        rows = [slot._row() for slot in self._slots.values()]
        return "\n".join(["Retained", *aligned(rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as indented lines with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return ["  " + line.rstrip() for line in lines]
