"""What `ro.fuse` did to a model, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from retainops.names import NUMBER
from retainops.retained import aligned


@dataclass(frozen=True)
class Row:
    """One place of a model.

    Attributes:
        name: the module's path; "" is the model itself.
        kind: the name of its class.
        op: the op that is there now; None: it was left as it was.
        why: why it was left; "" where it was not.
    """

    name: str
    kind: str
    op: str | None
    why: str = ""


class Table(Sequence[Row]):
    """The rows of what was replaced and what was left, in the order of the modules; its repr is a table.

    The repr has one line for rows that differ in their numbers alone, as the layers of a model do.

    Args:
        kind, done: the class of the model, and what was done: "fused" or "unfused".
        why_none: what to say where there is no row.

    Attributes:
        replaced, left: the rows of each kind.
    """

    def __init__(self, kind: str, done: str, rows: Sequence[Row], why_none: str) -> None:
        self.kind, self.done, self._rows, self.why_none = kind, done, tuple(rows), why_none

    @property
    def replaced(self) -> tuple[Row, ...]:
        return tuple(row for row in self if row.op is not None)

    @property
    def left(self) -> tuple[Row, ...]:
        return tuple(row for row in self if row.op is None)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        if not self:
            return f"{self.kind}: nothing {self.done}; {self.why_none}"
        alike: dict[Row, list[Row]] = {}
        for row in self:
            path = NUMBER.sub("*", row.name)
            alike.setdefault(Row(path, row.kind, row.op, row.why), []).append(row)
        lines = []
        for of_all, rows in alike.items():
            row, often = (of_all, f"{len(rows)} times") if len(rows) > 1 else (rows[0], "")
            done = f"left: {row.why}" if row.op is None else row.op
            lines.append((row.name or "(the model)", row.kind, done, often))
        return "\n".join([f"{self.kind}, {self.done}:", *aligned(lines)])
