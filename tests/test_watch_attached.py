"""Watchers that are attached to optimizers, or of compiled models; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import retainops as ro
from tests.small_model import D, assert_read, collect, make, oracle, requests_in
from tests.test_integrations import Chain

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


@pytest.mark.usefixtures("fresh_compiler")
def test_attached_to_an_optimizer_whose_step_is_compiled_nothing_of_the_watcher_is() -> None:
    model, x = make(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="eager")
    def update() -> None:
        optimizer.step()

    steps, sink = collect()
    with ro.watch(model, every=2, to=sink).attach(optimizer):
        for _ in range(4):
            model(x).sum().backward()
            update()
            optimizer.zero_grad()
    assert [step for step, _ in steps] == [0, 2]
    assert len(counters["graph_break"]) == 1  # the call of what is not to be compiled


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patterns": "nope"}, KeyError, "watch: 'nope' matches no point; there are: layers.\\*.act"),
        ({"stats": None}, TypeError, r'watch: a want is NoneType; expected Stats, such as Stats\("l2", "nonfinite"\)'),
        ({"stats": "l2"}, TypeError, "watch: a want is str"),
        ({"patterns": {"out": None}}, TypeError, "watch: a want is NoneType"),
        ({"patterns": {"out": ro.Stats("l2")}, "stats": ro.Stats("sum")}, ValueError, "watch: .*; leave out stats"),
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
