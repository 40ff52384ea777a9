"""A mixture of experts of transformers, whose gate is called once for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import retainops as ro
from tests.fusing.families import FAMILIES, SIZES, step

Tensor = torch.Tensor
POINTS = ("gate", "up", "act")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return FAMILIES["llama"].inputs()


def test_the_points_of_the_gate(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = step(model, inputs)
    table = ro.fuse(model)
    assert {row.op for row in table if row.name.endswith("experts")} == {None, "gated(act_fn)"}
    names = [f"model.layers.{i}.mlp.experts.{point}" for i in (0, 1) for point in POINTS]
    with ro.retain(model, names) as kept:
        after = step(model, inputs)
    for what, value in before.items():
        torch.testing.assert_close(after[what], value, rtol=1e-4, atol=1e-5)
    ro.unfuse(model)
    seen: list[Tensor] = []

    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = (half.clone() for half in gate_up.chunk(2, dim=-1))
        act = self.act_fn(gate)
        for value in (gate, up, act):
            value.retain_grad()
            seen.append(value)
        return act * up

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", apply_gate)
    step(model, inputs)
    assert len(seen) == len(names)
    for name, value in zip(names, seen, strict=True):
        assert kept[name].grad.shape == value.shape == (2 * 18, SIZES["intermediate_size"])
        torch.testing.assert_close(kept[name].grad, value.grad)


def test_experts_one_by_one_do_not_call_it(model: nn.Module, inputs: dict[str, Any]) -> None:
    expected = step(model, inputs)
    ro.fuse(model)
    model.set_experts_implementation("eager")
    with ro.retain(model, "*.experts.*") as kept:
        ours = step(model, inputs)
    torch.testing.assert_close(ours["loss"], expected["loss"])
    assert all(slot.grad is None for slot in kept.values())
