"""The commands that measure, each in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import record, report, sanitize
from bench.figures import job as job_of
from retainops.registry import find
from tests.conftest import Path as Way

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


@pytest.mark.parametrize("op", ["mul_sin", "swiglu_packed", "rms_norm", "rope"])
def test_what_the_sanitizer_is_to_watch_runs_on_the_kernels(
    op: str, kernels: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "SHAPES", {"elementwise": [(3, 38)], "row": [(3, 38)]})
    calls = list(sanitize.exercise(find(op), kernels.device))
    assert len(calls) == len(sanitize.DTYPES) * (1 + len(sanitize.WANTS))


SAID = """========= COMPUTE-SANITIZER
sanitize: mul_sin
sanitize: ran mul_sin, 30 calls
sanitize: softmax
========= Invalid __global__ read of size 4 bytes
=========     at softmax_fwd_kernel+0x1d0 in softmax.py:41
=========     by thread (33,0,0) in block (1,0,0)
sanitize: ran softmax, 30 calls
sanitize: rms_norm
========= Error: Race reported between Write access at 0x70 and Read access at 0xc0 [96 hazards]
sanitize: ran rms_norm, 30 calls
sanitize: rope
Traceback (most recent call last):
RuntimeError: CUDA error
========= ERROR SUMMARY: 2 errors
"""


def test_what_the_sanitizer_said_is_put_down_to_ops() -> None:
    found = sanitize.verdicts(SAID, ["mul_sin", "softmax", "rms_norm", "rope", "glu"])
    assert found.pop("rope").startswith("stopped: Traceback (most recent call last):\nRuntimeError: CUDA error\n")
    assert found == {
        "mul_sin": "clean",
        "softmax": "Invalid __global__ read of size 4 bytes",
        "rms_norm": "Error: Race reported between Write access at 0x70 and Read access at 0xc0 [96 hazards]",
        "glu": "not reached",
    }
    late = "sanitize: glu\nsanitize: ran glu, 30 calls\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors)\n"
    assert sanitize.verdicts(late, ["glu"]) == {"glu": "RACECHECK SUMMARY: 3 hazard among these"}
    fine = late.replace("3 hazards", "0 hazards").replace("3 errors", "0 errors")
    assert sanitize.verdicts(fine, ["glu"]) == {"glu": "clean"}
    assert sanitize.verdicts(fine.replace("30 calls", "0 calls"), ["glu"]) == {"glu": "no kernel ran"}


def test_the_sanitizers_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With a compute-sanitizer that runs what it is given and finds nothing, or one that stops."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/usr/bin/env bash\nfor op in "${@:10}"; do echo "sanitize: $op"; echo "sanitize: ran $op, 1 calls"; done\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert sanitize.main(["--ops", "mul_sin", "rope", "--jobs", "2"]) == 0
    assert "4 of 4 clean" in capsys.readouterr().out
    tool.write_text("#!/usr/bin/env bash\nexit 1\n")
    assert sanitize.main(["--ops", "mul_sin", "--tool", "racecheck"]) == 1
    assert "not reached" in capsys.readouterr().out
    tool.write_text('#!/usr/bin/env bash\necho "sanitize: mul_sin"\nexec sleep 20\n')
    assert sanitize.main(["--ops", "mul_sin", "--tool", "memcheck", "--seconds", "0.5"]) == 1
    assert "memcheck mul_sin: stopped" in capsys.readouterr().out


def test_without_a_gpu_the_sanitizer_says_so() -> None:
    done = _python("-m", "bench.sanitize", "--ops", "mul_sin", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "PyTorch sees no GPU here; --run runs the ops without it" in done.stderr
    done = _python("-m", "bench.sanitize", "--ops", "mul_sine")
    assert done.returncode == 2
    assert "did you mean 'mul_sin'" in done.stderr


def test_the_gpu_script_does_the_steps_that_it_is_given(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$*" | head -n 1 >>{tmp_path}/asked\n'
        'case "$*" in *"import slug"*) echo made-up ;; esac\n'
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out")}

    def gpu(*steps: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "bench/gpu.sh", *steps], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )

    done = gpu("sanitize", "attention")
    assert done.returncode == 0, done.stderr
    asked = [line.split()[1] for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("-m")]
    assert asked == ["bench.attention_time", "bench.sanitize"]
    (tmp_path / "asked").unlink()
    wrong = gpu("tests", "benches")
    assert wrong.returncode == 2
    assert re.search(
        "there is no step 'benches'; there are: gpu_tests tests check bench attention .*sanitize", wrong.stderr
    )
    assert not (tmp_path / "asked").exists()
