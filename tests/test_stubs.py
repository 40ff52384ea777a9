"""What editors and type checkers see of functions that are made from tables: retainops/pointwise.pyi."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import retainops as ro
from retainops.ops import _stubs
from retainops.ops.pointwise import FAMILY

ROOT = Path(__file__).parent.parent


def test_the_stub_is_up_to_date() -> None:
    assert _stubs.PATH.read_text() == _stubs.stubs(), "run: python -m retainops.ops._stubs"


def test_the_stub_has_every_function_with_its_docstring() -> None:
    functions = {
        node.name: node for node in ast.parse(_stubs.PATH.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert list(functions) == list(FAMILY)
    for name, node in functions.items():
        assert ast.get_docstring(node) == inspect.getdoc(FAMILY[name])
        assert [a.arg for a in node.args.args + node.args.kwonlyargs] == ["a", "b", "retain"]


def test_docstrings_say_what_each_function_is() -> None:
    docs = {name: inspect.getdoc(function) for name, function in FAMILY.items()}
    assert len(set(docs.values())) == len(FAMILY)
    assert docs["sub_square"].startswith("square(a - b) in one kernel, with the gradient of c = a - b on request.")
    assert "ro.pointwise.sub_square(a, b, retain=kept)" in docs["sub_square"]
    assert max(len(line) for doc in docs.values() for line in doc.splitlines()) <= 116  # in a file, and indented


def test_dir_and_help() -> None:
    assert dir(ro.pointwise) == sorted(FAMILY)
    shown = pydoc.plain(pydoc.render_doc(ro.pointwise))
    assert "mul_sin(a: 'torch.Tensor | float'" in shown
    for name, function in FAMILY.items():
        assert getattr(ro.pointwise, name) is function
        assert (function.__name__, function.__module__) == (name, "retainops.pointwise")
        assert f"{name}(" in shown


def test_a_name_that_is_not_there() -> None:
    message = "no attribute 'mul_sine'; there is o_f for each o of mul, .*, such as mul_sin"
    with pytest.raises(AttributeError, match=message):
        ro.pointwise.mul_sine  # noqa: B018


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_knows_the_family(tmp_path: Path) -> None:
    code = """import torch
import retainops as ro

a = torch.ones(3)
y: torch.Tensor = ro.mul_sin(a, 2.0)
y = ro.bias_gelu(a, a)
y = ro.pointwise.sub_square(a, b=a, retain=ro.Retained("c"))
ro.pointwise.sub_squared(a, a)
ro.pointwise.mul_sin(a, a, keep=None)
ro.add_gelu(a)
"""
    (tmp_path / "user.py").write_text(code)
    package = [ROOT / "retainops" / name for name in ("__init__.py", "pointwise.pyi")]
    options = ["--follow-imports=skip", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, package), str(tmp_path / "user.py")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    errors = [line.partition("user.py:")[2] for line in found.splitlines() if "user.py:" in line and ": error:" in line]
    assert [error.split(": error: ")[0] for error in errors] == ["8", "9", "10"], found
    for error, word in zip(errors, ('"sub_square"', '"keep"', '"b"'), strict=True):
        assert word in error
