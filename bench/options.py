"""Options that the commands share: where results go, and numbers that count something."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench import record


def add_results(parser: argparse.ArgumentParser) -> None:
    """`--results DIR`."""
    said = "default: bench/results/<device>; of less than a whole run, a new folder for temporary files"
    parser.add_argument("--results", type=Path, metavar="DIR", help=said)


def as_it_comes(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether nothing but `--results` was chosen: such a run may take the place of one that is kept."""
    return all(value == parser.get_default(name) for name, value in vars(options).items() if name != "results")


def results_folder(given: Path | None, whole: bool) -> Path:
    """Where results go, which is said. Those in bench/results/ are committed, and documents quote them.

    Args:
        given: the folder that was asked for, if one was.
        whole: the run is all of what is kept there. If it is not, it gets a folder of its own.
    """
    kept = record.ROOT / "bench" / "results" / record.slug()
    folder = given or (kept if whole else Path(tempfile.mkdtemp(prefix="retainops-bench-")))
    print(f"results go to {folder}", flush=True)
    return folder


def positive(text: str) -> int:
    """The type of an option that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, 1 or more")
    return number
