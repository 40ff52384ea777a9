"""Outputs as points beside what else PyTorch does: changes in place, modules of its own, torch.compile."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.points import COMPILED_VIEWS
from tests.fusing.blocks import assert_same, run
from tests.fusing.returned import retained_by_hooks


class InPlace(nn.Module):
    """What a module returned is changed in place, and what it was given is used again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.fc, self.module = nn.Linear(8, 8), module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        y = self.module(h)
        y.mul_(3)
        return y.sum() + (h if y.shape == h.shape else 0 * h).sum()


HELD = {
    "identity": nn.Identity,
    "dropout in eval": lambda: nn.Dropout().eval(),
    "flatten": lambda: nn.Flatten(0),
    "point": ro.nn.Point,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*HELD, "linear"])
def test_what_others_have_too_is_not_changed_in_place(name: str, compiled: bool, x: torch.Tensor) -> None:
    """PyTorch refuses: else the gradients of the others would be wrong. In compiled code nobody knows who has it."""
    if compiled and not COMPILED_VIEWS:
        pytest.skip("no point is a view in what this torch compiles")
    torch._dynamo.reset()
    model = InPlace(HELD.get(name, lambda: nn.Linear(8, 8))())
    run_it = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    expected = run(run_it, x)
    ro.fuse(model, rules=[], outputs="module")
    assert_same(run(run_it, x), expected)
    if name == "linear" and not compiled:  # and what it was before the change is the point
        with ro.retain(model) as kept:
            assert_same(run(model, x), expected)
        torch.testing.assert_close(kept["module.out"].grad, torch.full((4, 8), -3.0))
        return
    with ro.retain(model), pytest.raises(Exception, match="is a view and is being modified inplace"):
        run_it(x)


def test_what_a_point_is_made_of_is_not_changed_in_place(x: torch.Tensor) -> None:
    """If the point is used after it."""
    point, h = nn.Sequential(ro.nn.Point()), x * 2
    with ro.retain(point):
        c = point(h)
        h.mul_(3)
        with pytest.raises(RuntimeError, match="is a view and its base .* has been modified inplace"):
            c.sin().sum().backward()


class Doubled(ro.nn.HoldsPoints):
    """A point in a module of somebody's own."""

    op = ro.nn.SquaredReLU.op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        c = self.point(self.op.points[0].name, h)
        c.relu_()
        return h + c


def test_a_point_in_a_module_of_ones_own_is_not_changed_in_place(x: torch.Tensor) -> None:
    model = nn.Sequential(Doubled())
    model(x)
    with ro.retain(model), pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(x)


def test_a_point_in_code_is_not_changed_in_place_there(x: torch.Tensor) -> None:
    def f(x: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        c = ro.point(x * 2, "c", retain=kept)
        c.mul_(3)
        return c.sum()

    torch._dynamo.reset()
    compiled = [torch.compile(f, fullgraph=True, backend=name) for name in ("aot_eager", "inductor")]
    for call in (f, *(compiled if COMPILED_VIEWS else ())):
        with pytest.raises(Exception, match="is a view and is being modified inplace"):
            call(x, ro.Retained("c"))


@pytest.mark.parametrize("rules", [None, []], ids=["fused", "not fused"])
@pytest.mark.parametrize("asked", ["*.out", "*"])
def test_attention_of_torch(asked: str, rules: list | None) -> None:
    """Whose module has points of its own beside this one."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)
    names = ["self_attn", "linear2", "norm1"]
    theirs, before = retained_by_hooks(model, names, x), run(model, x)
    ro.fuse(model, rules=rules, outputs=names)
    with ro.retain(model, asked) as kept:
        assert_same(run(model, x), before)
    assert ("self_attn.p" in kept) == (asked == "*" and rules is None)
    for name in names:
        torch.testing.assert_close(kept[f"{name}.out"].grad, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    with ro.retain(model, "*.out") as outer, ro.retain(model, asked) as inner:
        run(model, x)
    for name in names:
        torch.testing.assert_close(outer[f"{name}.out"].grad, inner[f"{name}.out"].grad)


class First(nn.Module):
    def forward(self, values: Any) -> torch.Tensor:
        return values[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_recurrent_layers(copied: Callable) -> None:
    """They keep a list of their weights, and copy themselves without it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(8, 5), First()), torch.randn(3, 2, 8)
    theirs, before = retained_by_hooks(model, ["0"], x), run(model, x)
    assert [row.op for row in ro.fuse(model, outputs="0")] == ["output"]
    for each in (model, copied(model)):
        with ro.retain(each) as kept:
            assert all(torch.equal(a, b) for a, b in zip(run(each, x), before, strict=True))
        torch.testing.assert_close(kept["0.out"].grad, theirs["0"])
        ro.unfuse(each)
        assert type(each[0]) is nn.LSTM


class CompiledForward(nn.Linear):
    @torch.compile(backend="eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_forward_that_is_compiled_itself(x: torch.Tensor) -> None:
    """Dynamo marks such a function, and is not to take the one around it for marked."""
    torch._dynamo.reset()
    model = nn.Sequential(CompiledForward(8, 8))
    ro.fuse(model, rules=[], outputs="0")
    for call in (model, torch.compile(model, backend="eager")):
        with ro.retain(model) as kept:
            call(x).sum().backward()
        assert torch.equal(kept["0.out"].grad, torch.ones(4, 8))


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        torch._dynamo.graph_break()
        return h * 2


def test_classes_do_not_use_up_each_others_recompilations(x: torch.Tensor) -> None:
    """torch.compile counts by code, and gives up: each class has code of its own."""
    torch._dynamo.reset()
    many = torch._dynamo.config.recompile_limit + 3
    model = nn.Sequential(*(type(f"Breaks{i}", (Breaks,), {"forward": copied(Breaks.forward)})() for i in range(many)))
    ro.fuse(model, rules=[], outputs=lambda path: "." not in path)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.compile(model, backend="eager")(x)


def copied(function: Any) -> Any:
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
