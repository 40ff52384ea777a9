"""Write readings as JSON lines, which pandas and `jq` read as a table."""

from __future__ import annotations

import json
import math
from os import PathLike
from pathlib import Path
from typing import IO, Any

import torch

from retainops.readings import Readings


class JsonLines:
    """For `ro.watch(model, to=JsonLines(path))`: one line a step and point, each written through at once.

    A line is `{"step": 100, "point": "layers.0.act", "l2": 0.25, "nonfinite": 0}`; statistics over rows or channels are
    lists. What JSON has no number for is a string, "nan", "inf" or "-inf", which `float()` reads. Points that no
    gradient came to have no line.

    Args:
        file: a path, to which lines are added, or an open text file.

    Raises:
        TypeError: `file` is neither.
        FileNotFoundError: the folder of the path is not there.
        IsADirectoryError: the path is a folder.

    Example:
        >>> with ro.watch(model, to=JsonLines("gradients.jsonl")) as watcher:
        ...     train(model, watcher)
        >>> pandas.read_json("gradients.jsonl", lines=True).pivot(index="point", columns="step", values="l2")
    """

    def __init__(self, file: str | PathLike[str] | IO[str]) -> None:
        # Absolute: a run may go to another folder between steps.
        self._path = Path(file).absolute() if isinstance(file, (str, PathLike)) else None
        self._file = None if isinstance(file, (str, PathLike)) else file
        # Here and not at the first step that is read, which may be hours later.
        if self._path is None:
            if not hasattr(file, "write"):
                raise TypeError(f"JsonLines: file is {type(file).__name__}; expected a path or an open text file")
        elif self._path.is_dir():
            raise IsADirectoryError(f"JsonLines: {str(file)!r} is a folder; give the path of a file in it")
        elif not self._path.parent.is_dir():
            raise FileNotFoundError(
                f"JsonLines: the folder of {str(file)!r} is not there; make it first, with os.makedirs"
            )

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open: `with` is for who writes it out of habit, as with `LiveTable`."""

    def __call__(self, step: int, readings: Readings) -> None:
        rows = [{"step": step, "point": name, **_plain(of)} for name, of in readings.items() if of]
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:  # open for the moment: nothing to close, or to lose
                file.write(lines)
        elif self._file is not None:
            self._file.write(lines)
            self._file.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {what: _plain(x) for what, x in value.items()}
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return value if math.isfinite(value) else str(value)
