"""How the command line says that something is wrong."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

from retainops import registry
from retainops.ops.pointwise import FAMILY


def fail(message: str, status: int = 2) -> NoReturn:
    """Say it in one line on stderr and leave: status 2 for a mistake in what was asked, 1 for a failed check."""
    typer.echo(f"retainops: {message}", err=True)
    raise typer.Exit(status)


def print_whole(console: Console, table: Table, least: int = 100) -> None:
    """Print a table with all its columns: a terminal narrower than `least` wraps its lines, where rich would cut."""
    console.print(table) if console.width >= least else Console(width=least).print(table)


POINTWISE = "pointwise"
"""What the ops of the family are called together."""


def found_ops(name: str) -> list[registry.Op]:
    """The op of this name, or those of the family; leaves with a message if there is none."""
    return [op for op in registry.ops() if op.name in FAMILY] if name == POINTWISE else [found_op(name)]


def found_op(name: str) -> registry.Op:
    """The op of this name; leaves with a message if there is none."""
    try:
        return registry.find(name)
    except KeyError as e:
        fail(e.args[0])
