"""The benchmark of a model's training step, on a tiny LLaMA: ways agree, and one that fails stops no other."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the model is one of transformers, which is not installed")
pytest.importorskip("rich", reason="the benchmark prints a table by rich, which is not installed")

from bench import model_step, model_ways, turns
from bench.model_ways import EAGER, READ, WAYS, Way

SIZES = {"layers": 2, "hidden": 64, "vocabulary": 128, "tokens": 16, "batch": 2, "rounds": 2, "dtype": "float32"}
TINY = ["--no-compile", *(f"--{name}={value}" for name, value in SIZES.items())]
NOT_COMPILED = [name for name, way in WAYS.items() if not way.compiles]


@pytest.fixture(autouse=True)
def tiny_steps() -> Iterator[None]:
    """One thread: on a busy CPU two wait for each other at each operation. And no search of all garbage each step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def _fails(_model: Any) -> model_ways.Step:
    def step(_tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise RuntimeError("out of luck\nand of words")

    return step


def _run(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    status = model_step.main([*TINY, "--results", str(folder), *more])
    return status, json.loads((folder / "model_step.json").read_text())


def test_every_way_computes_the_same_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {name: WAYS[name] for name in NOT_COMPILED}
    for name in list(WAYS):
        monkeypatch.delitem(WAYS, name)
    first, *rest = ways
    for name, way in {
        first: ways[first],
        "broken": Way("fails", _fails),
        **{name: ways[name] for name in rest},
    }.items():
        monkeypatch.setitem(WAYS, name, way)
    status, kept = _run(tmp_path)
    found = kept["ways"]
    assert status == 0
    assert list(found) == [EAGER, "broken", *rest]
    assert found["broken"]["error"] == "RuntimeError: out of luck"
    assert "broken: RuntimeError: out of luck" in capsys.readouterr().out

    eager = found[EAGER]
    on_gpu = torch.cuda.is_available()
    there = importlib.util.find_spec("liger_kernel") is not None and on_gpu
    for name in ways:
        if name.startswith("Liger") and not there:
            assert found[name]["error"]
            continue
        row = found[name]
        assert "error" not in row, name
        assert row["loss"] == pytest.approx(eager["loss"], rel=1e-5), name
        assert row["gradient_norm"] == pytest.approx(eager["gradient_norm"], rel=1e-4), name
        assert row["differs"] == []
        assert len(row["times"]) == 2
        assert row["seconds"] > 0
        assert row["of_eager"] == pytest.approx(row["seconds"] / eager["seconds"])
        assert (row["peak_bytes"] is not None) == on_gpu
    readers = {name for name in ways if "read_l2" in found[name]}
    assert readers == {"eager, retain_grad", "eager, hooks", "fuse, watched, read"}
    for name in readers:
        assert found[name]["read"] == 2 * len(READ)
        assert found[name]["read_l2"] == pytest.approx(found["eager, hooks"]["read_l2"], rel=1e-4), name
    assert kept["sizes"]["parameters"] == 128 * 64 + 2 * (64 * 64 * 2.5 + 3 * 64 * 256 + 2 * 64) + 64
    assert any("attention" in line for line in kept["fuse"])


def test_a_way_that_computes_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def doubled(model: Any) -> model_ways.Step:
        run = model_ways.by_labels(model)
        return lambda tokens: (run(tokens)[0] * 2, None)

    monkeypatch.setitem(WAYS, "doubled", Way("twice the loss", doubled))
    _, kept = _run(tmp_path, "--only", "doubled")
    assert list(kept["ways"]) == [EAGER, "doubled"]
    (text,) = kept["ways"]["doubled"]["differs"]
    assert text.startswith("loss is ")
    assert f"doubled: {text}" in capsys.readouterr().out


def test_after_its_seconds_no_way_starts(tmp_path: Path) -> None:
    status, kept = _run(tmp_path, "--seconds", "0", "--only", "fuse")
    assert status == 1
    assert {row["error"] for row in kept["ways"].values()} == {"not started: the time given by --seconds was over"}


def test_a_way_leaves_the_model_and_the_modules_of_transformers_as_they_are() -> None:
    from transformers.models.llama import modeling_llama

    sizes = {"layers": 1, "hidden": 64, "vocabulary": 32, "tokens": 8, "dtype": "float32"}
    model = model_ways.llama(sizes, "cpu")
    before = {name: type(module) for name, module in model.named_modules()}
    rope, cross_entropy = modeling_llama.apply_rotary_pos_emb, torch.nn.functional.cross_entropy
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for name in NOT_COMPILED:
        copied = model_ways.sharing(model)
        assert all(p is q for p, q in zip(model.parameters(), copied.parameters(), strict=True))
        try:
            WAYS[name].prepare(copied)(tokens)
        except (ImportError, RuntimeError):  # Liger-Kernel is not installed, or has no GPU
            assert name.startswith("Liger"), name
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert modeling_llama.apply_rotary_pos_emb is rope
        assert torch.nn.functional.cross_entropy is cross_entropy


@pytest.mark.parametrize(("left", "limited"), [(0.5, False), (0.001, True)], ids=["device_busy", "host_slow"])
def test_on_a_gpu_time_is_between_two_events_and_memory_beyond_what_is_there(
    left: float, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a made-up device, whose steps take a second and 3 bytes."""
    ticks = iter(range(1000))
    events = {"record": lambda self: None, "elapsed_time": lambda self, end: 1000.0}
    made_up = {
        "Event": lambda enable_timing: type("Event", (), events)(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 4,
        "max_memory_allocated": lambda: 7,
    }
    for name, value in made_up.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(ticks) * left)
    model = torch.nn.Linear(2, 1)
    steps = turns.Steps(model, torch.ones(3, 2))
    steps.on_gpu = True

    def prepare(copied: torch.nn.Module) -> model_ways.Step:
        def step(x: torch.Tensor) -> tuple[torch.Tensor, None]:
            loss = copied(x).sum()
            loss.backward()
            return loss.detach(), None

        return step

    ran = turns.Turns({EAGER: Way("", prepare)}, model, steps, lambda: False, lambda found: None)
    ran.run([EAGER], rounds=3)
    row = ran.found[EAGER]
    assert row["times"] == [1.0] * 3
    assert (row["seconds"], row["peak_bytes"], row["host_limited"]) == (1.0, 3, limited)


def test_without_a_gpu_or_transformers_there_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_step.main(["--results", str(tmp_path)]) == 2
    assert "there is no GPU" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert model_step.main([*TINY, "--results", str(tmp_path)]) == 2
    assert "transformers, which cannot be imported: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model_step.main(["--hidden", "260"])
    assert "--hidden 260: heads need a multiple of 256" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
