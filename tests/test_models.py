"""Points held by modules: asking a model for them, and what there is to ask for."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch import nn

import retainops as ro
from tests.conftest import Path
from tests.oracle import assert_near
from tests.small_model import (
    ACTS,
    ALL,
    IN_BLOCKS,
    SINES,
    D,
    assert_kept,
    make,
    oracle,
    requests_in,
    steps_of_two_sizes,
)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("*", ALL),
        ("layers.*", IN_BLOCKS),
        ("layers.?.act", ACTS),
        (["out", "layers.0.*"], ["layers.0.act", "layers.0.sine.c", "out"]),
        (lambda name: name.endswith(".c"), SINES),
        ({"*.act": None, "out": None}, [*ACTS, "out"]),
    ],
    ids=["all", "glob", "one letter", "list", "callable", "mapping"],
)
def test_patterns(path: Path, model_x: tuple, what, names: list[str]) -> None:
    model, x = model_x
    with ro.retain(model, what) as kept:
        model(x).sum().backward()
    assert_kept(kept, oracle(model, x), names)
    assert not requests_in(model)


def test_nothing_else_changes(model_x: tuple) -> None:
    model, x = model_x
    y = model(x)
    y.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with ro.retain(model):
        again = model(x)
        again.sum().backward()
    assert torch.equal(y, again)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before


def test_statistics(path: Path) -> None:
    model, x = make(path.device)
    with ro.retain(model, "layers.*", ro.Stats("l2", "amax")) as kept:
        model(x).sum().backward()
    for name in IN_BLOCKS:
        grad = oracle(model, x)[name]
        assert_near(kept[name].l2, grad.norm(), 4)
        assert_near(kept[name].amax, grad.abs().max(), 4)
        assert kept[name].grad is None


def test_a_want_for_each_pattern(model_x: tuple) -> None:
    """Of several patterns that match, the last one counts."""
    model, x = model_x
    buffer = torch.empty(4, D, device=x.device)
    into, stats = ro.Into(buffer), ro.Stats("sum")
    with ro.retain(model, {"*": None, "layers.*": stats, "layers.1.sine.c": into}) as kept:
        model(x).sum().backward()
    assert [kept[name].want for name in ALL] == [stats, stats, stats, into, None]
    assert_near(buffer, oracle(model, x)["layers.1.sine.c"], 4)
    assert_near(kept["layers.0.act"].sum, oracle(model, x)["layers.0.act"].sum(), 8)


def test_backward_may_come_after_the_with(model_x: tuple) -> None:
    model, x = model_x
    with ro.retain(model) as kept:
        y = model(x)
    y.sum().backward()
    assert_kept(kept, oracle(model, x), ALL)


def test_gradients_accumulate_over_uses_and_backwards(model_x: tuple) -> None:
    model, x = model_x
    with ro.retain(model) as kept:
        (model(x) + model(x)).sum().backward()
        model(x).sum().backward()
    assert_kept(kept, oracle(model, x, scale=3.0), ALL)


def test_without_grad_a_model_is_left_alone(model_x: tuple) -> None:
    model, x = model_x
    said = pytest.warns(RuntimeWarning)
    with said as warned, ro.retain(model, ["layers.*.act", "out"]) as kept:
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                model(x)
    assert all(slot.grad is None and slot.shape is None for slot in kept.values())
    (warning,) = warned
    assert re.match("retain: every call of layers.*.act, out was without grad, so nothing was", str(warning.message))
    assert warning.filename == __file__


def test_no_warning_where_some_call_was_with_grad(model_x: tuple) -> None:
    model, x = model_x
    with ro.retain(model):  # not called at all
        pass
    with ro.retain(model) as kept:
        y = model(x)
        with torch.no_grad():
            model(x)
    y.sum().backward()
    assert_kept(kept, oracle(model, x), ALL)
    compiled = torch.compile(model, backend="aot_eager")
    with ro.retain(model, "out", ro.Stats("sum")) as kept:
        compiled(x).sum().backward()
        with torch.no_grad():
            model(x)
    assert kept["out"].sum == x.numel()
    with ro.retain(first := ro.nn.Point()):  # of data, in training
        model(first(x)).sum().backward()


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_without_grad_is_noted_too(need_weights: bool) -> None:
    model, x = ro.nn.MultiheadAttention(8, 2), torch.ones(2, 3, 8)
    said = pytest.warns(RuntimeWarning, match="retain: every call of p was without grad")
    with said, ro.retain(model, "p"), torch.no_grad():
        model(x, x, x, need_weights=need_weights)


def test_an_input_that_needs_no_grad_is_left_alone(path: Path) -> None:
    model = nn.Sequential(ro.nn.Point(), ro.nn.MulSin(2.0), nn.Linear(D, D), ro.nn.Point()).to(path.device)
    with ro.retain(model) as kept:
        model(torch.ones(3, D, device=path.device)).sum().backward()
    assert {name: slot.grad is None for name, slot in kept.items()} == {"0": True, "1.c": True, "3": False}


def test_models_in_two_threads_do_not_meet() -> None:
    models = [make(), make()]
    kepts: dict[int, ro.Retained] = {}
    both_armed = threading.Barrier(2)

    def work(i: int) -> None:
        model, x = models[i]
        with ro.retain(model, "*" if i else "out") as kepts[i]:
            both_armed.wait(10)
            (model(x).sum() * (i + 1)).backward()
            both_armed.wait(10)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, names in enumerate((["out"], ALL)):
        assert_kept(kepts[i], oracle(*models[i], scale=i + 1), names)


def test_a_decorated_function_in_two_threads() -> None:
    """Each call ceases what it asked itself, whichever ends first."""
    model, _ = make()

    @ro.retain(model, "out")
    def call(is_in: threading.Event, may_leave: threading.Event) -> None:
        is_in.set()
        may_leave.wait(10)

    def start() -> tuple[threading.Thread, threading.Event]:
        is_in, may_leave = threading.Event(), threading.Event()
        thread = threading.Thread(target=call, args=(is_in, may_leave))
        thread.start()
        is_in.wait(10)
        return thread, may_leave

    calls = [start(), start()]
    _, of_the_second = model.out._requests
    for (thread, may_leave), left in zip(calls, [(of_the_second,), ()], strict=True):
        may_leave.set()
        thread.join()
        assert model.out._requests == left


def test_autocast() -> None:
    model, x = make()
    with ro.retain(model) as kept, torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert kept["layers.0.act"].dtype == torch.bfloat16
    assert kept["layers.0.act"].grad.dtype == torch.bfloat16


def test_shared_modules_go_by_their_first_name() -> None:
    shared = ro.nn.MulSin(1.5)
    model = nn.Sequential(nn.Linear(D, D), shared, shared)
    x = torch.randn(3, D)
    with ro.retain(model) as kept:
        model(x).sum().backward()
    first = model[0](x) * 1.5
    second = torch.sin(first) * 1.5
    expected = torch.cos(second) + torch.cos(second) * 1.5 * torch.cos(first)
    assert list(kept) == ["1.c"]
    assert_near(kept["1.c"].grad, expected.detach(), 4)


def test_a_model_that_is_a_point() -> None:
    point = ro.nn.Point()
    x = torch.ones(3, requires_grad=True)
    assert point(x) is x
    with ro.retain(point) as kept:
        (point(x) * 2).sum().backward()
    assert kept[""].grad.tolist() == [2, 2, 2]


def test_mul_sin_holds_a_number_a_parameter_or_a_buffer() -> None:
    learned, fixed = ro.nn.MulSin(nn.Parameter(torch.ones(D))), ro.nn.MulSin(torch.ones(D))
    assert [*learned.state_dict()] == [*fixed.state_dict()] == ["scale"]
    assert [len([*m.parameters()]) for m in (learned, fixed, ro.nn.MulSin(30.0))] == [1, 0, 0]
    assert (repr(fixed), repr(ro.nn.MulSin(30.0))) == ("MulSin(scale=(6,))", "MulSin(scale=30.0)")
    with pytest.raises(TypeError, match="MulSin: scale is str; expected a number or a torch.Tensor"):
        ro.nn.MulSin("30")


# What there is


def test_the_points_of_a_model() -> None:
    model, _ = make(blocks=1)
    there = ro.points(torch.compile(model, backend="aot_eager"))
    assert list(there) == ["layers.0.act", "layers.0.sine.c", "out"]
    assert (there["layers.0.sine.c"].formula, there["layers.0.sine.c"].shape) == ("a * b", "broadcast of a and b")
    assert repr(there) == (
        "Model:\n"
        "  layers.0.act     x      (of its input)          Point in Block\n"
        "  layers.0.sine.c  a * b  (broadcast of a and b)  MulSin in Block\n"
        "  out              x      (of its input)          Point in Model"
    )
    assert repr(ro.points(nn.Linear(2, 2))) == "Linear: no points"
    assert repr(ro.points(ro.mul_sin)).startswith("mul_sin: sin(a * b)")


def test_an_exception_inside_restores_the_model(model_x: tuple) -> None:
    model, _ = model_x
    with pytest.raises(ZeroDivisionError), ro.retain(model):
        1 / 0  # noqa: B018
    assert not requests_in(model)


def test_two_shapes_in_one_with(model_x: tuple) -> None:
    model, x = model_x
    with pytest.raises(RuntimeError, match=r"point 'layers.0.act' has shape \(3, 6\).*\(4, 6\)"), ro.retain(model):
        steps_of_two_sizes(model, x)
    assert not requests_in(model)
