"""The command line: `python -m retainops`, or `retainops`. Its libraries are those of the extra "demo"."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command line with `sys.argv`."""
    missing = [name for name in ("typer", "rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"retainops: the command line needs {' and '.join(missing)}, not installed here; "
            'pip install "retainops[demo]"',
            file=sys.stderr,
        )
        sys.exit(2)
    from retainops.cli.app import app

    app()
