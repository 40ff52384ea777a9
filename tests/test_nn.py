"""Modules of the pointwise family: their values, gradients and points, eager and compiled, and their copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

import retainops as ro
from tests.conftest import Path
from tests.nn_cases import CASES, Case, build, eager, grads_of, step
from tests.oracle import assert_near

over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@over_cases
def test_values_gradients_and_points(case: Case, path: Path) -> None:
    module, inputs = build(case, path.device)
    y, points = eager(case, module, inputs)
    grads = grads_of(module, inputs)
    with ro.retain(module) as kept:
        ours = step(module, inputs)
    assert list(kept) == list(points) == list(ro.points(module))
    assert_near(ours, y, 4)
    for mine, theirs in zip(grads_of(module, inputs), grads, strict=True):
        assert_near(mine, theirs, 8)
    for name in points:
        assert_near(kept[name].grad, points[name], 4)
    assert torch.equal(step(module, inputs), ours)
    grads_of(module, inputs)
    module.eval()
    y, _ = eager(case, module, inputs)
    assert_near(step(module, inputs), y, 4)


@over_cases
def test_each_point_alone(case: Case, path: Path) -> None:
    module, inputs = build(case, path.device)
    _, points = eager(case, module, inputs)
    for name in points:
        with ro.retain(module, name, ro.Stats("amax")) as kept:
            step(module, inputs)
        assert_near(kept[name].amax, points[name].abs().max(), 4)


@over_cases
def test_compiled(case: Case, whole_graphs: None) -> None:
    """The points out of one graph; asking is one graph more, and ceasing to ask is that from before."""
    module, inputs = build(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    plain = step(compiled, inputs)
    grads = grads_of(module, inputs)
    y, points = eager(case, module, inputs)
    for mine, theirs in zip(grads, grads_of(module, inputs), strict=True):
        assert_near(mine, theirs, 8)
    assert_near(plain, y, 4)
    seen = []
    for _ in range(2):
        with ro.retain(compiled) as kept:
            assert torch.equal(step(compiled, inputs), plain)
        for name in points:
            assert_near(kept[name].grad, points[name], 4)
        step(compiled, inputs)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [2, 2]


@over_cases
def test_copies_pickles_and_state_dicts(case: Case) -> None:
    module, inputs = build(case)
    with ro.retain(module) as kept:
        others = copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))
        fresh = case.make()
        fresh.load_state_dict(module.state_dict())
        for other in (*others, fresh):
            assert not other._requests
            assert repr(other) == repr(module)
            torch.manual_seed(12)
            y = other(*inputs)
            torch.manual_seed(12)
            assert torch.equal(y, module(*inputs))
    assert all(slot.grad is None for slot in kept.values())


def test_representations() -> None:
    modules = {
        ro.nn.SwiGLU(): "SwiGLU()",
        ro.nn.SwiGLU(gate_first=False): "SwiGLU(gate_first=False)",
        ro.nn.GEGLU("tanh", gate_first=False): "GEGLU(approximate='tanh', gate_first=False)",
        ro.nn.ReGLU(): "ReGLU()",
        ro.nn.GLU(1): "GLU(dim=1)",
        ro.nn.SoftCap(30.0): "SoftCap(cap=30.0)",
        ro.nn.SoftCap(torch.ones(3)): "SoftCap(cap=(3,))",
        ro.nn.Siren(): "Siren(w0=30.0)",
        ro.nn.BiasDropoutAdd(): "BiasDropoutAdd(p=0.5)",
        ro.nn.BiasDropoutAdd(0.1, features=3): "BiasDropoutAdd(p=0.1, features=3)",
        ro.nn.ScaleShift(): "ScaleShift()",
        ro.nn.Mish(): "Mish()",
        ro.nn.SquaredReLU(): "SquaredReLU()",
    }
    assert [repr(module) for module in modules] == list(modules.values())
    shown = repr(ro.nn.GatedMLP(4, 8, packed=True)).splitlines()
    assert shown[1:3] == [
        "  act='silu', packed=True",
        "  (gate_up_proj): Linear(in_features=4, out_features=16, bias=False)",
    ]
