"""What follows from the rows of a run, and how figures are written."""

from __future__ import annotations

from collections.abc import Sequence

from bench.jobs import Job
from bench.record import Forecast, Row


class Figures:
    """What follows from the rows of a run: rates, fractions of a copy, and what retaining costs."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._copies = {r.bytes: r for r in rows if r.variant == "copy"}
        self._at = {(*place(r), job(r), r.variant): r for r in rows}

    def at(self, row: Row, job: str, variant: str) -> Row | None:
        """The row of another job and variant at the same op, dtype and size."""
        return self._at.get((*place(row), job, variant))

    def of_copy(self, row: Row) -> float | None:
        """The time of a device copy that moves the job's fewest bytes, over the job's time."""
        copy = self._copies.get(row.bytes)
        return copy.seconds / row.seconds if copy and row.kind == "bandwidth" else None

    def kept_ratio(self, row: Row) -> tuple[float, float] | None:
        """(time, fewest bytes) of a backward that retains a point, over those of the same variant's backward."""
        plain = self.at(row, "backward", row.variant)
        return (row.seconds / plain.seconds, row.bytes / plain.bytes) if row.point and plain else None


def place(row: Row) -> tuple[str, str, str, str]:
    """Rows of the same place are of the same tensors."""
    return row.op, row.label, row.dtype, row.size


def job(row: Row | Forecast) -> str:
    """The job in words."""
    return str(Job(row.direction, row.point, row.form))


def name(row: Row) -> str:
    """The variant in words."""
    if row.variant == "retainops":
        return "retainops" if row.path == "Triton kernels" else f"retainops ({row.path})"
    return {"copy": "device copy"}.get(row.variant, row.variant)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:#.3g}".rstrip(".") + f" {unit}"
    raise AssertionError


def rate(bytes_per_second: float) -> str:
    """Three digits and a unit."""
    tera = bytes_per_second >= 1e12
    return f"{bytes_per_second / (1e12 if tera else 1e9):#.3g}".rstrip(".") + (" TB/s" if tera else " GB/s")
