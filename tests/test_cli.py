"""The command line: what each command prints, and its exit status."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import retainops as ro
from retainops import registry
from retainops.cli import bench, sweep
from retainops.cli.app import app
from retainops.cli.snippet import snippet
from retainops.ops.pointwise import FAMILY
from retainops.testing.check import check_layouts

SMALL = ("--op", "mul_sin", "--dtype", "float32", "--shape", "5x7", "--jobs", "1")


def run(*args: str):
    return CliRunner().invoke(app, args)


def words(text: str) -> str:
    """The text without the line breaks that the width of the terminal put there."""
    return " ".join(text.split())


@pytest.mark.parametrize("command", ["demo", "points", "check", "bench"])
def test_help_says_what_a_command_does_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: retainops {command}" in words(result.output)
    assert command in run("--help").output


def test_points_lists_every_op():
    result = run("points")
    assert result.exit_code == 0
    listed = result.output + run("points", "pointwise").output
    for op in registry.ops():
        assert op.name in listed
    assert "div_softplus" not in result.output  # 44 that are alike are one entry
    assert "c a o b broadcast of a and b" in words(result.output)
    assert "pointwise stands for 44 ops o_f" in words(result.output)
    assert "c a * b broadcast of a and b" in words(run("points", "mul_sin").output)
    assert "mul_sin" in run("points", "siren").output


def test_points_cuts_no_formula_short():
    for op in registry.ops():
        result = CliRunner().invoke(app, ["points", op.name], env={"COLUMNS": "80"})
        assert "…" not in result.output


def test_points_in_a_narrow_terminal_keeps_its_columns_and_its_code():
    result = CliRunner().invoke(app, ["points", "softcap"], env={"COLUMNS": "20"})
    assert "cap * tanh(x / cap)" in words(result.output)
    assert "x / cap of x and cap" in words(result.output)
    assert result.output.endswith(snippet(registry.find("softcap")) + "\n")


@pytest.mark.parametrize("op", list(registry.ops()), ids=lambda op: op.name)
def test_the_code_that_points_prints_runs(op):
    """It names the op's inputs as its formula does, and calls it as its user can."""
    _, start, after = run("points", op.name).output.partition("kept = ")
    code = start + after
    names = list(inspect.signature(op.reference).parameters)
    generator = torch.Generator().manual_seed(0)
    given = op.sample(torch.Size((4, 6)), torch.float32, "cpu", generator)
    for x in given:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x.requires_grad_()
    scope = {"ro": ro, **dict(zip(names, given, strict=False))}
    if "target" in scope:
        scope["target"] = scope["target"].clamp(min=0)  # the sample's is ignored where it is -1
    exec(code, scope)
    (slot,) = scope["kept"].values()
    assert slot.grad is not None


def test_an_interrupted_check_leaves_the_rest(monkeypatch):
    ran = []
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(sweep, "run", lambda task: ran.append(task) or time.sleep(0.01) or [])
    found = sweep.outcomes(range(40), 2)
    assert next(found) == []
    with pytest.raises(KeyboardInterrupt):
        found.throw(KeyboardInterrupt)
    assert len(ran) < 40


def test_points_of_one_op_lists_no_other(monkeypatch):
    other = dataclasses.replace(registry.find("mul_sin"), name="mul_other")
    monkeypatch.setitem(registry._ops, "mul_other", other)
    assert "mul_other" in run("points").output
    assert "mul_other" not in run("points", "mul_sin").output


def test_check_of_a_right_op_on_every_path(monkeypatch):
    def three(*inputs):
        layouts = check_layouts(*inputs)
        return {name: layouts[name] for name in ("contiguous", "row 1", "0 elements")}

    monkeypatch.setattr(sweep, "check_layouts", three)
    result = run("check", *SMALL)
    assert result.exit_code == 0, result.output
    assert "kernels: on" in result.output
    assert "reference: on" in result.output
    lines = [line.split() for line in result.output.splitlines()]
    for quantity in ("y", "da", "db", "dc"):
        row = next(line for line in lines if quantity in line[:2])
        assert row[-2:] == ["yes", "ok"]
        assert all(0 <= float(number) < 1e-4 for number in row[-5:-2])  # eager's, kernels, reference
    assert "all 6 checks are ok" in result.output


def test_check_says_what_never_took_the_kernels(monkeypatch):
    monkeypatch.setattr(sweep, "check_layouts", lambda *inputs: {"contiguous": inputs})
    refusing = dataclasses.replace(registry.find("mul_sin"), refuses=lambda *_: "not today")
    monkeypatch.setitem(registry._ops, "mul_sin", refusing)
    result = run("check", *SMALL)
    assert result.exit_code == 0
    assert "no call took the kernels: mul_sin in float32" in result.output


def test_check_with_a_row_for_each_layout(monkeypatch):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    result = run("check", *SMALL, "--layouts")
    assert result.exit_code == 0
    for layout in ("contiguous", "transposed", "row 0", "outer", "0 dims"):
        assert layout in result.output


def _reference_only():
    return [sweep.Path(sweep.REFERENCE, "reference: on cpu", "cpu", lambda: ro.backend("reference"))]


def _fault(monkeypatch, call):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    monkeypatch.setitem(registry._ops, "mul_sin", dataclasses.replace(registry.find("mul_sin"), call=call))
    return run("check", *SMALL)


def test_a_wrong_op_fails_the_check(monkeypatch):
    result = _fault(monkeypatch, lambda a, b, retain=None: -ro.mul_sin(a, b, retain=retain))
    assert result.exit_code == 1
    assert "14 of 15 FAIL" in result.output  # 0 elements have no wrong sign
    assert "is above the bar" in result.output
    assert "14 of 15 checks failed" in result.output


def test_other_bits_when_retained_fail_the_check(monkeypatch):
    def call(a, b, retain=None):
        y = ro.mul_sin(a, b, retain=retain)
        return y if retain is None else y * (1 + torch.finfo(y.dtype).eps)

    result = _fault(monkeypatch, call)
    assert result.exit_code == 1
    assert "other bits without retention: y" in result.output
    row = next(line.split() for line in result.output.splitlines() if line.split()[:2] == ["float32", "y"])
    assert row[-5:] == ["no", "14", "of", "15", "FAIL"]


def test_bits_that_differ_fail_the_quantity_that_they_are_of(monkeypatch):
    """Not those beside it in the same call."""

    def call(a, b, retain=None):
        y = ro.mul_sin(a, b, retain=retain)
        return y if retain is None else y * (1 + torch.finfo(y.dtype).eps)

    monkeypatch.setattr(sweep, "check_layouts", lambda *inputs: {"contiguous": inputs})
    rows = [line.split() for line in _fault(monkeypatch, call).output.splitlines()]
    for quantity, verdict in (("y", ["no", "1", "of", "1", "FAIL"]), ("dc", ["yes", "ok"])):
        row = next(row for row in rows if quantity in row[:2])
        assert row[-len(verdict) :] == verdict


def test_inputs_that_cannot_be_made_are_a_failed_check(monkeypatch):
    def sample(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(sweep, "paths", _reference_only)
    monkeypatch.setitem(registry._ops, "mul_sin", dataclasses.replace(registry.find("mul_sin"), sample=sample))
    result = run("check", *SMALL)
    assert result.exit_code == 1
    assert (
        "inputs, reference path: could not be made of shape 5x7: RuntimeError: can't allocate memory" in result.output
    )
    assert "1 of 1 checks failed" in result.output


@pytest.mark.parametrize("name", ["rope", "rms_norm", "swiglu_packed"])
def test_one_row_of_one_column_is_checked(name, monkeypatch):
    """Of rope that has no pair to turn, and of a packed tensor no half: they have two columns."""
    monkeypatch.setattr(sweep, "paths", _reference_only)
    result = run("check", name, "--dtype", "float32", "--shape", "1x1", "--jobs", "1")
    assert result.exit_code == 0, result.output


def test_a_dtype_named_twice_is_checked_once(monkeypatch):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    assert "all 15 checks are ok" in run("check", *SMALL, "--dtype", "float32").output


def test_an_op_that_raises_fails_the_check(monkeypatch):
    def call(a, b, retain=None):
        raise ZeroDivisionError("of all things")

    result = _fault(monkeypatch, call)
    assert result.exit_code == 1
    assert "raised ZeroDivisionError: of all things" in result.output
    assert "15 of 15 checks failed" in result.output


def test_a_reference_that_raises_fails_the_check(monkeypatch):
    def reference(a, b, point):
        raise RuntimeError("no reference")

    monkeypatch.setattr(sweep, "paths", _reference_only)
    monkeypatch.setitem(registry._ops, "mul_sin", dataclasses.replace(registry.find("mul_sin"), reference=reference))
    result = run("check", *SMALL)
    assert result.exit_code == 1
    assert "raised RuntimeError: no reference" in result.output


def test_check_of_everything_is_a_line_for_each_op(monkeypatch):
    """In one dtype, small and on the reference alone; `make check` does the rest."""
    monkeypatch.setattr(sweep, "paths", _reference_only)
    result = run("check", "--dtype", "float32", "--shape", "5x7", "--jobs", "1")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    for op in registry.ops():
        checks, kernels, reference, bitwise, verdict = lines[op.name]
        assert int(checks) >= 1 + sweep.SPREAD
        assert (kernels, bitwise, verdict) == ("-", "yes", "ok")
        assert 0 < float(reference) <= 1


def test_a_wrong_op_shows_in_its_line_and_in_full(monkeypatch):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    wrong = dataclasses.replace(registry.find("add_exp"), call=lambda a, b, retain=None: a * 2)
    monkeypatch.setattr(registry, "_ops", {"mul_sin": registry.find("mul_sin"), "add_exp": wrong})
    result = run("check", "--dtype", "float32", "--shape", "5x7", "--jobs", "1")
    assert result.exit_code == 1
    lines = [line.split() for line in result.output.splitlines()]
    assert next(line for line in lines if line[:1] == ["mul_sin"])[-1] == "ok"
    assert next(line for line in lines if line[:1] == ["add_exp"])[-1] == "FAIL"
    assert "add_exp, float32, contiguous, reference path: " in result.output
    assert "is above the bar" in result.output


def test_every_layout_is_tried_in_every_kind_of_op_and_in_some_op_of_each_row():
    """One op of each kind in all layouts; the others share them out."""
    every = list(registry.ops())
    work = sweep.tasks(every, [torch.float32, torch.bfloat16], torch.Size((5, 7)), every_layout=False)
    whole = {task.op for task in work if task.turn is None}
    assert {"mul_sin", "softcap", "scale_shift", "mish", "bias_dropout_add", "swiglu", "swiglu_packed"} <= whole
    assert len(whole) < len(every) / 2
    assert {(t.op, t.dtype, t.path) for t in work} == {
        (op.name, dtype, path.name)
        for op in every
        for dtype in (torch.float32, torch.bfloat16)
        for path in sweep.paths()
    }
    turns = [task.turn for task in work if task.turn is not None and task.path == sweep.REFERENCE]
    assert len(set(turns)) == len(turns)
    assert all(task.turn is None for task in sweep.tasks(every, [torch.float32], torch.Size((5, 7)), every_layout=True))


def test_check_in_several_processes():
    result = run("check", "--op", "squared_relu", "--dtype", "float32", "--shape", "5x7", "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert "squared_relu = relu(x)^2" in result.output
    assert re.search(r"all \d+ checks are ok", result.output)


def test_a_table_for_each_op_on_request(monkeypatch):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    monkeypatch.setattr(registry, "_ops", {name: registry.find(name) for name in ("mul_sin", "add_exp")})
    result = run("check", "--dtype", "float32", "--shape", "5x7", "--jobs", "1", "--verbose")
    assert result.exit_code == 0, result.output
    assert "mul_sin = sin(a * b)" in result.output
    assert "add_exp = exp(a + b)" in result.output


def test_ops_to_check_by_place_by_option_and_by_family(monkeypatch):
    monkeypatch.setattr(sweep, "paths", _reference_only)
    chosen = []

    def nothing(ops, dtypes, size, every_layout):
        chosen.append(([op.name for op in ops], every_layout))
        return []

    monkeypatch.setattr(sweep, "tasks", nothing)
    for args in (["mul_sin", "mish"], ["mul_sin", "--op", "mish"], ["pointwise", "mul_sin", "mish"]):
        assert run("check", "--jobs", "1", *args).exit_code == 0
    assert chosen == [(["mul_sin", "mish"], True)] * 2 + [([*FAMILY, "mish"], False)]


def test_the_version():
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"retainops {ro.__version__}\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("points", "mul_cosh"), "'mul_cosh' is not an op of retainops; did you mean 'mul_cos'"),
        (("check", "--op", "mul_cosh"), "'mul_cosh' is not an op of retainops; did you mean 'mul_cos'"),
        (("check", "mul_cosh"), "'mul_cosh' is not an op of retainops; did you mean 'mul_cos'"),
        (("check", "--dtype", "int8"), "--dtype int8: unknown dtype; expected one of float16, bfloat16"),
        (("check", "--shape", "5by7"), "--shape 5by7: expected positive sizes with x between them"),
        (
            ("check", "--shape", "3"),
            "between them, rows and columns at least, such as 37x53",
        ),
        (("check", "--shape", "0x7"), "--shape 0x7: expected positive sizes"),
        (("check", "--shape", "99999999999999999999x2"), "that is 2.0e+20 elements; expected 1e+12 at most"),
        (("check", "--jobs", "-1"), "--jobs -1: expected a number of processes, or 0"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.splitlines()) == 1


def test_bench_hands_its_options_on(monkeypatch):
    calls = []

    def fake(command, cwd):
        calls.append((command, cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", fake)
    assert run("bench", "--quick", "-k", "mul_sin").exit_code == 3
    ((command, cwd),) = calls
    assert command[1:] == ["-m", "bench.run", "--quick", "-k", "mul_sin"]
    assert (cwd / "bench" / "run.py").is_file()


@pytest.mark.parametrize("given", [("--results", "mine"), ("--results=mine",)], ids=len)
def test_bench_writes_where_it_is_run(given, monkeypatch, tmp_path):
    """It measures in the clone, where a relative path would lead somewhere else."""
    commands = []
    monkeypatch.setattr(bench.subprocess, "run", lambda c, cwd: commands.append(c) or subprocess.CompletedProcess(c, 0))
    monkeypatch.chdir(tmp_path)
    assert run("bench", *given, "-k", "mul_sin").exit_code == 0
    assert " ".join(commands[0][3:]).replace("=", " ") == f"--results {tmp_path / 'mine'} -k mul_sin"


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    result = run("bench")
    assert result.exit_code == 2
    assert "only of the source repository" in result.output


def test_without_the_extra_the_library_imports_and_the_command_line_says_what_to_install():
    code = (
        "import sys, importlib.util\n"
        "import retainops\n"
        "assert not {'typer', 'rich', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "sys.modules.update(typer=None, matplotlib=None)\n"
        "from retainops.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        'retainops: the command line needs typer and matplotlib, not installed here; pip install "retainops[demo]"'
    ]


def test_a_wrong_backend_in_the_environment_is_one_line():
    env = {**os.environ, "RETAINOPS_BACKEND": "foo"}
    done = subprocess.run([sys.executable, "-m", "retainops", "points"], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "retainops: RETAINOPS_BACKEND: unknown backend 'foo'; expected one of auto, triton, reference"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_an_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "retainops", "points"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["retainops: cannot write to the output: No space left on device"]


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "retainops", "points", "mul_cosh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'mul_cosh' is not an op of retainops" in done.stderr
