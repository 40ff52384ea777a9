"""Retention inside torch.compile, side by side: forward and backward of sin(a * b), in turn, in one run.

python -m bench.compiled            # a table, and bench/results/<device>/compiled.json
python -m bench.compiled --rows 512 --rounds 3    # of other sizes: to --results, or a new folder
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import retainops as ro
from bench import options as shared
from bench import record

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
BASE, RETAINED = "compiled", "eager + retain_grad"


def expression(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained | None) -> torch.Tensor:
    """What is timed."""
    return torch.sin(ro.point(a * b, "c", retain=kept))


def variants() -> dict[str, Step]:
    """Each makes one forward and backward, and leaves what it retains."""
    compiled = torch.compile(expression, fullgraph=True, dynamic=False)

    def eager_retain_grad(a: torch.Tensor, b: torch.Tensor, dy: torch.Tensor) -> object:
        c = a * b
        c.retain_grad()
        torch.sin(c).backward(dy)
        return c.grad

    def ours(f: Callable, want: Callable[[], ro.Retained | None]) -> Step:
        def step(a: torch.Tensor, b: torch.Tensor, dy: torch.Tensor) -> object:
            kept = want()
            f(a, b, kept).backward(dy)
            return kept

        return step

    return {
        "eager": ours(expression, lambda: None),
        RETAINED: eager_retain_grad,
        "eager + slot": ours(expression, lambda: ro.Retained("c")),
        BASE: ours(compiled, lambda: None),
        "compiled + full gradient": ours(compiled, lambda: ro.Retained("c")),
        "compiled + l2": ours(compiled, lambda: ro.Retained(c=ro.Stats("l2"))),
        "compiled + l2 and amax": ours(compiled, lambda: ro.Retained(c=ro.Stats("l2", "amax"))),
    }


def measure(rows: int, rounds: int) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, so a busy moment falls on all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(rows, rows, device=device, requires_grad=True) for _ in "ab")
    dy = torch.randn(rows, rows, device=device)
    times: dict[str, list[float]] = {}
    steps = variants()
    for n in track(range(-2, rounds), description="forward and backward, in turn"):
        for name, step in steps.items():
            a.grad = b.grad = None
            gc.collect()
            _wait(device)
            start = time.perf_counter()
            answer = step(a, b, dy)
            _wait(device)
            if n >= 0:  # the first two rounds compile and warm up
                times.setdefault(name, []).append(time.perf_counter() - start)
            del answer
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(seconds: dict[str, float], rows: int) -> Table:
    """The figures, with the two ratios that matter."""
    shown = Table(title=f"sin(a * b), {rows} x {rows} fp32, forward and backward")
    for column in ("", "ms", f"faster than {RETAINED}", f"time of {BASE}"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, s in seconds.items():
        shown.add_row(name, f"{s * 1e3:.1f}", f"{seconds[RETAINED] / s:.2f} x", f"{s / seconds[BASE]:.2f} x")
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=shared.positive, default=4096, help="of the square matrices (default: 4096)")
    rounds = "timed rounds, of which the median counts (default: 9)"
    parser.add_argument("--rounds", type=shared.positive, default=9, help=rounds)
    shared.add_results(parser)
    options = parser.parse_args(argv)
    folder = shared.results_folder(options.results, shared.as_it_comes(parser, options))
    seconds = measure(options.rows, options.rounds)
    Console().print(table(seconds, options.rows))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "metadata": {**record.metadata(""), "statistic": "median"},
        "rows": options.rows,
        "rounds": options.rounds,
        "seconds": seconds,
    }
    (folder / "compiled.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
