"""The commands, put together."""

from __future__ import annotations

import typer

from retainops.cli.bench import bench
from retainops.cli.check import check
from retainops.cli.demo import demo
from retainops.cli.points import points

app = typer.Typer(
    name="retainops",
    help="Fused Triton ops for PyTorch whose interior values can still be asked for their gradient.",
    epilog="Start with: retainops demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # a fault of ours should show Python's own traceback, whole
)
for command in (demo, points, check):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)
