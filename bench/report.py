"""A run of the benchmarks as tables and a picture: `python -m bench.report [DIR] [--out DIR] [--markdown]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.figures import Figures, duration, job, name, rate
from bench.jobs import DTYPES
from bench.record import FILE, ROOT, Row, Run

RESULTS = ROOT / "bench" / "results"
WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}
ROUNDS = {
    "median": "Medians over the rounds.",
    "fastest": "The fastest round of each: other work on a CPU only ever adds time.",
}
PICTURE, MARKDOWN = "results.png", "results.md"


Cell = tuple[str, ...]  # parts that stand below those of the cell above


@dataclass
class Sheet:
    """A table before it has a form: blocks of lines of cells. The first two columns are words, the others figures."""

    title: str
    header: list[str]
    blocks: list[list[list[Cell]]]

    def as_rich(self) -> Table:
        table = Table(title=Text(self.title, style="bold"), box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for column in self.header:
            table.add_column(Text(column), no_wrap=True)  # figures are padded: rich would strip it on the right
        widths = [self._widths(n) for n in range(len(self.header))]
        for block in self.blocks:
            for line in block:
                padded = (
                    "  ".join(part.rjust(width) for part, width in zip(cell, widths[n], strict=False))
                    if n > 1
                    else cell[0]
                    for n, cell in enumerate(line)
                )
                table.add_row(*map(Text, padded), end_section=line is block[-1])
        return table

    def _widths(self, column: int) -> list[int]:
        cells = [line[column] for block in self.blocks for line in block]
        return [max(map(len, parts)) for parts in zip_longest(*cells, fillvalue="")]

    def as_markdown(self) -> str:
        lines = [self.header, ["---" if n < 2 else "---:" for n in range(len(self.header))]]
        lines += [[", ".join(filter(None, cell)) for cell in line] for block in self.blocks for line in block]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def sheets(run: Run) -> list[Sheet]:
    """The tables of a run."""
    figures = Figures(run.rows)
    found = []
    for op, label in dict.fromkeys((r.op, r.label) for r in run.rows):
        for kind in ("bandwidth", "host"):
            rows = [r for r in run.rows if (r.op, r.label, r.kind) == (op, label, kind)]
            if rows:
                found.append(_sheet(op + (f", {label}" if label else ""), kind, rows, figures))
    if run.forecasts:
        found.append(_forecast_sheet(run))
    return found


def _sheet(title: str, kind: str, rows: list[Row], figures: Figures) -> Sheet:
    jobs = list(dict.fromkeys(job(r) for r in rows))
    tensors = dict.fromkeys((r.dtype, r.size) for r in sorted(rows, key=lambda r: r.elements * WIDTHS.get(r.dtype, 1)))
    blocks = []
    for dtype, size in tensors:
        of_size = [r for r in rows if (r.dtype, r.size) == (dtype, size)]
        block: list[list[Cell]] = []
        for variant in dict.fromkeys(r.variant for r in of_size):
            by_job = {job(r): r for r in of_size if r.variant == variant}
            cells = [_cell(by_job[j], figures) if j in by_job else ("",) for j in jobs]
            block.append([(f"{dtype} {size}",), (name(next(iter(by_job.values()))),), *cells])
        blocks.append(block)
    what = {"bandwidth": "time, rate of the fewest bytes, fraction of a device copy", "host": "time of a call"}[kind]
    return Sheet(f"{title}: {what}", ["tensor", "", *(_heading(j, rows, figures) for j in jobs)], blocks)


def _heading(name: str, rows: list[Row], figures: Figures) -> str:
    ratios = {f"{ratio[1]:.2f}" for r in rows if job(r) == name and (ratio := figures.kept_ratio(r))}
    return f"{name} (bytes: {' or '.join(sorted(ratios))}x)" if ratios and rows[0].kind == "bandwidth" else name


def _cell(row: Row, figures: Figures) -> Cell:
    time = duration(row.seconds) + ("*" if row.host_limited else "")
    if row.kind == "host":
        return (time,)
    of_copy, ratio = figures.of_copy(row), figures.kept_ratio(row)
    fraction = f"{of_copy:.0%}" if of_copy and row.variant != "copy" else ""
    cost = f"{ratio[0]:.2f}x" if ratio and row.variant != "copy" else ""
    parts = (time, rate(row.bytes / row.seconds), fraction)
    return (*parts, cost) if row.point else parts


def _forecast_sheet(run: Run) -> Sheet:
    gpu = run.forecasts[0].gpu
    found = {(f.op, f.dtype, job(f)): f for f in run.forecasts}
    on_it = [r for r in run.rows if gpu in run.metadata["device"] and r.kind == "bandwidth" and not r.label]
    measured = {(r.op, r.dtype, r.elements, job(r)): r.seconds for r in on_it if r.variant == "retainops"}
    lines: list[list[Cell]] = []
    for f in run.forecasts:
        plain, seconds = found.get((f.op, f.dtype, "backward")), measured.get((f.op, f.dtype, f.elements, job(f)))
        what = (f"{f.op} {f.dtype}, {f.elements:,} elements",), (job(f),), (duration(f.seconds),)
        kept = (f"{f.seconds / plain.seconds:.2f}x" if f.point and plain else "",)
        beside = (duration(seconds), f"{seconds / f.seconds:.2f}x") if seconds else ("",)
        lines.append([*what, (rate(f.bytes / f.seconds),), (f.bound,), kept, *([beside] if measured else [])])
    title = f"PREDICTED for one {gpu} by the roofline model of retainops.testing: not measured"
    header = ["op", "job", "time", "rate", "limited by", "retained / not", *(["measured"] if measured else [])]
    return Sheet(title, header, [lines])


def notes(run: Run) -> list[str]:
    """What to know when reading the figures."""
    about = run.metadata
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    found = [
        f"{about['device']}, {about['threads']} threads; load {about['load']}; {about['date']}; {versions}; "
        f"commit {about['commit']}.",
        f"{ROUNDS[about['statistic']]} The fraction is of the speed of a device copy that moves the same bytes, "
        "measured in the same run. The factor (1.20x) is the backward that retains the point over the same "
        "variant's backward that does not; the heading says what it would be by the fewest bytes.",
    ]
    if any(r.host_limited for r in run.rows):
        found.append("* the host may have been slower than the device here.")
    return found + ([about["note"]] if about["note"] else [])


def markdown(run: Run) -> str:
    """The tables and notes of a run, for docs."""
    return "\n\n".join([f"### {run.metadata['device']}", *(s.as_markdown() for s in sheets(run)), *notes(run)]) + "\n"


def show(run: Run, console: Console) -> None:
    """Print the tables and notes."""
    for sheet in sheets(run):
        console.print(sheet.as_rich())
    for note in notes(run):
        console.print(Text(note, style="dim"))


def find(folder: Path) -> list[Path]:
    """The folders with results: this one, or those in it.

    Raises:
        FileNotFoundError: there are none.
    """
    found = [path.parent for path in sorted([*folder.glob(FILE), *folder.glob(f"*/{FILE}")])]
    if not found:
        raise FileNotFoundError(f"no {FILE} in {folder} or a folder of it; make one with: python -m bench.run")
    return found


def write(run: Run, folder: Path) -> list[Path]:
    """Put the picture and the markdown there."""
    from bench.picture import draw  # matplotlib takes a second to import, and the tables do not need it

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKDOWN).write_text(markdown(run))
    draw(run, folder / PICTURE)
    return [folder / MARKDOWN, folder / PICTURE]


def main(argv: Sequence[str] | None = None) -> int:
    """Report on results; 0, or 1 where there are none."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument(
        "dir", nargs="?", type=Path, default=RESULTS, metavar="DIR", help="a run's folder, or several's"
    )
    parser.add_argument("--out", type=Path, help="where the picture and the markdown go (default: beside the results)")
    parser.add_argument("--markdown", action="store_true", help="print markdown in place of tables; write nothing")
    options = parser.parse_args(argv)
    try:
        folders = find(options.dir)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    # A log has no width of its own, and cells that wrap cannot be read.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for folder in folders:
        run = Run.load(folder)
        if options.markdown:
            print(markdown(run))
            continue
        show(run, console)
        out = folder if options.out is None else options.out / (folder.name if len(folders) > 1 else "")
        try:
            console.print("wrote", *map(str, write(run, out)))
        except OSError as error:
            console.print(f"{error}: nothing written; choose another place with --out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
