"""What is reported of a run of the benchmarks follows from its rows."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import picture, record, report
from bench import run as command
from bench.figures import Figures
from bench.figures import job as job_of
from bench.jobs import Job


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


def test_the_ops_that_were_measured_are_predicted(
    run: record.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others: to compile for all of them takes minutes, and attention by itself launches no kernel."""
    run.save(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(command, "HAS_TRITON", True)
    monkeypatch.setattr(command, "_pytest", lambda path, *_: path.write_text((tmp_path / record.FILE).read_text()) * 0)
    monkeypatch.setattr(command, "forecasts", lambda ops: asked.extend(op.name for op in ops) or run.forecasts)
    monkeypatch.setattr(report, "main", lambda _: 0)
    assert command.main(["--results", str(tmp_path / "out")]) == 0
    assert asked == ["mul_sin"]
    assert record.Run.load(tmp_path / "out").forecasts == run.forecasts


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
