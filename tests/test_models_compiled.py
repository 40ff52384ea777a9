"""Asking a compiled model: `ro.retain` in the order people write it, one graph more and no graph break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import retainops as ro
from tests.oracle import assert_near
from tests.small_model import ALL, IN_BLOCKS, D, Model, assert_kept, make, oracle, requests_in, steps_of_two_sizes

pytestmark = pytest.mark.usefixtures("whole_graphs")


def graphs() -> int:
    """Graphs compiled so far in this test."""
    return counters["stats"]["unique_graphs"]


def test_compiled_whole() -> None:
    """Asking compiles once; ceasing to ask, and asking again, are graphs from before."""
    model, x = make()
    expected = oracle(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(x)
    seen = [graphs()]
    for _ in range(2):
        with ro.retain(compiled, "layers.*") as kept:
            y = compiled(x)
            y.sum().backward()
        assert_kept(kept, expected, IN_BLOCKS)
        assert torch.equal(y, plain)
        assert torch.equal(compiled(x), plain)
        seen.append(graphs())
    assert seen == [1, 2, 2]


def test_compiled_by_inductor() -> None:
    model, x = make(blocks=1)
    compiled = torch.compile(model, fullgraph=True)
    with ro.retain(compiled) as kept, ro.retain(compiled, "*.c", ro.Stats("amax")) as stats:
        compiled(x).sum().backward()
    expected = oracle(model, x)
    assert_kept(kept, expected, ["layers.0.act", "layers.0.sine.c", "out"])
    assert_near(stats["layers.0.sine.c"].amax, expected["layers.0.sine.c"].abs().max(), 4)


def test_two_points_add_up_in_one_buffer() -> None:
    model, x = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    names, buffer = ["layers.0.act", "layers.1.sine.c"], torch.ones(4, D)
    with ro.retain(compiled, dict.fromkeys(names, ro.Into(buffer, accumulate=True))):
        compiled(x).sum().backward()
    expected = oracle(model, x)
    assert_near(buffer, 1 + sum(expected[name] for name in names), 4)


def compile_before(model: Model) -> tuple[nn.Module, Callable]:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    return compiled, compiled


def compile_in_place(model: Model) -> tuple[nn.Module, Callable]:
    model.compile(fullgraph=True, backend="aot_eager")
    return model, model


def compile_but_ask_the_original(model: Model) -> tuple[nn.Module, Callable]:
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


def compile_blocks(model: Model) -> tuple[nn.Module, Callable]:
    for i, block in enumerate(model.layers):
        model.layers[i] = torch.compile(block, fullgraph=True, backend="aot_eager")
    return model, model


def compile_a_step(model: Model) -> tuple[nn.Module, Callable]:
    return model, torch.compile(lambda x: model(x).sum(), fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize(
    "way", [compile_before, compile_in_place, compile_but_ask_the_original, compile_blocks, compile_a_step]
)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "before"])
def test_compiled_in_the_order_people_write_it(way: Callable, inside: bool) -> None:
    model, x = make()
    expected = oracle(model, x)
    if inside and way is not compile_blocks:  # which replaces modules
        with ro.retain(model) as kept:
            _, call = way(model)
            call(x).sum().backward()
    else:
        asked, call = way(model)
        call(x)
        with ro.retain(asked) as kept:
            call(x).sum().backward()
    assert_kept(kept, expected, ALL)
    assert not requests_in(model)


def test_layers_compiled_one_by_one_share_their_graphs() -> None:
    """Of more layers than Dynamo compiles one function for: a graph knows no name of a point."""
    model, x = make(blocks=torch._dynamo.config.recompile_limit + 2)
    for block in model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    expected = oracle(model, x)
    seen = []
    for asked in (False, True, False, True):
        with ro.retain(model) if asked else contextlib.nullcontext({}) as kept:
            model(x).sum().backward()
        assert_kept(kept, expected, list(expected)) if asked else None
        seen.append(graphs())
    assert seen == [2, 4, 4, 4]  # the first layer's input requires no grad


def test_compiled_with_statistics_nested_and_twice() -> None:
    model, x = make()
    expected = oracle(model, x, scale=3.0)
    compiled = torch.compile(lambda x: (model(x) + 2 * model(x)).sum(), fullgraph=True, backend="aot_eager")
    with ro.retain(model) as dense, ro.retain(model, "layers.*", ro.Stats("sum", "amax")) as stats:
        compiled(x).backward()
    assert_kept(dense, expected, ALL)
    for name in IN_BLOCKS:
        assert_near(stats[name].sum, expected[name].sum(), 16)
        assert_near(stats[name].amax, expected[name].abs().max() * 2 / 3, 4)  # of two uses, of 1x and 2x
    assert graphs() == 1


def test_compiled_batch_sizes_share_a_graph() -> None:
    model, _ = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i, n in enumerate((4, 5, 6, 7)):
        x = torch.randn(n, D)
        with ro.retain(compiled) as kept:
            compiled(x).sum().backward()
        assert_kept(kept, oracle(model, x), ALL)
        assert graphs() == min(i + 1, 2)  # one for a fixed size, one for all others


def test_compiled_accumulation_and_reset() -> None:
    model, x = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(compiled) as kept:
        for _ in range(2):
            compiled(x).sum().backward()
        assert_kept(kept, oracle(model, x, scale=2.0), ALL)
        kept.reset()
        compiled(x[:3]).sum().backward()
        assert_kept(kept, oracle(model, x[:3]), ALL)


def test_compiled_checkpoint_and_autocast() -> None:
    model, x = make()

    def f(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with ro.retain(model, "layers.*") as kept:
        compiled(x).sum().backward()
    assert_kept(kept, oracle(model, x), IN_BLOCKS)
    with ro.retain(model, "layers.*") as kept, torch.autocast("cpu", torch.bfloat16):
        compiled(x).sum().backward()
    assert kept["layers.0.act"].grad.dtype == torch.bfloat16


def test_compiled_without_grad_is_left_alone() -> None:
    model, x = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(compiled) as kept, torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    assert all(slot.grad is None for slot in kept.values())


def test_two_shapes_in_one_with_compiled() -> None:
    model, x = make()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"point '.*' has shape \(3, 6\).*\(4, 6\)"), ro.retain(model):
        steps_of_two_sizes(compiled, x)
    with pytest.raises(RuntimeError, match=r"two shapes.*: \((4|3), 6\) and \((3|4), 6\)"), ro.retain(model):
        (compiled(x).sum() + compiled(x[:3]).sum()).backward()
    assert not requests_in(model)
