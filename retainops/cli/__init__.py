"""The command line: `python -m retainops`, or `retainops`. Its libraries are those of the extra "demo"."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import sys
from typing import NoReturn

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def main() -> None:
    """Run the command line with `sys.argv`."""
    missing = [name for name in ("typer", "rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        _leave(f'the command line needs {" and ".join(missing)}, not installed here; pip install "retainops[demo]"', 2)
    from retainops.cli.app import app
    from retainops.dispatch import backend_name

    try:
        backend_name()
    except ValueError as e:  # of the environment variable
        _leave(str(e), 2)
    try:
        app()
    except OSError as e:
        if e.errno not in CANNOT_WRITE or e.filename is not None:
            raise
        with contextlib.suppress(
            OSError, ValueError
        ):  # what is still to be written has nowhere to go: not again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(f"cannot write to the output: {e.strerror}", 1)


def _leave(message: str, status: int) -> NoReturn:
    print(f"retainops: {message}", file=sys.stderr)
    sys.exit(status)
