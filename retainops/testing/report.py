"""What `check_op` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One quantity of a report.

    Attributes:
        name: "y", or "d" and the name of an input or a point.
        kind: "output", "input" or "point".
        error: max |x - oracle| over finite elements.
        eager_error: the same for eager PyTorch, the largest of several measurements.
        bar: what `error` may be.
        problems: what is wrong, in words; empty when all is well.
    """

    name: str
    kind: str
    error: float
    eager_error: float
    bar: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class Report:
    """What `check_op` found; its `str` is a table.

    Attributes:
        op: the op's name.
        inputs: the inputs in words.
        rows: one for each quantity: the output, then the inputs' gradients, then the points'.
        bitwise: the same bits with retention on, off and of each point alone, and in two runs.
        problems: what is wrong with the op as a whole: which bits differ, and whether an input was written to.
        differing: the rows whose bits differ between runs that must be equal.
        intact: no input was written to.
    """

    op: str
    inputs: str
    rows: tuple[Row, ...]
    bitwise: bool
    problems: tuple[str, ...]
    differing: tuple[str, ...] = ()
    intact: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        head = ("", "error", "eager's", "bar", "")
        body = [
            (r.name, f"{r.error:.2e}", f"{r.eager_error:.2e}", f"{r.bar:.2e}", "; ".join(r.problems) or "ok")
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(4)]
        lines = [f"{self.op}({self.inputs}): {'ok' if self.ok else 'FAILED'}"]
        for name, *numbers, verdict in (head, *body):
            cells = (n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join(("", name.ljust(widths[0]), *cells, verdict)).rstrip())
        bits = "bitwise the same with retention on and off, and in two runs" if self.bitwise else ""
        lines += [f"  {line}" for line in (bits, *self.problems) if line]
        return "\n".join(lines)
