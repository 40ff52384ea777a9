"""`retainops check`: every op against float64 and eager PyTorch, on this machine."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from retainops import registry
from retainops.cli import sweep
from retainops.cli.messages import POINTWISE, fail, found_ops, print_whole
from retainops.cli.sweep import KERNELS, REFERENCE, Outcome
from retainops.testing.check import Row

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
SHOWN = 5
"""Failures that are printed in full."""
MOST = 10**12
"""Elements of a shape: a tensor of more is in no machine's memory."""


def check(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Only these ops; {POINTWISE}: each of that family.", metavar="[OP]...", show_default=False
        ),
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="The same, as an option.", metavar="NAME")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype; may be repeated.", metavar="NAME")] = None,
    shape: Annotated[str, typer.Option(help="Shape of the inputs.", metavar="ROWSxCOLUMNS")] = "37x53",
    every_layout: Annotated[
        bool, typer.Option("--every-layout", help="Check every op in every layout, as if it was named.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A table for each op, with errors by dtype, as if it was named.")
    ] = False,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="In these tables, a row for each layout, not the worst of them.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes at once; 0: as many as cores.", metavar="N")] = 0,
) -> None:
    """Check every op on this machine: its output, its gradients and its retained gradients, in many layouts.

    Each is compared with a float64 oracle and must be as near to it as eager PyTorch is; retaining must not change a
    bit of anything else. The kernels run on the GPU or, where there is none, on a simulated one; the reference path
    is checked too. One op of each kind is checked in every layout, the others in some; an op that is named, in all. The
    exit status is 1 if anything fails. `retainops.testing.check_op` does this for ops of yours.

    Example: retainops check mul_sin --dtype bfloat16 --layouts
    """
    given = [*(ops or []), *(op or [])]
    chosen = list({found.name: found for name in given for found in found_ops(name)}.values()) or list(registry.ops())
    named = bool(given) and POINTWISE not in given  # those of the family are many
    names = list(dict.fromkeys(dtype or DTYPES))
    for name in names:
        if name not in DTYPES:
            fail(f"--dtype {name}: unknown dtype; expected one of {', '.join(DTYPES)}")
    if jobs < 0:
        fail(f"--jobs {jobs}: expected a number of processes, or 0 for as many as cores")
    work = sweep.tasks(chosen, [DTYPES[name] for name in names], _size(shape), every_layout or named)
    console = Console()
    console.print(Text("\n".join(way.description for way in sweep.paths())))
    outcomes = _run(console, work, jobs or sweep.cores())
    if named or verbose or layouts:
        over = "" if layouts else ", the largest over all layouts"
        console.print(f"max |x - oracle|{over}; oracle: eager in float64")
        for one in chosen:
            print_whole(console, _table(one, [o for o in outcomes if o.op == one.name], layouts))
    else:
        print_whole(console, _summary(chosen, outcomes))
    if left := _left_to_the_reference(outcomes):
        console.print(Text(f"no call took the kernels: {', '.join(left)}"), soft_wrap=True)
    _conclude(console, outcomes)


def _left_to_the_reference(outcomes: list[Outcome]) -> list[str]:
    """What was not checked on the kernels, where there are any: they refused it in every layout."""
    if not any(path.name == KERNELS for path in sweep.paths()):
        return []
    taken = {(o.op, o.dtype) for o in outcomes if o.path == KERNELS}
    return list(dict.fromkeys(f"{o.op} in {o.dtype}" for o in outcomes if (o.op, o.dtype) not in taken))


def _conclude(console: Console, outcomes: list[Outcome]) -> None:
    failed = [o for o in outcomes if not o.ok]
    for outcome in failed[:SHOWN]:
        console.print(Text(f"\n{outcome}", style="red"), soft_wrap=True)
    if failed:
        fail(f"{len(failed)} of {len(outcomes)} checks failed", status=1)
    console.print(f"all {len(outcomes)} checks are ok")


def _size(shape: str) -> torch.Size:
    try:
        sizes = [int(n) for n in shape.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:  # some ops take no fewer dims
        fail(f"--shape {shape}: expected positive sizes with x between them, rows and columns at least, such as 37x53")
    if math.prod(sizes) > MOST:
        fail(f"--shape {shape}: that is {math.prod(sizes):.1e} elements; expected {MOST:.0e} at most")
    return torch.Size(sizes)


def _run(console: Console, work: list[sweep.Task], jobs: int) -> list[Outcome]:
    """The outcomes of all tasks, in the order of the tables."""
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Outcome] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("checking", total=len(work))
        for outcomes in sweep.outcomes(work, jobs):
            found += outcomes
            progress.advance(bar)
    return sorted(found, key=lambda o: (o.path, list(DTYPES).index(o.dtype)))


def _summary(ops: list[registry.Op], outcomes: list[Outcome]) -> Table:
    """One line for each op."""
    title = "largest error, as a share of what it may be: eager's, and one unit in the last place"
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("op", no_wrap=True)
    for name in ("checks", KERNELS, REFERENCE):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("bitwise", "verdict"):
        table.add_column(name, no_wrap=True)
    for op in ops:
        own = [o for o in outcomes if o.op == op.name]
        shares = [_share([o for o in own if o.path == path]) for path in (KERNELS, REFERENCE)]
        same = all(o.report.bitwise for o in own if o.report)
        bad = sum(not o.ok for o in own)
        table.add_row(op.name, str(len(own)), *shares, _bitwise(same), _verdict(bad, len(own)))
    return table


def _share(outcomes: list[Outcome]) -> str:
    shares = [row.error / row.bar for o in outcomes if o.report for row in o.report.rows if row.bar]
    return f"{max(shares):.2f}" if shares else "-"


def _bitwise(same: bool) -> Text:
    return Text("yes") if same else Text("no", style="red")


def _verdict(bad: int, of: int) -> Text:
    return Text(f"{bad} of {of} FAIL", style="red") if bad else Text("ok", style="green")


def _table(op: registry.Op, outcomes: list[Outcome], layouts: bool) -> Table:
    """An op's results: one row for a dtype and quantity, or for each layout of them."""
    groups: dict[tuple[str, str, str], list[tuple[Outcome, Row | None]]] = {}
    for outcome in outcomes:
        for row in outcome.report.rows if outcome.report else (None,):
            key = (outcome.dtype, outcome.layout if layouts else "", row.name if row else "call")
            groups.setdefault(key, []).append((outcome, row))
    title = Text(f"\n{op.name} = {op.formula}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("dtype", "layout", "of"):
        if layouts or name != "layout":
            table.add_column(name, no_wrap=True)
    for name in ("eager's", KERNELS, REFERENCE):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("bitwise", "verdict"):
        table.add_column(name, no_wrap=True)
    last = ("", "")
    for (dtype, layout, quantity), members in groups.items():
        where = ["" if dtype == last[0] else dtype, *([layout if (dtype, layout) != last else ""] if layouts else [])]
        if where[0] and last[0]:
            table.add_section()
        table.add_row(*where, quantity, *_cells(members))
        last = dtype, layout
    return table


def _cells(members: list[tuple[Outcome, Row | None]]) -> list[Text]:
    """eager's error, each path's, bitwise, verdict."""

    def most(errors: list[float]) -> Text:
        return Text(f"{max(errors):.1e}" if errors else "-")

    of_path = [[row.error for o, row in members if row and o.path == path] for path in (KERNELS, REFERENCE)]
    bad = sum(not o.passed(row) for o, row in members)
    return [
        most([row.eager_error for _, row in members if row]),
        *map(most, of_path),
        _bitwise(all(o.same_bits(row) for o, row in members)),
        _verdict(bad, len(members)),
    ]
