"""The table of operations in docs/fuse_pointwise.md is that of the rules. (tests/test_docs.py runs the page's code.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from retainops.elementwise import clamp
from retainops.elementwise.rules import ROWS, Row

PAGE = Path(__file__).parent.parent.parent / "docs" / "fuse_pointwise.md"


def line(row: Row) -> str:
    step = row.rule(*row.example)
    formula = (step.formula or step.value).format(*step.operands)
    grads = (grad and grad.format(*step.operands, y="r", dy="dr").replace("tl.", "") for grad in step.grads)
    of = [f"`d{x} = {grad}`" for x, grad in zip(step.operands, grads, strict=True) if grad]
    names = ", ".join(f"`{name}`" for name in row.names)
    return f"| {names} | {code(formula)} | {'<br>'.join(map(escaped, of))} |".replace("|  |", "| |")


def code(text: str) -> str:
    return escaped(f"`{text}`")


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def table() -> str:
    return "\n".join(["| names | value | gradients |", "|---|---|---|", *map(line, ROWS)])


def test_the_table_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clamp, "TIES_ARE_SHARED", False)  # the page says in words what later torches do
    assert table() in PAGE.read_text(), f"put this into the page:\n{table()}"
