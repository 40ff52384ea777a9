"""How the command line says that something is wrong."""

from __future__ import annotations

from typing import NoReturn

import typer

from retainops import registry


def fail(message: str, status: int = 2) -> NoReturn:
    """Say it in one line on stderr and leave: status 2 for a mistake in what was asked, 1 for a failed check."""
    typer.echo(f"retainops: {message}", err=True)
    raise typer.Exit(status)


def found_op(name: str) -> registry.Op:
    """The op of this name; leaves with a message if there is none."""
    try:
        return registry.find(name)
    except KeyError as e:
        fail(e.args[0])
