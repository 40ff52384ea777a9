"""The commands that measure, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import record, report
from bench.figures import job as job_of

ROOT = Path(__file__).parent.parent


def _python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_one_command_measures_and_reports(tmp_path: Path) -> None:
    only = "test_ops and fp32 and 64k and backward and not compile and not Into and not Stats"
    args = ("--quick", "--threads", "1", "--results", str(tmp_path), "--note", "quick", "-k", only)
    done = _python("-m", "bench.run", *args, PYTEST_XDIST_WORKER="gw0")  # as in a parallel run of the tests
    assert done.returncode == 0, done.stdout + done.stderr
    kept = record.Run.load(tmp_path)
    measured = {(r.op, job_of(r), r.variant) for r in kept.rows}
    assert ("mul_sin", "backward + c", "eager") in measured
    assert {variant for _, _, variant in measured} == {"retainops", "eager", "copy"}
    assert all(r.seconds > 0 for r in kept.rows)
    assert (kept.metadata["note"], kept.metadata["threads"]) == ("quick", 1)
    assert "backward + c (bytes: 1.20x)" in done.stdout
    assert (tmp_path / report.PICTURE).is_file()


def test_every_case_of_a_run_without_a_gpu_is_found() -> None:
    """Some files have cases for a GPU alone. (A quick run has some of every file.)"""
    done = _python("-m", "pytest", "bench", "--collect-only", "-q", "-p", "no:cacheprovider", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[mul_sin-fp32-64_MiB-forward-retainops]" in done.stdout


def test_without_a_gpu_the_gpu_script_says_so_and_stops(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_gpu_script_goes_on_past_failures_and_names_them(tmp_path: Path) -> None:
    """With an interpreter that only notes what it is asked to run: the tests fail, the check hangs, the rest works."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" | head -n 1 >>{tmp_path}/asked\n'
        'case "$*" in\n'
        '  *"import slug"*) echo nvidia-made-up ;;\n'
        '  *"pytest tests"*) echo "FAILED tests/test_x.py::test_y - wrong"; exit 1 ;;\n'
        "  *sweep*) exit 124 ;;\n"
        "  *bench.run*) echo measured ;;\n"
        "  *bench.report*) echo the table ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    done = subprocess.run(["bash", "bench/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    asked = [line.split()[1] for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("-m")]
    assert asked == ["pytest", "pytest", "bench.run", "bench.attention_time", "bench.report"]
    assert "failed: gpu_tests (status 1) tests (status 1) check (status 124)" in done.stdout
    assert "FAILED tests/test_x.py::test_y" in done.stdout
    assert "the table" in done.stdout
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("gpu-nvidia-made-up-")
    assert {p.name for p in folder.iterdir()} == {
        *("summary.txt", "gpu_tests.log", "tests.log", "check.log", "bench.log", "attention.log")
    }
