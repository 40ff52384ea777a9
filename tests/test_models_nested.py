"""Several `ro.retain` on one model at a time: each is answered, at the price of one where the kernels allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near
from tests.small_model import ALL, IN_BLOCKS, D, assert_kept, make, oracle, requests_in


def test_nested_requests_are_both_answered(model_x: tuple) -> None:
    model, x = model_x
    with ro.retain(model) as outer:
        with ro.retain(model, "layers.1.*") as inner:
            model(x).sum().backward()
        assert requests_in(model)
    expected = oracle(model, x)
    assert_kept(outer, expected, ALL)
    assert_kept(inner, expected, IN_BLOCKS[2:])
    for name in inner:
        assert inner[name].grad.data_ptr() != outer[name].grad.data_ptr()
    assert not requests_in(model)


def test_a_graph_from_before_a_reset_adds_nothing_to_nested_statistics(path: Path) -> None:
    """As where requests are not nested: the later graph is of another shape, so the slot has another leaf."""
    model, x = make(path.device)
    with ro.retain(model, ALL[0], ro.Stats("sum")) as outer, ro.retain(model, ALL[0], ro.Stats("l2", "sum")) as inner:
        late = model(x)
        outer.reset()
        inner.reset()
        model(x[:2]).sum().backward()
        before = [kept[ALL[0]].sum for kept in (outer, inner)]
        late.sum().backward()
        after = [kept[ALL[0]].sum for kept in (outer, inner)]
    assert before == after
    assert before[0] == before[1] != 0


def test_nested_requests_left_in_another_order() -> None:
    model, x = make()
    first, second = ro.retain(model), ro.retain(model)
    kept = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(x).sum().backward()
    second.__exit__(None, None, None)
    assert kept[0]["out"].grad is None
    assert_kept(kept[1], oracle(model, x), ALL)
    assert not requests_in(model)


@pytest.mark.parametrize("over", ["tensor", "rows"])
def test_nested_requests_of_one_point_in_every_form(path: Path, over: str) -> None:
    """Gradient, buffer and statistics at once; over rows, they take the reference path together."""
    model, x = make(path.device, blocks=1)
    buffer = torch.empty(4, D, device=path.device)
    name = "layers.0.sine.c"
    with (
        ro.retain(model, name) as dense,
        ro.retain(model, name, ro.Into(buffer)),
        ro.retain(model, name, ro.Stats("sum", "act_grad")) as sums,
        ro.retain(model, name, ro.Stats("amax", over=over)) as tops,
    ):
        y = model(x)
        y.sum().backward()
    grad = oracle(model, x)[name]
    value = (model.layers[0].lin(x) * model.layers[0].sine.scale).detach()
    assert_near(dense[name].grad, grad, 4)
    assert_near(buffer, grad, 4)
    assert_near(sums[name].sum, grad.sum(), 8)
    assert_near(sums[name].act_grad, (grad * value).sum(), 8)
    assert_near(tops[name].amax, grad.abs().amax() if over == "tensor" else grad.abs().amax(-1), 4)
    assert (sums[name].grad, tops[name].grad) == (None, None)


def test_nesting_keeps_the_bits(kernels: Path) -> None:
    """Two requests for a point take the kernels as one does."""
    model, x = make(kernels.device, blocks=1)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    with ro.retain(model) as alone:
        y = model(x)
        y.sum().backward()
    with ro.retain(model) as outer, ro.retain(model) as inner:
        assert torch.equal(model(x), y)
        model(x).sum().backward()
    for name in alone:
        assert torch.equal(alone[name].grad, outer[name].grad)
        assert torch.equal(alone[name].grad, inner[name].grad)


def test_nested_requests_under_create_graph(path: Path) -> None:
    sine = ro.nn.MulSin(2.0)
    x = random_leaves(path.device)(5)
    with ro.retain(sine) as outer, ro.retain(sine) as inner:
        y = sine(x).sum()
    for grad in torch.autograd.grad(y, [outer["c"].tensor, inner["c"].tensor], create_graph=True):
        (second,) = torch.autograd.grad(grad.sum(), x, retain_graph=True)
        assert_near(second, (-torch.sin(2 * x) * 2).detach(), 4)  # d cos(2x) / dx


def test_nested_statistics_make_no_gradient() -> None:
    """Nothing of the point's size is made for two requests either, zeros least of all."""
    net, x = ro.nn.MulSin(2.0), random_leaves("cpu")(3, 5)
    made: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    with ro.retain(net, "c", ro.Stats("sum")) as outer, ro.retain(net, "c", ro.Stats("l2")) as inner:
        y = net(x).sum()
    with Record():
        y.backward()
    assert outer["c"].sum is not None
    assert inner["c"].l2 is not None
    assert made
    assert not [name for name in made if "zeros" in name]


def test_each_nested_request_is_checked(path: Path) -> None:
    sine, x = ro.nn.MulSin(2.0), random_leaves(path.device)(5)
    into = ro.Into(x.detach())
    message = "buffer for point 'c' shares memory with an input"
    with ro.retain(sine), ro.retain(sine, "c", into), pytest.raises(ValueError, match=message):
        sine(x)
