"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from retainops._version import __version__
from retainops.cli.bench import bench
from retainops.cli.check import check
from retainops.cli.demo import demo
from retainops.cli.points import points

app = typer.Typer(
    name="retainops",
    epilog="Start with: retainops demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a fault of ours should show Python's own traceback, whole
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"retainops {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Fused Triton ops for PyTorch whose interior values can still be asked for their gradient."""


for command in (demo, points, check):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
