"""Rules of a user's own, and choosing among all."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from retainops.fusing.registry import RULES
from tests.fusing.blocks import Block, assert_same, run


@pytest.mark.usefixtures("registry")
def test_a_rule_for_a_class(x: torch.Tensor) -> None:
    @ro.fuse_rule
    def mish(module: nn.Module) -> type | None:
        return ro.nn.Mish if type(module) is nn.Mish else None

    model = nn.Sequential(nn.Linear(8, 8), nn.Mish())
    theirs = run(model, x)
    assert [(row.name, row.op) for row in ro.fuse(model)] == [("1", "mish")]
    assert list(ro.points(model)) == ["1.s", "1.t"]
    assert_same(run(model, x), theirs)
    assert repr(model[1]) == "Mish (fused)()"


class Modulated(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        y = x * (1 + scale) + shift
        return y.square()


class ScaleShift(ro.nn.ScaleShift):
    def fused_scale_shift(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.call(x, scale, shift)

    forward = nn.Module.forward  # the module's own


@pytest.mark.usefixtures("registry")
def test_a_rule_for_code(x: torch.Tensor) -> None:
    @ro.fuse_rule(before="X * (1 + SCALE) + SHIFT", after="self.fused_scale_shift(X, SCALE, SHIFT)")
    def modulation(module: nn.Module) -> type:
        return ScaleShift

    model, more = Modulated(), (torch.rand(8), torch.rand(8))
    theirs = model(x, *more)
    assert [(row.name, row.op) for row in ro.fuse(model)] == [("", "modulation")]
    with ro.retain(model, "scaled") as kept:
        ours = model(x, *more)
        ours.sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(kept["scaled"].grad, 2 * (x * (1 + more[0]) + more[1]).detach())


class Named(ro.nn.HoldsPoints):
    """A part without a forward: it comes on top of what the module's code calls."""

    op = ro.nn.Mish.op

    def point_infos(self) -> tuple[Any, ...]:
        return (dataclasses.replace(self.op.points[0], name="named"),)


@pytest.mark.usefixtures("registry")
def test_rules_that_share_a_module(block: Block, x: torch.Tensor) -> None:
    changed = []

    @ro.fuse_rule
    def part(module: nn.Module) -> type | None:
        return Named if type(module) is Block else None

    @ro.fuse_rule
    def change(module: nn.Module) -> ro.fusing.Change | None:
        return ro.fusing.Change("changed", lambda: changed.append(module)) if type(module) is Block else None

    @change.undo
    def unchange(module: nn.Module) -> str | None:
        return "changed" if changed and changed.pop() else None

    theirs = run(block, x)
    table = ro.fuse(block)
    assert [row.op for row in table][:5] == ["changed", "mish", "gated(act)", "bias_act(fc, gelu)", "add_norm(norm2)"]
    assert changed == [block]
    assert {"named", "act", "c"} <= set(ro.points(block))
    assert_same(run(block, x), theirs)
    assert [row.op for row in ro.unfuse(block)][:2] == ["restored", "restored, from changed"]
    assert not changed
    assert type(block) is Block


@pytest.mark.usefixtures("registry")
def test_choosing_rules(block: Block) -> None:
    table = ro.fuse(block, rules=["softmax", RULES["rms_norm"]])
    assert {row.op for row in table} == {"softmax", "rms_norm"}
    with pytest.raises(KeyError, match="fuse: no rule is called 'sofmax'; there are: attention, lm_loss, cross_ent"):
        ro.fuse(block, rules=["sofmax"])
    with pytest.raises(ValueError, match="before has 1 patterns and after 0; expected as many"):
        ro.fuse_rule(before="X", after=[])
    with pytest.raises(TypeError, match="it decorates a int; expected a function of a module"):
        ro.fuse_rule(3)
