"""`retainops bench`: measure and report, from a source checkout."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import typer

from retainops.cli.messages import fail

ROOT = Path(__file__).parent.parent.parent


def bench(context: typer.Context) -> None:
    """Time every op and report: against eager PyTorch, torch.compile and a plain copy of the same bytes.

    Runs `python -m bench.run`, and hands it every option given here: `--quick` (whether it runs, not how fast),
    `--seconds N` (start no case after N seconds), `--results DIR`, `-k mul_sin` (only these), as pytest has it.

    Results of a whole run go to bench/results/ in the clone; those of `--quick` or a selection to a new folder, which
    it names, so that they take no other's place.

    Example: retainops bench --seconds 120 -k mul_sin
    """
    if not (ROOT / "bench" / "run.py").is_file():
        fail("the benchmarks are not part of the installed package, only of the source repository; run this in a clone")
    if importlib.util.find_spec("pytest_benchmark") is None:
        fail('the benchmarks need pytest-benchmark, which is not installed; pip install "retainops[bench]"')
    command = [sys.executable, "-m", "bench.run", *_from_here(context.args)]
    raise typer.Exit(subprocess.run(command, cwd=ROOT).returncode)


def _from_here(given: list[str]) -> list[str]:
    """The options, with the folder of `--results` as seen from here: they are read in the clone."""
    found = []
    for before, word in zip(["", *given], given, strict=False):
        if before == "--results":
            found.append(str(Path(word).absolute()))
        elif word.startswith("--results="):
            found.append(f"--results={Path(word.partition('=')[2]).absolute()}")
        else:
            found.append(word)
    return found
