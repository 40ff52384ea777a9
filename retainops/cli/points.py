"""`retainops points`: what can be asked for."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from retainops import registry
from retainops.cli.messages import POINTWISE, found_op, found_ops, print_whole
from retainops.cli.snippet import snippet
from retainops.ops.pointwise import BINARY, FAMILY, UNARY


def points(
    op: Annotated[
        str | None,
        typer.Argument(
            help=f"Only this op; or {POINTWISE}, for each of that family.", metavar="OP", show_default=False
        ),
    ] = None,
) -> None:
    """List the points of every op: the interior values whose gradient can be asked for, and how to ask.

    Example: retainops points mul_sin
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("op, and its points", no_wrap=True)  # names are to be copied
    for name in ("formula", "shape"):
        table.add_column(name, overflow="fold")
    if op is None:
        _add(table, POINTWISE, "f(a o b)", registry.find("mul_sin").points, inner="a o b")
    for record in _chosen(op):
        _add(table, record.name, record.formula, record.points)
    console = Console()
    print_whole(console, table, least=60)
    if op is None:
        console.print(Text(_OF_FAMILY.format(o=", ".join(BINARY), f=", ".join(UNARY), name=POINTWISE, n=len(FAMILY))))
    code = snippet(registry.find("mul_sin") if op in (None, POINTWISE) else found_op(op))
    console.print(Text(code), soft_wrap=True)  # it is to be copied


def _chosen(op: str | None) -> list[registry.Op]:
    return [record for record in registry.ops() if record.name not in FAMILY] if op is None else found_ops(op)


def _add(table: Table, name: str, formula: str, points: tuple[registry.PointInfo, ...], inner: str = "") -> None:
    table.add_row(Text(name, style="bold"), Text(formula))
    for point in points:
        table.add_row(Text(f"  {point.name}"), Text(inner or point.formula), Text(point.shape))
    table.add_section()


_OF_FAMILY = """\
pointwise stands for {n} ops o_f, such as mul_sin and add_gelu: o of {o}; f of {f}.
retainops points {name} lists them.
"""
