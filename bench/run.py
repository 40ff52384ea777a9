"""Measure and report: `python -m bench.run [--results DIR] [--seconds N] [--quick] [--note TEXT] [-k NAME]`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import options as shared
from bench import record, report
from bench.forecast import GPU, forecasts
from retainops.dispatch import HAS_TRITON
from retainops.registry import find

SECONDS = 140.0
"""In which all cases are started."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks, keep their results, and print and draw them.

    Args:
        argv: the options; those it does not know go to pytest (`-k mul_sin`). With those, `--quick`, or less time, the
            results do not take the place of those in bench/results/: they go to `--results`, or to a new folder.

    Returns:
        0; pytest's exit status where a benchmark failed (the others are reported); 1 where nothing was measured.
    """
    options, for_pytest = _parser().parse_known_args(argv)
    whole = not options.quick and not for_pytest and options.seconds >= SECONDS
    folder = shared.results_folder(options.results, whole=whole)
    print(f"measuring on {record.device_name()}", flush=True)
    if options.warm:
        warm = ["--bench-warm", "-n", str(options.warm), "--dist=loadgroup", "-q"]
        _pytest(Path(os.devnull), options, [*warm, *for_pytest])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "benchmark.json"
        status = _pytest(path, options, for_pytest)
        if not path.is_file() or not path.stat().st_size:
            print("nothing was measured: see the messages above", file=sys.stderr)
            return status or 1
        run = record.Run.load(path)
    run.save(folder)
    if HAS_TRITON and not options.quick:
        print(f"predicting for an {GPU}", flush=True)
        run.forecasts = list(forecasts(map(find, dict.fromkeys(row.op for row in run.rows))))
        run.save(folder)
    return report.main([str(folder)]) or status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__, allow_abbrev=False)
    shared.add_results(parser)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"start no case after this many (default {SECONDS:g})"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: whether it runs, not how fast")
    parser.add_argument("--warm", type=int, default=0, metavar="N", help="first compile everything, in N processes")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch on a CPU (default: its own choice)")
    parser.add_argument("--note", default="", help="a remark to keep with the results")
    return parser


def _pytest(path: Path, options: argparse.Namespace, more: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", "bench", "-v", "--no-header", "--benchmark-quiet"]
    # A warning is an error in the tests; here it must not cost a measurement.
    command += ["-W", "default", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    command += [
        f"--bench-seconds={options.seconds}",
        f"--bench-note={options.note}",
        f"--bench-threads={options.threads}",
    ]
    command += ["--bench-quick"] if options.quick else []
    # pytest-benchmark times nothing in what it takes for a worker of a parallel run.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    with subprocess.Popen([*command, *more], cwd=record.ROOT, env=env) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # pytest had the interrupt too: it stops, and writes what it has


if __name__ == "__main__":
    sys.exit(main())
