"""Watching a training run: which steps are read, and what a step is."""

from __future__ import annotations

import copy

import pytest
import torch

import retainops as ro
from tests.small_model import ALL, IN_BLOCKS, Model, assert_read, collect, make, oracle, requests_in, train

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
        loss = model(x).sum()  # torch 2.11: it keeps the nodes alive
        found, todo = [], [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None:
                found.append(type(node).__name__)
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


@pytest.mark.parametrize("every", [1, 2])
def test_an_evaluation_in_a_pause_is_in_no_step(every: int) -> None:
    model, x = make()
    steps, sink = collect()
    with ro.watch(model, every=every, to=sink) as watcher:
        for _ in range(3):
            model(x).sum().backward()
            with watcher.paused():  # in a step, and between steps
                assert not requests_in(model)
                (model(x) * 100).sum().backward()
            model(x).sum().backward()
            watcher.step()
            with pytest.raises(MemoryError), watcher.paused():
                fail_after_half_a_backward(model, x)
    assert watcher.number == 3
    assert [step for step, _ in steps] == [0, 1, 2][::every]
    for _, readings in steps:
        assert_read(readings, oracle(model, x, scale=2**0.5), ALL)
    assert not requests_in(model)


def test_gradients_of_a_penalty_count() -> None:
    model, x = make()
    with ro.watch(model) as watcher:
        y = model(x).sum()
        torch.autograd.grad(y, list(model.parameters()), retain_graph=True)
        y.backward()
        watcher.step()
    assert_read(watcher.latest[1], oracle(model, x, scale=2**0.5), ALL)


def test_a_pause_that_a_step_ends_in() -> None:
    model, _ = make()
    with ro.watch(model, every=2) as watcher:
        with watcher.paused():
            watcher.step()
        assert not watcher.asking
        with watcher.paused():
            watcher.step()
            assert not watcher.asking
        assert watcher.asking
        with watcher.paused(), watcher.paused():
            watcher.begin()  # begun already
            assert not watcher.asking
        assert watcher.asking
        with watcher.paused():
            watcher.end()
        assert not watcher.asking
        watcher.end()
        watcher.begin()
        with watcher.paused():
            watcher.close()
        assert not watcher.asking


def test_a_closed_watcher_says_so() -> None:
    model, x = make()
    with ro.watch(model) as watcher:
        train(model, x, watcher, 1)
    with pytest.raises(RuntimeError, match="watch: this watcher is closed, .*; call ro.watch anew"), watcher:
        pass
    with pytest.raises(RuntimeError, match="this watcher is closed"):
        watcher.attach(torch.optim.SGD(model.parameters(), lr=0.1))


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
