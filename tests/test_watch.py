"""Watching a training run: which steps are read, where readings go, and what stops it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import retainops as ro
from retainops.integrations.jsonl import JsonLines
from retainops.integrations.tensorboard import TensorBoard
from retainops.readings import Readings
from tests.small_model import ALL, IN_BLOCKS, D, Model, make, oracle, requests_in
from tests.test_integrations import Chain, live_table

Steps = list[tuple[int, Readings]]


def collect() -> tuple[Steps, Callable[[int, Readings], None]]:
    steps: Steps = []
    return steps, lambda step, readings: steps.append((step, readings))


def train(model: nn.Module, x: torch.Tensor, watcher: ro.Watcher, steps: int, scale: float = 1.0) -> None:
    for _ in range(steps):
        (model(x).sum() * scale).backward()
        model.zero_grad()
        watcher.step()


def assert_read(readings: Readings, expected: dict[str, torch.Tensor], names: list[str]) -> None:
    assert list(readings) == names
    for name in names:
        assert readings[name]["l2"] == pytest.approx(expected[name].norm().item(), rel=1e-5)
        assert readings[name]["nonfinite"] == 0
        assert isinstance(readings[name]["nonfinite"], int)


# Which steps


def test_every_third_step_is_read_and_the_model_is_asked_in_no_other() -> None:
    model, x = make()
    steps, sink = collect()
    asked = []
    with ro.watch(model, every=3, to=sink) as watcher:
        for i in range(8):
            asked.append((watcher.number, watcher.asking, bool(requests_in(model))))
            assert watcher.number == i
            train(model, x, watcher, 1, scale=i + 1.0)
    assert asked == [(i, i % 3 == 0, i % 3 == 0) for i in range(8)]
    assert [step for step, _ in steps] == [0, 3, 6]
    for step, readings in steps:
        assert_read(readings, oracle(model, x, scale=step + 1.0), ALL)
    assert watcher.latest == steps[-1]
    assert not requests_in(model)


@pytest.mark.parametrize(("start", "read"), [(0, [0, 5, 10]), (3, [5, 10]), (5, [5, 10])])
def test_a_run_that_goes_on_keeps_its_numbers(start: int, read: list[int]) -> None:
    model, x = make()
    steps, sink = collect()
    with ro.watch(model, every=5, to=sink, start=start) as watcher:
        train(model, x, watcher, 12 - start)
    assert [step for step, _ in steps] == read


def test_patterns_and_stats_are_those_of_retain() -> None:
    model, x = make()
    wants = {"layers.*": ro.Stats("amax"), "out": ro.Stats("mean", "l2", over="channels")}
    with ro.watch(model, wants) as watcher:
        train(model, x, watcher, 1)
    _, readings = watcher.latest
    expected = oracle(model, x)
    assert list(readings) == ALL
    for name in IN_BLOCKS:
        assert readings[name] == {"amax": pytest.approx(expected[name].abs().max().item())}
    torch.testing.assert_close(readings["out"]["l2"], expected["out"].norm(dim=0))
    with ro.watch(model, "*.act", ro.Stats("l2")) as watcher:
        train(model, x, watcher, 1)
    assert list(watcher.latest[1]) == ["layers.0.act", "layers.1.act"]


def test_gradients_are_bitwise_those_of_a_run_without_a_watcher() -> None:
    grads = []
    for watched in (True, False):
        model, x = make()
        watcher = ro.watch(model, every=2) if watched else None
        for _ in range(3):
            model(x).sum().backward()
            if watcher is not None:
                watcher.step()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_step_that_is_not_read_runs_the_same_operations() -> None:
    """Off-steps cost nothing: autograd has the very nodes, in the very order, of a model that nobody watches."""

    def nodes(model: Model, x: torch.Tensor) -> list[str]:
        found, todo = [], [model(x).sum().grad_fn]
        while todo:
            node = todo.pop()
            if node is not None:
                found.append(node.name())
                todo += [following for following, _ in node.next_functions]
        return found

    model, x = make()
    unwatched = nodes(model, x)
    with ro.watch(model, every=2) as watcher:
        assert nodes(model, x) != unwatched
        train(model, x, watcher, 1)
        assert nodes(model, x) == unwatched


# What a step is


def test_several_backward_calls_of_a_step_merge_and_may_differ_in_shape() -> None:
    model, x = make()
    parts = [x, x[:3], x[:1]]
    with ro.watch(model, stats=ro.Stats("l2", "amax", "nonfinite")) as watcher:
        for part in parts:
            model(part).sum().backward()
        watcher.step()
    _, readings = watcher.latest
    expected = [oracle(model, part) for part in parts]
    for name in ALL:
        together = torch.cat([of[name] for of in expected])
        assert readings[name]["l2"] == pytest.approx(together.norm().item(), rel=1e-5)
        assert readings[name]["amax"] == pytest.approx(together.abs().max().item(), rel=1e-5)


def test_a_step_without_backward_says_so_and_calls_no_sink() -> None:
    model, x = make()
    steps, sink = collect()
    with ro.watch(model, every=1, to=sink) as watcher:
        with pytest.warns(RuntimeWarning, match="no gradient came to any point in step 0; is another model"):
            watcher.step()
        model(x)
        with pytest.warns(RuntimeWarning, match="step 1"):
            watcher.step()
        train(model, x, watcher, 1)
    assert [step for step, _ in steps] == [2]


def test_a_loop_that_counts_no_step_is_told() -> None:
    model, x = make()
    with pytest.warns(RuntimeWarning, match="watch: gradients came, and no step was ever counted"), ro.watch(model):
        model(x).sum().backward()
    with ro.watch(model, start=1):  # no step to be read
        model(x).sum().backward()

    def fails() -> None:
        model(x).sum().backward()
        raise ValueError("of all things")

    with pytest.raises(ValueError, match="of all things"), ro.watch(model):  # which is enough to be told
        fails()


def test_points_that_no_gradient_came_to_have_no_readings() -> None:
    model, x = make()
    with ro.watch(model) as watcher:
        model.layers[0](x).sum().backward()
        watcher.step()
    _, readings = watcher.latest
    assert list(readings) == IN_BLOCKS[:2]


def test_an_evaluation_between_end_and_begin_is_in_no_step() -> None:
    model, x = make()
    with ro.watch(model, every=1) as watcher:
        model(x).sum().backward()
        watcher.end()
        watcher.end()  # ended already
        assert not requests_in(model)
        assert watcher.number == 1
        (model(x) * 100).sum().backward()
        watcher.begin()
        watcher.begin()  # begun already
        train(model, x, watcher, 1)
    assert_read(watcher.latest[1], oracle(model, x), ALL)


def test_a_step_that_is_run_again_counts_once() -> None:
    model, x = make()
    with ro.watch(model) as watcher:
        with pytest.raises(MemoryError):
            fail_after_half_a_backward(model, x)
        watcher.discard()
        train(model, x, watcher, 1)
    assert_read(watcher.latest[1], oracle(model, x), ALL)


def fail_after_half_a_backward(model: Model, x: torch.Tensor) -> None:
    y = model(x)

    def fail(_: torch.Tensor) -> None:
        raise MemoryError

    model.layers[0].lin.weight.register_hook(fail)
    try:
        y.sum().backward()
    finally:
        model.layers[0].lin.weight._backward_hooks.clear()


def test_an_exception_leaves_the_model_alone_and_reads_nothing() -> None:
    model, x = make()
    steps, sink = collect()
    with pytest.raises(MemoryError), ro.watch(model, to=sink) as watcher:
        fail_after_half_a_backward(model, x)
    assert not requests_in(model)
    assert steps == []
    train(model, x, watcher, 3)  # closed: nothing happens
    assert steps == []
    assert watcher.latest is None


@pytest.mark.parametrize("size", [2, None], ids=["another size", "the same size"])
def test_a_backward_after_its_step_is_not_the_next_ones(size: int | None) -> None:
    model, x = make()
    with ro.watch(model, every=2) as watcher:
        later = model(x[:size]).sum() * 100
        model(x).sum().backward()
        late = model(x).sum() * 10
        watcher.step()
        late.backward()
        train(model, x, watcher, 1)
        later.backward()
        train(model, x, watcher, 1)
    assert watcher.latest[0] == 2
    assert_read(watcher.latest[1], oracle(model, x), ALL)


# Optimizers


@pytest.mark.parametrize("foreach", [True, False])
def test_attached_to_an_optimizer_a_step_is_the_optimizers(foreach: bool) -> None:
    model, x = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=foreach)
    steps, sink = collect()
    with ro.watch(model, every=2, to=sink).attach(optimizer):
        for _ in range(4):
            expected = oracle(model, x, scale=2.0)
            for _ in range(2):
                model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if len(steps) == 1:
                first = expected, steps[0]
    assert [step for step, _ in steps] == [0, 2]
    expected, (_, readings) = first[0], steps[1]
    assert readings["out"]["l2"] == pytest.approx(expected["out"].norm().item() / 2 * 2**0.5, rel=1e-5)
    optimizer.step()  # closed
    assert len(steps) == 2


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Chain(float("nan"), 2))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ro.watch(model).attach(optimizer):
        model(torch.ones(2, 3)).sum().backward()
        with pytest.raises(ro.NonFiniteGradient):
            optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_an_optimizer_with_a_closure_runs_backward_inside_its_step() -> None:
    model, x = make()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    steps, sink = collect()
    with ro.watch(model, every=2, to=sink).attach(optimizer):
        for i in range(3):
            optimizer.step(closure) if i else optimizer.step(closure=closure)
    assert [step for step, _ in steps] == [0, 2]
    assert all(readings["out"]["l2"] > 0 for _, readings in steps)


# Compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["whole", "layers"])
def test_compiled_there_are_two_graphs_each_compiled_once(how: str) -> None:
    model, x = make(blocks=1 if how == "whole" else 10)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "whole" else model
    if how == "layers":
        for block in model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
        x.requires_grad_()  # the first layer's input is then as the others'
    expected, graphs, steps = oracle(model, x), [], []
    with ro.watch(model, every=3, to=lambda step, readings: steps.append((step, readings))) as watcher:
        for _ in range(8):
            call(x).sum().backward()
            watcher.step()
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2, 2, 2, 2, 2]
    assert [step for step, _ in steps] == [0, 3, 6]
    for _, readings in steps:
        assert_read(readings, expected, list(expected))


# Where readings go


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


def test_gradients_kept_whole_are_there_for_the_sinks_and_gone_after() -> None:
    model, x = make()
    seen = []
    with ro.watch(
        model, "out", ro.Stats("l2", grad=True), to=lambda *_: seen.append(watcher.kept["out"].grad)
    ) as watcher:
        train(model, x, watcher, 1)
        assert watcher.kept["out"].grad is None
    torch.testing.assert_close(seen[0], torch.ones(4, D))


# What is not finite


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


# Several watchers, other models


def test_several_watchers_of_one_model() -> None:
    model, x = make()
    (one, to_one), (two, to_two) = collect(), collect()
    with ro.watch(model, every=2, to=to_one) as a, ro.watch(model, "*.c", ro.Stats("amax"), every=3, to=to_two) as b:
        for _ in range(7):
            with ro.retain(model, "out") as kept:
                model(x).sum().backward()
            a.step()
            b.step()
        assert kept["out"].grad is not None
    assert ([step for step, _ in one], [step for step, _ in two]) == ([0, 2, 4, 6], [0, 3, 6])
    for _, readings in one:
        assert_read(readings, oracle(model, x), ALL)
    c = oracle(model, x)["layers.1.sine.c"]
    assert two[2][1]["layers.1.sine.c"] == {"amax": pytest.approx(c.abs().max().item())}
    assert not requests_in(model)


def test_a_copy_of_the_model_is_not_watched_and_a_move_is_no_matter() -> None:
    model, x = make()
    with ro.watch(model, every=2) as watcher:
        other = copy.deepcopy(model)
        assert not requests_in(other)
        with pytest.warns(RuntimeWarning, match="no gradient came.*a copy"):
            train(other, x, watcher, 2)
        model.to(torch.float64)
        train(model, x.double(), watcher, 2)
    assert_read(watcher.latest[1], oracle(model, x.double()), ALL)
    assert watcher.latest[0] == 2


def test_two_models_have_a_watcher_each() -> None:
    (one, x), (two, _) = make(), make()
    with ro.watch(one) as a, ro.watch(two) as b:
        one(x).sum().backward()
        (two(x) * 3).sum().backward()
        a.step()
        b.step()
    assert b.latest[1]["out"]["l2"] == pytest.approx(3 * a.latest[1]["out"]["l2"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patterns": "nope"}, KeyError, "watch: 'nope' matches no point; there are: layers.\\*.act"),
        ({"stats": None}, TypeError, r'watch: a want is NoneType; expected Stats, such as Stats\("l2", "nonfinite"\)'),
        ({"stats": "l2"}, TypeError, "watch: a want is str"),
        ({"patterns": {"out": None}}, TypeError, "watch: a want is NoneType"),
        ({"patterns": {"out": ro.Into(torch.zeros(4, D))}}, TypeError, "watch: a want is Into"),
        ({"every": 0}, ValueError, "watch: every is 0; expected a number of steps, at least 1"),
        ({"every": 2.0}, ValueError, "watch: every is 2.0"),
        ({"every": True}, TypeError, "watch: every is a bool; expected a number of steps, at least 1"),
        ({"start": 1.5}, TypeError, "watch: start is 1.5; expected the number of a step"),
        ({"to": None}, TypeError, r"watch: to is NoneType; expected a callable of \(step, readings\), or several"),
        ({"to": "x.jsonl"}, TypeError, r"watch: to is 'x.jsonl'; .*: to write to a file, .*\.JsonLines\('x.jsonl'\)"),
        ({"to": ["file"]}, TypeError, r"watch: to has a str; expected callables of \(step, readings\)"),
        ({"on_nonfinite": "stop"}, ValueError, "watch: on_nonfinite is 'stop'; expected one of raise, warn, ignore"),
        ({"group": "all"}, ValueError, "watch: group is 'all'; expected a process group, \"world\" or None"),
        ({"group": "world"}, RuntimeError, r"torch.distributed is not set up; call init_process_group\(\)"),
        ({"group": "world", "stats": ro.Stats("l2", over="rows")}, ValueError, "over rows are each rank's own"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    model, _ = make()
    with pytest.raises(error, match=message):
        ro.watch(model, **arguments)
    assert not requests_in(model)


def test_models_that_cannot_be_watched() -> None:
    with pytest.raises(ValueError, match="watch: Linear has no points"):
        ro.watch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="watch: model is function; expected"):
        ro.watch(make)


# Reading


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
