"""Models with points that are copied, pickled, traced or exported: requests stay with the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import retainops as ro
from tests.small_model import (
    D,
    make,
    requests_in,
)


def test_copies_and_pickles_carry_no_request() -> None:
    model, x = make()
    with ro.retain(model) as kept:
        others = copy.deepcopy(model), copy.copy(model.out), pickle.loads(pickle.dumps(model))
        for other in others:
            assert not requests_in(other)
            other(x).sum().backward() if other is not others[1] else other(x)
        assert requests_in(model)
    assert all(slot.grad is None for slot in kept.values())


@pytest.mark.parametrize("fused", [False, True], ids=["ours", "fused"])
def test_a_copy_of_a_parametrized_module_carries_no_request(fused: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(D) if fused else ro.nn.LayerNorm(D))
    if fused:
        ro.fuse(model)
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    x = torch.randn(4, D, requires_grad=True)
    with ro.retain(model) as kept:
        other = copy.deepcopy(model)
        assert requests_in(model)
        assert not requests_in(other)
        model(x).sum().backward()
    torch.testing.assert_close(other(x), model(x))
    assert kept["0.xhat"].grad is not None


@pytest.mark.parametrize("fused", [False, True], ids=["ours", "fused"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_what_was_compiled_in_place_has_weights_of_its_own(
    copied: Callable, fused: bool, fresh_compiler: None
) -> None:
    norm = nn.LayerNorm(D) if fused else ro.nn.LayerNorm(D)
    if fused:
        ro.fuse(norm)
    norm.compile(backend="eager")
    other = copied(norm)
    nn.init.zeros_(other.weight)
    assert not other(torch.randn(4, D)).any()
    assert norm(torch.randn(4, D)).any()


def test_a_model_with_points_can_be_traced_and_exported() -> None:
    model, x = make()
    assert torch.equal(
        torch.fx.symbolic_trace(nn.Sequential(model.layers[0].lin, ro.nn.Point()))(x), model.layers[0].lin(x)
    )
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["layers.0.act", "layers.0.sine.c"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_that_would_answer_no_request(what: str, strict: bool) -> None:
    model, x = make()
    with ro.retain(model, what):
        with pytest.raises(Exception, match=r"while torch\.export records this call.*leave the `with` of ro\.retain"):
            torch.export.export(model, (x,), strict=strict)
        with pytest.raises(RuntimeError, match=r"while torch\.jit records this call"):
            torch.jit.trace(model, (x,))
        with pytest.raises(RuntimeError, match=r"while torch\.fx records this call.*leave the `with` of ro\.retain"):
            torch.fx.symbolic_trace(model)
        model(x)
