"""Results in bench/results/ are committed: only a run as it comes takes their place."""

import json
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks are an extra: pip install retainops[bench]")
pytest.importorskip("rich", reason="the report needs rich: pip install retainops[bench]")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install retainops[bench]")

from bench import attention_memory, compiled, model_step, record, report, watch
from bench import run as command


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A clone's results of this device, and the folder for temporary files."""
    kept, temporary = tmp_path / "clone" / "bench" / "results" / record.slug(), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path / "clone")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return kept, temporary


@pytest.mark.parametrize(
    "given", [[], ["--note", "x", "--threads", "1"], ["--quick"], ["-k", "mul_sin"], ["--seconds", "5"]], ids=" ".join
)
def test_a_quick_run_and_a_selection_go_to_a_folder_of_their_own(
    given: list[str], places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, temporary = places
    measured = json.dumps(record.Run(record.metadata(), []).as_dict())
    monkeypatch.setattr(command, "HAS_TRITON", False)
    monkeypatch.setattr(report, "main", lambda _: 0)
    monkeypatch.setattr(command, "_pytest", lambda path, *_: path.write_text(measured) * 0)
    assert command.main(given) == 0
    whole = given[:1] in ([], ["--note"])
    assert (kept / record.FILE).is_file() == whole
    assert len(list(temporary.glob("retainops-bench-*"))) == (0 if whole else 1)
    folder = kept if whole else next(temporary.glob("retainops-bench-*"))
    assert f"results go to {folder}\n" in capsys.readouterr().out
    assert command.main([*given, "--results", str(temporary / "mine")]) == 0
    assert (temporary / "mine" / record.FILE).is_file()


def test_the_sizes_of_compiled_are_numbers_above_none_and_say_where_results_go(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, temporary = places
    names = list(compiled.variants())
    monkeypatch.setattr(compiled, "measure", lambda rows, rounds: dict.fromkeys(names, 1.0))
    for wrong in (["--rows", "0"], ["--rounds", "0"], ["--rows", "many"]):
        with pytest.raises(SystemExit) as stopped:
            compiled.main(wrong)
        assert stopped.value.code == 2
        assert f"argument {wrong[0]}: {wrong[1]}: expected a whole number, 1 or more" in capsys.readouterr().err
    compiled.main(["--rows", "512", "--rounds", "3"])
    (folder,) = temporary.glob("retainops-bench-*")
    assert f"results go to {folder}\n" in capsys.readouterr().out
    assert json.loads((folder / "compiled.json").read_text())["rows"] == 512
    assert not kept.exists()
    compiled.main(["--rows", "512", "--results", str(temporary / "mine")])
    assert (temporary / "mine" / "compiled.json").is_file()
    compiled.main([])
    assert json.loads((kept / "compiled.json").read_text())["rows"] == 4096


@pytest.mark.parametrize("module", [watch, attention_memory], ids=lambda module: module.__name__.rpartition(".")[2])
def test_other_sizes_of_other_commands_go_to_a_folder_of_their_own(
    module: object, places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, temporary = places
    if module is watch:
        names = (watch.BASE, watch.BETWEEN, watch.OFF, watch.ADDED, watch.READ, watch.READ_MORE)
        monkeypatch.setattr(watch, "measure", lambda *_: {name: [1.0, 1.0] for name in names})
        watch.main(["--tokens", "64"])
    else:
        monkeypatch.setattr(attention_memory, "fits", lambda *_: False)
        monkeypatch.setattr(attention_memory, "table", lambda *_: "")
        monkeypatch.setattr(attention_memory, "draw", lambda *_: None)
        attention_memory.main(["--tokens", "64"])
    (folder,) = temporary.glob("retainops-bench-*")
    assert list(folder.glob("*.json"))
    assert not kept.exists()


def test_a_models_options_say_whether_it_is_the_run_as_it_comes() -> None:
    assert model_step.options_of(["--results", "mine"]).whole
    assert not model_step.options_of(["--no-compile"]).whole
