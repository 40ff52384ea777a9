"""Watching a training run: statistics of interior gradients every n steps, and nothing in the steps between."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from retainops.arrivals import in_backward_order
from retainops.models import Asked
from retainops.nonfinite import NonFiniteGradient, first_nonfinite
from retainops.patterns import Patterns
from retainops.readings import Readings, read
from retainops.retained import Retained
from retainops.stats import Stats
from retainops.wants import Want

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Sink = Callable[[int, Readings], object]
"""Takes the number of a step and what was read in it."""

EACH = Stats("l2", "nonfinite")
"""What is taken of each point where nothing is said."""

ON_NONFINITE = ("raise", "warn", "ignore")


class Watcher:
    """What `watch` gives: it knows which step is running, and asks the model in every n-th one.

    Attributes:
        number: the number of the step that is running, or comes next.
        latest: (number, readings) of the last step that was read; None before.
        kept: the slots, by the names of the points; they are filled while the sinks are called, and empty after.
        every: as of `watch`; may be changed between steps.
    """

    def __init__(self, asked: Asked, every: int, sinks: tuple[Sink, ...], on_nonfinite: str, group: Any, start: int):
        self.kept: Retained = asked.kept
        self.number, self.every = start, every
        self.latest: tuple[int, Readings] | None = None
        self._asked, self._sinks, self._on_nonfinite, self._group = asked, sinks, on_nonfinite, group
        self._begun = self._asking = self._closed = self._counted = False
        self._handles: list[Any] = []
        self._pauses = 0
        self.begin()

    @property
    def asking(self) -> bool:
        """Whether the model is asked in the step that is running."""
        return self._asking

    def step(self) -> None:
        """A step is over: read what came if the model was asked, count, and ask it in the next one if it is its turn.

        The same as `end()` and then `begin()`.

        Raises:
            NonFiniteGradient: a gradient has an inf or a nan. The sinks were called before. The model is asked nothing
                until the next `begin()`, or `step()`.
        """
        self._over()
        self.begin()

    def begin(self) -> None:
        """Ask the model if it is this step's turn. Begun already: nothing happens."""
        self._begun = True
        if not self._asking and not self._closed and not self._pauses and self.number % self.every == 0:
            for slot in self.kept.values():
                slot.renew()  # a backward of an earlier step's graph is not this step's
            self._asked.on()
            self._asking = True

    def end(self) -> None:
        """Cease to ask, read what came if the model was asked, and count the step.

        It is for who calls it and `begin()` in the place of `step()`, which has begun the next step already: what runs
        between the two is in no step. Ended already: nothing happens.

        Raises:
            NonFiniteGradient: as of `step`.
        """
        if self._begun:
            self._over()

    def _over(self) -> None:
        asking, number = self._asking, self.number
        self.number += 1
        self._counted, self._begun = True, False
        if asking:
            self._cease()
            try:
                self._read(number)
            finally:
                self.kept.reset()  # gradients kept whole are memory

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ask nothing of the model in a `with`, and go on with the step after it: for an evaluation with gradients.

        Example:
            >>> with watcher.paused():
            ...     attack(model, x).backward()
        """
        number, asking = self.number, self._asking
        self._cease()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if asking and self.number == number and not self._closed and not self._pauses:
                self._asked.on()
                self._asking = True
            elif self._begun:  # in the pause
                self.begin()

    def discard(self) -> None:
        """Forget what came in this step so far, which is to be run again: after an error that was caught, say."""
        self.kept.reset()

    def attach(self, optimizer: torch.optim.Optimizer) -> Watcher:
        """End a step at each `optimizer.step()`, right before the weights change, and begin the next one right after.

        So a gradient that is not finite stops the run with the weights as they were. Where `step` is given a closure
        (LBFGS), which runs backward itself, the step ends after it. A `GradScaler` leaves `optimizer.step()` out when
        it finds an inf: call `watcher.step()` yourself there. Of what accelerate prepared, it is the optimizer inside.

        Returns:
            The watcher itself.

        Raises:
            TypeError: `optimizer` is not one.
            RuntimeError: the watcher is closed.
        """
        self._check_open()
        inner = optimizer
        while not hasattr(inner, "_optimizer_step_pre_hooks"):  # accelerate's has the class, and no hooks
            if not hasattr(inner, "optimizer"):
                raise TypeError(f"watch: attach to a {type(optimizer).__name__}; expected a torch.optim.Optimizer")
            inner = inner.optimizer

        def before(_optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not _has_closure(args, kwargs):
                self._over()

        def after(_optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _has_closure(args, kwargs):
                self._over()
            self.begin()

        for register, hook in ((inner.register_step_pre_hook, before), (inner.register_step_post_hook, after)):
            self._handles.append(register(torch.compiler.disable(hook)))  # in a compiled step it would be traced
        return self

    def close(self) -> None:
        """Leave the model and the optimizers alone. What came in a step that is not over is dropped."""
        self._closed = True
        self._cease()
        self.kept.reset()
        for handle in self._handles:
            handle.remove()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("watch: this watcher is closed, and a `with` closes it at its end; call ro.watch anew")

    def __enter__(self) -> Watcher:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._counted and in_backward_order(self.kept):
            warnings.warn(
                "watch: gradients came, and no step was ever counted, so nothing was read; call step() on the watcher "
                "after each backward(), or attach(optimizer)",
                RuntimeWarning,
                stacklevel=2,
            )
        self.close()

    def _cease(self) -> None:
        self._asked.off()
        self._asking = False

    def _read(self, number: int) -> None:
        if self._group is not None:
            self.kept.all_reduce(self._group)
        readings = read(self.kept)
        if not readings:
            warnings.warn(
                f"watch: no gradient came to any point in step {number}; is another model or a copy being trained, was "
                "step() called before backward(), or does the loss not depend on what is watched?",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        self.latest = number, readings
        if self._group is None or torch.distributed.get_rank(self._group) == 0:
            for sink in self._sinks:
                sink(number, readings)
        if self._on_nonfinite != "ignore" and (found := first_nonfinite(self.kept, readings)):
            point, message = found
            if self._on_nonfinite == "raise":
                raise NonFiniteGradient(f"watch: step {number}: {message}", point, number, readings)
            warnings.warn(f"watch: step {number}: {message}", RuntimeWarning, stacklevel=4)


def watch(
    model: nn.Module,
    patterns: Patterns = "*",
    stats: Stats | None = EACH,
    *,
    every: int = 100,
    to: Sink | Iterable[Sink] = (),
    on_nonfinite: str = "raise",
    group: ProcessGroup | str | None = None,
    start: int = 0,
) -> Watcher:
    """Watch a training run: statistics of a model's interior gradients every n steps, at no cost in those between.

    A step is what runs between two calls of `watcher.step()`, however many backward calls it makes: their statistics
    merge as `Stats` says. In steps whose number `every` divides, 0 among them, the model's points are asked for as by
    `ro.retain`; in all others the model is as it was. Compiled, it has two graphs, one for each, and no more.

    Args:
        model: any module that `ro.retain` takes: compiled, wrapped by DistributedDataParallel, or sharded.
        patterns: as of `ro.retain`; a mapping from pattern to `Stats` goes without `stats`.
        stats: what to take of each point.
        every: steps from one that is read to the next.
        to: where readings go: a callable of (step, readings), or several. `readings` is a dict from the name of a point
            that a gradient came to, to a dict from statistic to value, a Python number or a tensor on the CPU. See
            `retainops.integrations` for `TensorBoard`, `JsonLines` and `LiveTable`.
        on_nonfinite: "raise", "warn" or "ignore", when a statistic "nonfinite" is not 0.
        group: reduce statistics over the ranks of this process group before they are read ("world": the default one),
            and give them to the sinks of its first rank alone. Every rank must watch, the same points in the same
            steps. None: each rank reads its own.
        start: the number of the first step, of a run that goes on.

    Reading waits for the GPU, once in a step that is read.

    Returns:
        A `Watcher`: call its `step()`, or `attach` it to an optimizer; a `with` around the loop closes it.

    Raises:
        TypeError: a want is no `Stats`, a sink is not callable, `every` is a bool, `start` is not the number of a step,
            or as of `ro.retain`.
        ValueError: `every` or `on_nonfinite` makes no sense, `stats` is given beside a mapping, or as of `ro.retain`.
        KeyError: a pattern matches nothing.

    Example:
        >>> with ro.watch(model, "layers.*", ro.Stats("l2", "nonfinite"), every=100, to=print) as watcher:
        ...     for x, y in batches:
        ...         loss_of(model(x), y).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         watcher.step()
    """
    if isinstance(every, bool):
        raise TypeError("watch: every is a bool; expected a number of steps, at least 1")
    if not isinstance(start, int) or isinstance(start, bool):
        raise TypeError(f"watch: start is {start!r}; expected the number of a step")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"watch: every is {every!r}; expected a number of steps, at least 1")
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"watch: on_nonfinite is {on_nonfinite!r}; expected one of {', '.join(ON_NONFINITE)}")
    if isinstance(to, (str, PathLike)):
        raise TypeError(
            f"watch: to is {to!r}; expected a callable of (step, readings), or several: to write to a file, "
            f"retainops.integrations.jsonl.JsonLines({str(to)!r})"
        )
    if not callable(to) and not isinstance(to, Iterable):
        raise TypeError(f"watch: to is {type(to).__name__}; expected a callable of (step, readings), or several")
    sinks = (to,) if callable(to) else tuple(to)
    for sink in sinks:
        if not callable(sink):
            raise TypeError(f"watch: to has a {type(sink).__name__}; expected callables of (step, readings)")
    if isinstance(patterns, Mapping):
        wants: list[Want] = list(patterns.values())
        if stats is not None and stats is not EACH:
            raise ValueError("watch: stats is given, and the mapping gives them to each pattern; leave out stats")
        stats = None
    else:
        wants = [stats]
    for want in wants:
        if not isinstance(want, Stats):
            raise TypeError(f'watch: a want is {type(want).__name__}; expected Stats, such as Stats("l2", "nonfinite")')
        if group is not None and want.over == "rows":
            raise ValueError("watch: statistics over rows are each rank's own; leave out group or take another over")
    asked = Asked("watch", model, patterns, stats)
    return Watcher(asked, every, sinks, on_nonfinite, _group(group), start)


def _group(group: ProcessGroup | str | None) -> Any:
    if group is None:
        return None
    if isinstance(group, str) and group != "world":
        raise ValueError(f'watch: group is {group!r}; expected a process group, "world" or None')
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError("watch: group is given, and torch.distributed is not set up; call init_process_group()")
    found: Any = torch.distributed.group.WORLD if group == "world" else group
    if torch.distributed.get_rank(found) < 0:
        raise ValueError("watch: this rank is not in the group that is given; watch on the ranks of the group")
    return found


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("closure") is not None or any(x is not None for x in args[1:])  # args[0] is the optimizer
