"""A table of gradients in the terminal that follows a training loop."""

from __future__ import annotations

import math
from collections import deque
from types import TracebackType
from typing import Any

import torch

try:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise ImportError(
        'retainops.integrations.live needs rich, which is not installed; pip install "retainops[demo]"'
    ) from error

from retainops.readings import Readings, numbers, read
from retainops.retained import Retained

BARS = "▁▂▃▄▅▆▇█"


class LiveTable:
    """A table in the terminal, one row a point: its statistics, and the trend of the first one over the last steps.

    Where the output is not a terminal (a file, a pipe), nothing is drawn while training; the last table is printed at
    the end, once.

    Args:
        console: a `rich.console.Console`; None: one on standard output.
        history: steps that the trend shows.
        refresh_per_second: how often the terminal is drawn anew.

    Raises:
        ImportError: on import of this module, where rich is not installed.

    Example:
        >>> with LiveTable() as table:
        ...     for step, (x, y) in enumerate(batches):
        ...         with ro.retain(model, "layers.*", ro.Stats("l2", "amax")) as kept:
        ...             loss = loss_of(model(x), y)
        ...             loss.backward()
        ...         table.update(step, kept, loss=loss)
    """

    def __init__(self, console: Console | None = None, *, history: int = 24, refresh_per_second: float = 4) -> None:
        if history < 1:
            raise ValueError(f"LiveTable: history is {history}; expected at least 1 step")
        self._history: dict[str, deque[float]] = {}
        self._steps = history
        self._live = Live(Table(), console=console, refresh_per_second=refresh_per_second, auto_refresh=True)

    def __enter__(self) -> LiveTable:
        self._live.start()  # draws on a terminal alone; elsewhere stop() prints the last table
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, step: int, kept: Retained, **values: float | torch.Tensor) -> None:
        """Show a step: what was retained, and more values by name, such as `loss=loss`.

        It reads values, so it waits for the GPU.

        Raises:
            TypeError: `kept` is not a `Retained`.
        """
        if not isinstance(kept, Retained):
            raise TypeError(f"LiveTable.update: kept is {type(kept).__name__}; expected retainops.Retained")
        self._live.update(self._table(step, numbers(read(kept)), values))

    def __call__(self, step: int, readings: Readings) -> None:
        """Show a step's readings: for `ro.watch(model, to=table)`, with the table entered around it."""
        self._live.update(self._table(step, numbers(readings), {}))

    def _table(self, step: int, points: dict[str, dict[str, float]], values: dict[str, Any]) -> Table:
        statistics = list(dict.fromkeys(what for of in points.values() for what in of))
        more = (f"{name} {_number(_plain(value))}" for name, value in values.items())
        table = Table(title="  ".join([f"step {step}", *more]))
        table.add_column("point", no_wrap=True)
        for what in statistics:
            table.add_column(what, justify="right")
        table.add_column("trend", no_wrap=True)
        for name, of in points.items():
            history = self._history.setdefault(name, deque(maxlen=self._steps))
            history.extend(list(of.values())[:1])
            cells = [_cell(of[what]) if what in of else Text("") for what in statistics]
            table.add_row(Text(name), *cells, Text(sparkline(history)))
        return table


def sparkline(values: deque[float] | list[float]) -> str:
    """One bar a value, of the magnitude on a logarithmic scale from the smallest to the largest; "!": not finite."""
    logs = [math.log2(abs(v)) for v in values if math.isfinite(v) and v]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def bar(v: float) -> str:
        if not math.isfinite(v):
            return "!"
        if not v:
            return BARS[0]
        return BARS[round((math.log2(abs(v)) - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[3]

    return "".join(map(bar, values))


def _plain(value: float | torch.Tensor) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _cell(value: float) -> Text:
    return Text(_number(value), style="" if math.isfinite(value) else "bold red")
