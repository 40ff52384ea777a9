"""What an editor shows of `ro.pointwise`, whose functions are made from tables: `python -m retainops.ops._stubs`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retainops.ops.pointwise import FAMILY

PATH = Path(__file__).parents[1] / "pointwise.pyi"
HEAD = '''"""The pointwise family: y = f(c), c = a o b, each in one kernel, whose point is c."""

# Made from the tables of retainops/ops/pointwise.py by `python -m retainops.ops._stubs`.

import torch

from retainops.retained import Retained

'''


def stubs() -> str:
    """The text of retainops/pointwise.pyi: the signature and the docstring of each function of the family."""
    return HEAD + "\n".join(_stub(function) for function in FAMILY.values())


def _stub(function: Callable[..., Any]) -> str:
    signature = str(inspect.signature(function)).replace("'", "")  # annotations are strings at run time
    doc = textwrap.indent(f'"""{inspect.getdoc(function)}\n"""\n', "    ", lambda line: bool(line.strip()))
    return f"def {function.__name__}{signature}:\n{doc}"


if __name__ == "__main__":
    PATH.write_text(stubs())
