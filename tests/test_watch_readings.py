"""Where the readings of a watched run go, and what a number that is not finite does."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.integrations.jsonl import JsonLines
from retainops.integrations.tensorboard import TensorBoard
from retainops.readings import read
from tests.small_model import D, collect, make, oracle, requests_in, train
from tests.test_integrations import Chain, live_table


def test_json_lines(tmp_path: Path) -> None:
    model, x = make()
    file, stream = tmp_path / "gradients.jsonl", io.StringIO()
    wants = {"*.act": ro.Stats("l2", "nonfinite"), "out": ro.Stats("sum", over="channels")}
    with ro.watch(model, wants, every=2, to=[JsonLines(file), JsonLines(stream)]) as watcher:
        train(model, x, watcher, 3)
        model.layers[1](x).sum().backward()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["point"]) for row in rows] == [
        (step, name) for step in (0, 2) for name in ("layers.0.act", "layers.1.act", "out")
    ]
    assert rows[0]["l2"] == pytest.approx(oracle(model, x)["layers.0.act"].norm().item())
    assert (rows[0]["nonfinite"], rows[2]["sum"]) == (0, [4.0] * D)
    assert stream.getvalue() == file.read_text()
    with pytest.raises(FileNotFoundError, match="JsonLines: the folder of '.*x.jsonl' is not there; make it"):
        JsonLines(tmp_path / "nowhere" / "x.jsonl")
    with pytest.raises(IsADirectoryError, match="JsonLines: '.*' is a folder; give the path of a file in it"):
        JsonLines(tmp_path)
    with pytest.raises(TypeError, match="JsonLines: file is NoneType; expected a path or an open text file"):
        JsonLines(None)
    with JsonLines(file) as lines:  # as with the other sinks
        assert callable(lines)


def test_json_lines_go_to_one_file_wherever_the_run_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = JsonLines("gradients.jsonl")
    for step, folder in enumerate((".", "elsewhere")):
        monkeypatch.chdir(folder)
        lines(step, {"a": {"l2": 1.0}})
    assert len((tmp_path / "gradients.jsonl").read_text().splitlines()) == 2


def test_json_lines_of_what_json_has_no_number_for() -> None:
    stream = io.StringIO()
    JsonLines(stream)(
        7, {"a": {"l2": float("nan"), "sum": -float("inf")}, "b": {"sum": torch.tensor([1, torch.inf])}, "c": {}}
    )
    assert [json.loads(line, parse_constant=pytest.fail) for line in stream.getvalue().splitlines()] == [
        {"step": 7, "point": "a", "l2": "nan", "sum": "-inf"},
        {"step": 7, "point": "b", "sum": [1.0, "inf"]},
    ]


def test_tensorboard_and_the_live_table() -> None:
    scalars: dict[tuple[str, int], float] = {}

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            scalars[tag, step] = value

    model, x = make()
    table, out = live_table(terminal=False)
    with table, ro.watch(model, "*.act", every=2, to=(TensorBoard(Writer()), table)) as watcher:
        train(model, x, watcher, 3)
    l2 = oracle(model, x)["layers.0.act"].norm().item()
    assert {step for _, step in scalars} == {0, 2}
    assert scalars["gradients/layers.0.act/l2", 2] == pytest.approx(l2)
    assert "step 2" in out.getvalue()
    assert f"{l2:.3g}" in out.getvalue()
    for folder in ("runs/1", Path("runs/1")):
        with pytest.raises(TypeError, match=r"is 'runs/1'; expected a .*: TensorBoard\(SummaryWriter\('runs/1'\)\)"):
            TensorBoard(folder)
    with pytest.raises(TypeError, match=r"TensorBoard: writer is type; expected a .*\(SummaryWriter\(\)\)"):
        TensorBoard(int)


def test_a_sink_that_fails_is_heard_and_leaves_the_model_alone() -> None:
    model, x = make()
    with pytest.raises(ZeroDivisionError), ro.watch(model, to=lambda step, _: 1 / step) as watcher:
        train(model, x, watcher, 1)
    assert not requests_in(model)


def test_the_l2_of_a_complex_gradient() -> None:
    x, kept = torch.ones(4, dtype=torch.complex64, requires_grad=True), ro.Retained("c")
    ro.point(x, "c", retain=kept).backward(torch.full((4,), 3 + 4j))
    assert read(kept) == {"c": {"l2": 10.0}}


def test_gradients_kept_whole_are_there_for_the_sinks_and_gone_after() -> None:
    model, x = make()
    seen = []
    with ro.watch(
        model, "out", ro.Stats("l2", grad=True), to=lambda *_: seen.append(watcher.kept["out"].grad)
    ) as watcher:
        train(model, x, watcher, 1)
        assert watcher.kept["out"].grad is None
    torch.testing.assert_close(seen[0], torch.ones(4, D))


@pytest.mark.parametrize(("after", "bad"), [(3, float("nan")), (1, float("inf"))])
def test_the_first_point_that_is_not_finite_stops_the_run(after: int, bad: float) -> None:
    model, x = Chain(bad, after), torch.ones(2, 3, requires_grad=True)
    first = {3: "p3", 1: "p1.c"}[after]
    steps, sink = collect()
    with ro.watch(model, every=2, to=sink, start=4) as watcher:
        model(x).sum().backward()
        with pytest.raises(ro.NonFiniteGradient) as caught:
            watcher.step()
        assert not requests_in(model)
        watcher.step()  # who goes on all the same, goes on in the next step
        assert (watcher.number, watcher.asking) == (6, True)
    error = caught.value
    assert (error.point, error.step, error.readings) == (first, 4, steps[0][1])
    others = {3: "3 points after it have", 1: "1 point after it has"}[after]
    before = {3: "p4", 1: "p2"}[after]
    assert str(error) == (
        f"watch: step 4: the gradient of '{first}' has 1 element that is inf or nan; "
        f"that of '{before}', right before it in backward, is finite; {others} some too"
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.point, again.step) == (str(error), first, 4)


def test_or_only_says_so() -> None:
    model, x = Chain(float("nan"), 4), torch.ones(2, 3, requires_grad=True)
    message = "watch: step 0: the gradient of 'p4' has 1 element that is inf or nan; nothing before it in backward is "
    message += "watched: the loss, or the weights, may be inf or nan already; 4 points after it have some too"
    for how in ("warn", "ignore"):
        with ro.watch(model, every=1, on_nonfinite=how) as watcher, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(x).sum().backward()
            watcher.step()
        assert [str(w.message) for w in seen] == ([message] if how == "warn" else [])
        assert watcher.latest[1]["p0"]["nonfinite"] == 1


def test_points_without_the_statistic_are_not_judged() -> None:
    model, x = Chain(float("nan"), 4), torch.ones(2, 3, requires_grad=True)
    wants = {"p*": ro.Stats("l2"), "p0": ro.Stats("nonfinite", over="channels")}
    with ro.watch(model, wants) as watcher:
        model(x).sum().backward()
        with pytest.raises(ro.NonFiniteGradient, match="'p0' has 1 element"):
            watcher.step()


def test_all_is_read_in_one_transfer_and_nothing_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make()
    transfers = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t.shape) or cpu(t))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, only_when(transfers, name, getattr(torch.Tensor, name)))
    with ro.watch(model, stats=ro.Stats("l2", "amax", "nonfinite", "hist"), every=2) as watcher:
        for i in range(3):
            train(model, x, watcher, 1)
            assert transfers == ([(5 * (3 + 256),)] if i % 2 == 0 else [])
            transfers.clear()


def only_when(transfers: list[Any], name: str, f: Callable) -> Callable:
    def call(t: torch.Tensor) -> Any:
        assert transfers, f"{name} before the transfer"
        return f(t)

    return call
