"""The benchmarks' own parts: what is timed is right, how it is timed is honest, and what is reported follows from it.

No test here asserts a time that was measured.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import cases as bench_cases
from bench import forecast, picture, record, report
from bench.cases import Case, Job, Size, cases, jobs
from bench.figures import Figures
from bench.figures import job as job_of
from bench.timing import Clock, DeviceStopwatch, HostStopwatch, Pace, plan, prepare, rotation
from retainops.registry import find, ops

ROOT = Path(__file__).parent.parent
MUL_SIN = find("mul_sin")
SMALL = Size("tiny", "bandwidth", 3, 8)


# Timing


class MadeUpGpu:
    """A device with a clock of its own: it runs what is queued in order, while the host goes on."""

    def __init__(self, host: float, device: float) -> None:
        self.host, self.device = host, device
        self.now = self.free_at = 0.0

    def call(self) -> None:
        """One launch: `host` seconds to queue, `device` seconds to run."""
        self.now += self.host
        self._queue(self.device)

    def _queue(self, seconds: float) -> float:
        self.free_at = max(self.free_at, self.now) + seconds
        return self.free_at

    def _sleep(self, cycles: int) -> None:
        self._queue(cycles / 2e9)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def Event(self, enable_timing: bool) -> "MadeUpEvent":
        assert enable_timing
        return MadeUpEvent(self)


class MadeUpEvent:
    def __init__(self, gpu: MadeUpGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu._queue(0)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end: "MadeUpEvent") -> float:
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize("guess", [50e-6, 1e-6], ids=["guessed_right", "guessed_too_low"])
def test_the_device_stopwatch_leaves_a_slow_host_out(guess: float) -> None:
    gpu = MadeUpGpu(host=50e-6, device=5e-6)
    stopwatch = DeviceStopwatch(gpu, host_seconds=guess)
    assert stopwatch.seconds(rotation([gpu.call]), 100) == pytest.approx(5e-6)
    assert not stopwatch.host_limited


def test_the_device_stopwatch_says_when_it_could_not_leave_the_host_out() -> None:
    gpu = MadeUpGpu(host=10e-3, device=5e-6)  # 100 calls take a second to queue: longer than the longest spin
    stopwatch = DeviceStopwatch(gpu, host_seconds=10e-3)
    assert stopwatch.seconds(rotation([gpu.call]), 100) > 5e-6
    assert stopwatch.host_limited


@pytest.mark.parametrize(("bandwidth", "expected"), [(True, 5e-6), (False, 50e-6)], ids=["bandwidth", "cost_of_a_call"])
def test_on_a_gpu_bandwidth_is_the_devices_time_and_the_cost_of_a_call_the_hosts(
    bandwidth: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = MadeUpGpu(host=50e-6, device=5e-6)
    monkeypatch.setattr(HostStopwatch.__init__, "__defaults__", (lambda: None, lambda: gpu.now))
    stopwatch, calls, rounds = prepare(batch := rotation([gpu.call]), 2, gpu, bandwidth, quick=False)
    assert 15 <= calls <= 100
    assert rounds >= 5
    assert stopwatch.seconds(batch, calls) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("host", "device", "expected"), [(1e-6, 10e-6, 10e-6), (10e-6, 1e-6, 10e-6)])
def test_the_host_stopwatch_waits_for_the_device(host: float, device: float, expected: float) -> None:
    gpu = MadeUpGpu(host, device)
    gpu._queue(1.0)  # left over from before: none of this batch's
    stopwatch = HostStopwatch(gpu.synchronize, clock=lambda: gpu.now)
    assert stopwatch.seconds(rotation([gpu.call]), 1000) == pytest.approx(expected, rel=0.01)


def test_a_rotation_goes_on_from_batch_to_batch_and_holds_as_many_results_as_it_has_calls() -> None:
    freed: list[int] = []

    class Result:
        def __init__(self, n: int) -> None:
            self.n = n

        def __del__(self) -> None:
            freed.append(self.n)

    made: list[int] = []

    def call(n: int) -> Result:
        made.append(n)
        return Result(n)

    batch = rotation([partial(call, n) for n in range(3)])
    batch(2)
    batch(3)
    assert made == [0, 1, 2, 0, 1]
    assert freed == [0, 1]


def test_a_plan_fills_the_time_within_its_bounds() -> None:
    pace = Pace(batch=1.0, case=10.0, rounds=(3, 8), calls=50)
    assert plan(0.1, pace) == (10, 8)
    assert plan(0.25, pace) == (4, 8)
    assert plan(2.0, pace) == (1, 5)
    assert plan(100.0, pace) == (1, 3)
    assert plan(1e-6, pace) == (50, 8)


def test_the_clock_moves_only_as_told() -> None:
    clock = Clock()
    before = clock()
    assert clock() == before
    clock.advance(0.5)
    assert clock() - before == 0.5


# What is timed


def _leaves(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    return [x.requires_grad_() for x in case.inputs(device)]


@pytest.fixture
def fixed_dy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "random_like", lambda t: torch.full_like(t, 0.5))


@pytest.mark.usefixtures("fixed_dy")
@pytest.mark.parametrize("job", jobs(MUL_SIN), ids=str)
@pytest.mark.parametrize("variant", ["retainops", "eager"])
def test_what_is_timed_is_right_at_every_call(job: Job, variant: str, path: Any) -> None:
    """A call that adds to the last one's gradient, or leaves one out, moves other bytes than it says."""
    if variant == "eager" and job.form == "Into":
        assert not any(c.job == job and c.variant == variant for c in cases(MUL_SIN, "cpu"))
        return
    case = Case(MUL_SIN, "fp32", SMALL, job, variant)
    a, b = inputs = _leaves(case, path.device)
    c = (a * b).detach()
    dc = 0.5 * c.cos()
    call = case.build()(inputs)
    for _ in range(3):
        got = call()
        if job.direction == "forward":
            torch.testing.assert_close(got, c.sin())
            assert got.requires_grad
            continue
        torch.testing.assert_close(got[:2], (dc * b, dc * a))
        if job.form == "Stats":
            l2, amax = got[-2:] if variant == "eager" else (got[-1].l2, got[-1].amax)
            torch.testing.assert_close((l2, amax), (dc.norm(), dc.abs().amax()))
        elif job.point:
            torch.testing.assert_close(got[-1], dc)
        else:
            assert len(got) == 2


@pytest.mark.parametrize("job", jobs(MUL_SIN, "host"), ids=str)
@pytest.mark.parametrize("variant", ["retainops", "eager"])
def test_a_step_is_right_at_every_call(job: Job, variant: str, path: Any) -> None:
    case = Case(MUL_SIN, "fp32", SMALL, job, variant)
    a, b = inputs = _leaves(case, path.device)
    dc = (a * b).detach().cos()
    call = case.build()(inputs)
    for _ in range(3):
        torch.testing.assert_close(call(), (dc * b, dc * a, *([dc] if job.point else [])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, when the compiler is first imported
@pytest.mark.usefixtures("fixed_dy")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_compiled_variant_can_be_called_again_and_again(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and partitioned as for Inductor, without its C++ compiler."""
    bench_cases._compile.cache_clear()
    monkeypatch.setattr(bench_cases.torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = Case(MUL_SIN, "fp32", SMALL, Job(direction), "torch.compile")
    a, b = inputs = _leaves(case)
    call = case.build()(inputs)
    first, second = call(), call()
    torch.testing.assert_close(first, second)
    expected = (a * b).sin() if direction == "forward" else (0.5 * (a * b).cos() * b, 0.5 * (a * b).cos() * a)
    torch.testing.assert_close(first, expected)


def test_a_copy_moves_the_jobs_fewest_bytes() -> None:
    for job, tensors in ((Job("forward"), 3), (Job("backward"), 5), (Job("backward", "c"), 6)):
        case = Case(MUL_SIN, "bf16", SMALL, job, "copy")
        inputs = case.inputs("cpu")
        copied = case.build()(inputs)()
        assert job.fewest_bytes(MUL_SIN, inputs) == tensors * 24 * 2
        assert 2 * copied.numel() * copied.element_size() == tensors * 24 * 2


def test_a_peer_in_the_table_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        bench_cases.PEERS, "mul_sin", {"Peer": lambda: lambda a, b: torch.sin(a * b), "Absent": lambda: None}
    )
    assert "Absent" not in {c.variant for c in cases(MUL_SIN, "cuda")}
    found = [c for c in cases(MUL_SIN, "cuda") if c.variant == "Peer"]
    assert {str(c.job) for c in found} == {"forward", "backward", "step"}
    case = replace(found[0], size=SMALL)
    torch.testing.assert_close(case.build()(inputs := case.inputs("cpu"))(), (inputs[0] * inputs[1]).sin())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", list(ops()), ids=lambda op: op.name)
def test_every_op_is_measured_in_every_job(op: bench_cases.Op, device: str) -> None:
    found = {(c.dtype, c.size.kind, str(c.job)) for c in cases(op, device) if c.variant == "retainops"}
    for dtype in ("fp32", "bf16"):
        assert {job for d, kind, job in found if (d, kind) == (dtype, "bandwidth")} == set(map(str, jobs(op)))
    thorough = op.name in bench_cases.THOROUGHLY
    assert {job for _, kind, job in found if kind == "host"} == set(map(str, jobs(op, "host") if thorough else ()))
    names = [str(c) for c in cases(op, device)]
    assert len(set(names)) == len(names)


def test_the_path_that_ran_is_named(path: Any) -> None:
    case = Case(MUL_SIN, "fp32", SMALL, Job("forward"), "retainops")
    assert case.path(case.inputs(path.device)) == ("reference" if path.name == "reference" else "Triton kernels")


def test_the_roofline_model_is_asked_about_each_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="without triton there are no kernels to predict for")
    from retainops.testing import roofline

    asked: list[list[str]] = []

    def predict(*args: Any, **kwargs: Any) -> roofline.Prediction:
        found = real(*args, **kwargs)
        asked.append([launch.name for launch in found.launches])
        return found

    real = roofline.predict
    monkeypatch.setattr(roofline, "predict", predict)
    monkeypatch.setattr(forecast, "TENSOR_BYTES", 2**20)
    monkeypatch.delitem(forecast.DTYPES, "bf16")
    found = list(forecast.forecasts([MUL_SIN]))
    assert [job_of(f) for f in found] == ["forward", "backward", "backward + c", "backward + c Stats"]
    assert [kernels[0] for kernels in asked] == ["mul_sin_fwd_kernel", *3 * ["mul_sin_bwd_kernel"]]
    assert [len(kernels) for kernels in asked[:3]] == [1, 1, 1]
    assert [f.bytes for f in found] == [n * 2**20 for n in (3, 5, 6, 5)]
    assert found[0].seconds < found[1].seconds < found[2].seconds


# What is reported


def _row(job: Job, variant: str, seconds: float, size: str = "64 MiB", kind: str = "bandwidth") -> record.Row:
    moved = {"forward": 3, "backward": 5}[job.direction] + (1 if job.point and job.form != "Stats" else 0)
    return record.Row(
        op="mul_sin",
        label="",
        dtype="fp32",
        size=size,
        kind=kind,
        elements=2**24,
        direction=job.direction,
        point=job.point,
        form=job.form,
        variant=variant,
        path="Triton kernels" if variant == "retainops" else variant,
        bytes=moved * 2**26,
        seconds=seconds,
        q1=seconds,
        median=seconds,
        q3=seconds,
        rounds=9,
        calls=10,
        sets=2,
    )


@pytest.fixture
def run() -> record.Run:
    forward, backward, kept = Job("forward"), Job("backward"), Job("backward", "c")
    into, stats = Job("backward", "c", "Into"), Job("backward", "c", "Stats")
    rows = [
        *(_row(forward, variant, s) for variant, s in (("retainops", 60e-6), ("eager", 100e-6), ("copy", 50e-6))),
        *(_row(backward, variant, s) for variant, s in (("retainops", 100e-6), ("eager", 200e-6), ("copy", 80e-6))),
        *(_row(kept, variant, s) for variant, s in (("retainops", 118e-6), ("eager", 250e-6), ("copy", 96e-6))),
        _row(into, "retainops", 128e-6),
        _row(stats, "retainops", 102e-6),
        _row(forward, "retainops", 12e-6, "1k", "host"),
    ]
    forecasts = [
        record.Forecast("mul_sin", "fp32", 2**24, "backward", None, "", "H200", 5 * 2**26, 80e-6, "memory"),
        record.Forecast("mul_sin", "fp32", 2**24, "backward", "c", "", "H200", 6 * 2**26, 96e-6, "memory"),
    ]
    return record.Run(record.metadata("a remark"), rows, forecasts)


def _line(text: str, *words: str) -> str:
    """The one line that holds all the words."""
    (line,) = (line for line in text.splitlines() if all(word in line for word in words))
    return line


def test_figures(run: record.Run) -> None:
    figures = Figures(run.rows)
    by = {(job_of(r), r.variant, r.size): r for r in run.rows}
    kept = by["backward + c", "retainops", "64 MiB"]
    assert figures.of_copy(kept) == pytest.approx(96 / 118)
    assert figures.kept_ratio(kept) == pytest.approx((1.18, 1.2))
    into = by["backward + c Into", "retainops", "64 MiB"]
    assert figures.of_copy(into) == pytest.approx(96 / 128)
    assert figures.kept_ratio(into) == pytest.approx((1.28, 1.2))
    stats = by["backward + c Stats", "retainops", "64 MiB"]
    assert figures.of_copy(stats) == pytest.approx(80 / 102)
    assert figures.kept_ratio(stats) == pytest.approx((1.02, 1.0))
    eager = by["backward + c", "eager", "64 MiB"]
    assert figures.kept_ratio(eager) == pytest.approx((1.25, 1.2))
    assert figures.kept_ratio(by["backward", "eager", "64 MiB"]) is None
    assert figures.of_copy(by["forward", "retainops", "1k"]) is None


def test_the_markdown_says_what_was_measured_and_what_was_not(run: record.Run) -> None:
    text = report.markdown(run)
    ours = _line(text, "| fp32 64 MiB | retainops |")
    assert "60.0 µs, 3.36 TB/s, 83%" in ours
    assert "118 µs, 3.41 TB/s, 81%, 1.18x" in ours
    assert "128 µs, 3.15 TB/s, 75%, 1.28x" in ours
    assert _line(text, "| fp32 64 MiB | device copy |").count("%") == 0
    assert "102 µs, 3.29 TB/s, 78%, 1.02x" in ours
    assert "backward + c (bytes: 1.20x)" in text
    assert "backward + c Stats (bytes: 1.00x)" in text
    assert "12.0 µs" in _line(text, "| fp32 1k |")
    assert "backward + c | 96.0 µs | 4.19 TB/s | memory | 1.20x" in text.split("PREDICTED for one H200")[1]
    assert "not measured" in _line(text, "PREDICTED")
    assert "a remark" in text
    assert run.metadata["versions"]["torch"] in text


def test_on_the_gpu_that_was_predicted_for_the_measured_time_stands_beside(run: record.Run) -> None:
    run.metadata["device"] = "another one"
    assert "| measured |" not in report.markdown(run)
    run.metadata["device"] = "NVIDIA H200"
    text = report.markdown(run).split("PREDICTED for one H200")[1]
    assert "| measured |" in text
    assert "118 µs, 1.23x" in _line(text, "backward + c", "96.0 µs")


def test_a_host_that_may_have_been_too_slow_is_marked(run: record.Run) -> None:
    assert "*" not in report.markdown(run).replace("**", "")
    run.rows[0] = replace(run.rows[0], host_limited=True)
    text = report.markdown(run)
    assert "60.0 µs*" in _line(text, "| fp32 64 MiB | retainops |")
    assert "* the host may have been slower" in text


def test_the_picture_shows_the_fractions(run: record.Run) -> None:
    fig = picture.figure(run)
    widths = [[round(bar.get_width(), 3) for bar in ax.containers[0]] for ax in fig.axes]
    assert widths == [[0.833, 0.5], [0.8, 0.4], [0.814, 0.75, 0.784, 0.384]]
    labels = [[t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes]
    assert labels[2] == ["retainops", "retainops Into", "retainops Stats(l2, amax)", "eager retain_grad()"]
    assert "1.18x" in {t.get_text() for t in fig.axes[2].texts}


@pytest.mark.parametrize("kept", [0, 1, 3, 10], ids=lambda n: f"{n}_rows")
def test_what_a_cut_short_run_left_can_be_reported(run: record.Run, kept: int, tmp_path: Path) -> None:
    run = replace(run, rows=run.rows[:kept])
    for written in report.write(run, tmp_path):
        assert written.stat().st_size > 0
    assert len(picture.figure(run).axes) == 3


def test_a_run_is_what_it_was_after_a_save(run: record.Run, tmp_path: Path) -> None:
    run.save(tmp_path)
    assert record.Run.load(tmp_path) == run
    assert record.Run.load(tmp_path / record.FILE) == run


def test_a_case_that_an_interrupt_cut_short_is_left_out() -> None:
    assert record.rows([{"extra_info": {"op": "mul_sin"}, "stats": {}}]) == []


@pytest.mark.parametrize(("on_gpu", "seconds", "said"), [(True, 3.0, "Medians"), (False, 1.0, "fastest round")])
def test_a_gpus_median_and_a_cpus_fastest_round_count(
    on_gpu: bool, seconds: float, said: str, run: record.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = {k: v for k, v in vars(run.rows[0]).items() if k not in ("seconds", "q1", "median", "q3", "rounds")}
    stats = {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0, "max": 9.0, "rounds": 5}
    monkeypatch.setattr(record, "statistic", lambda: "median" if on_gpu else "fastest")
    (row,) = record.rows([{"extra_info": what, "stats": stats}])
    assert (row.seconds, row.q1, row.median, row.q3, row.rounds) == (seconds, 2.0, 3.0, 4.0, 5)
    run.metadata["statistic"] = record.statistic()
    assert said in report.markdown(run)


def test_where_there_are_no_results_the_remedy_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "python -m bench.run" in capsys.readouterr().err


def test_several_devices_are_reported_one_after_the_other(
    run: record.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cpu-x", "nvidia-y"):
        run.save(tmp_path / "results" / name)
    assert report.main([str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert written == [f"{name}/results.{end}" for name in ("cpu-x", "nvidia-y") for end in ("md", "png")]
    assert capsys.readouterr().out.count("PREDICTED") == 2


def test_results_that_cannot_be_written_to_are_still_shown(
    run: record.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(tmp_path)

    def refuse(*_: object) -> list[Path]:
        raise OSError(30, "Read-only file system", "results.md")

    monkeypatch.setattr(report, "write", refuse)
    assert report.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "118 µs" in out
    assert "--out" in out


def test_the_results_in_the_repository_can_be_read() -> None:
    for folder in report.find(report.RESULTS):
        kept = record.Run.load(folder)
        assert kept.rows
        assert (folder / record.FILE).stat().st_size < 500_000
        assert "µs" in report.markdown(kept)


# The commands


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
