"""`retainops points`: what can be asked for."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retainops import registry
from retainops.cli.messages import found_op


def points(
    op: Annotated[str | None, typer.Argument(help="Only this op.", metavar="OP", show_default=False)] = None,
) -> None:
    """List the points of every op: the interior values whose gradient can be asked for, and how to ask.

    Example: retainops points mul_sin
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("op, and its points", no_wrap=True)  # names are to be copied
    for name in ("formula", "shape", "ask with"):
        table.add_column(name)
    for record in [found_op(op)] if op else registry.ops():
        table.add_row(Text(record.name, style="bold"), Text(record.formula))
        for point in record.points:
            table.add_row(*map(Text, (f"  {point.name}", point.formula, point.shape, f'Retained("{point.name}")')))
        table.add_section()
    console = Console()
    console.print(table)
    example = found_op(op) if op else next(registry.ops())
    console.print(Text(_EXAMPLE.format(op=example.name, point=example.points[0].name)))


_EXAMPLE = """\
kept = ro.Retained("{point}")
ro.{op}(..., retain=kept).sum().backward()
kept["{point}"].grad  # what {point}.retain_grad() would have left in {point}.grad"""
