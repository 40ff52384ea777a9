"""Activations that a forward calls as functions of PyTorch's: what is computed, and their points."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import silu

import retainops as ro
from tests.fusing import layers
from tests.fusing.blocks import assert_same, run
from tests.fusing.layers import Layers, steps

Tensor = torch.Tensor
x = layers.x  # a fixture


class SwiGLU(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.silu(self.gate(x)) * self.up(x))


class Imported(Layers):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.fc(silu(gate) * up)


class GEGLU(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.gelu(self.gate(x), approximate="tanh") * self.up(x))


class TanhFirst(Layers):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return self.fc(F.gelu(gate, approximate="tanh") * up)


class TanhLast(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(x) * F.gelu(self.gate(x), approximate="tanh"))


class GLU(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(x) * torch.sigmoid(self.gate(x)))


class OfThree(Layers):
    """The product that is no unit starts where the one that is one does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) * torch.sigmoid(self.gate(x)) * self.fc(x)


class Packed(Layers):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc(x).chunk(2, dim=-1)
        up = F.relu(gate) * up
        return up + 1


class BiasGelu(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.fc(x)))


class BiasGeluTanh(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.fc(x), approximate="tanh"))


class BiasGeluTanhBelow(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = F.gelu(x, approximate="tanh")
        return self.up(x)


class BiasAndReturn(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return F.relu(x)


class BiasAndReturnTanh(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return F.gelu(x, approximate="tanh")


class BiasTanh(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x = torch.tanh(x)
        return self.up(x)


GATES = {
    SwiGLU: "gated(F.silu)",
    Imported: "gated(silu)",
    GEGLU: "gated(nn.functional.gelu)",
    TanhFirst: "gated(F.gelu)",
    TanhLast: "gated(F.gelu)",
    GLU: "gated(torch.sigmoid)",
    OfThree: "gated(torch.sigmoid)",
}
OTHERS = {
    Packed: "gated(F.relu)",
    BiasGelu: "bias_act(fc, F.gelu)",
    BiasGeluTanh: "bias_act(fc, F.gelu)",
    BiasGeluTanhBelow: "bias_act(fc, F.gelu)",
    BiasAndReturn: "bias_act(fc, F.relu)",
    BiasAndReturnTanh: "bias_act(fc, F.gelu)",
    BiasTanh: "bias_act(fc, torch.tanh)",
}
CASES: dict[type[nn.Module], str] = {**GATES, **OTHERS}
over_cases = pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)


@over_cases
def test_what_they_compute_and_their_points(cls: type[nn.Module], x: Tensor) -> None:
    model = cls()
    theirs = steps(model, x)
    assert [row.op for row in ro.fuse(model)] == [CASES[cls]]
    assert_same(steps(model, x), theirs)
    where = {"gate": model.gate, "up": model.up} if cls in GATES else {} if cls is Packed else {"c": model.fc}
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with ro.retain(other) as kept:
            assert_same(steps(other, x), theirs)
        assert all(slot.grad is not None for slot in kept.values())
        assert set(where) <= set(kept)
    ro.unfuse(model)
    values: dict[str, Any] = {}

    def keep(name: str, value: Tensor) -> None:
        value.retain_grad()
        values[name] = value

    for name, layer in where.items():
        layer.register_forward_hook(lambda module, args, out, name=name: keep(name, out))
    assert all(torch.equal(a, b) for a, b in zip(steps(model, x), theirs, strict=True))
    for name, value in values.items():
        torch.testing.assert_close(kept[name].grad, value.grad)


@pytest.mark.parametrize("cls", [GEGLU, BiasGelu], ids=lambda cls: cls.__name__)
def test_compiled(cls: type[nn.Module], x: Tensor) -> None:
    torch._dynamo.reset()
    model = cls()
    theirs = steps(model, x)
    ro.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(model) as kept:
        assert_same(steps(compiled, x), theirs)
    assert all(slot.grad is not None for slot in kept.values())


@over_cases
def test_a_function_that_is_exchanged_later(cls: type[nn.Module], x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code calls what stands there at the time."""
    model = cls()
    ro.fuse(model)
    for scope, name in ((F, "silu"), (F, "gelu"), (F, "relu"), (torch, "sigmoid"), (torch, "tanh")):
        monkeypatch.setattr(scope, name, lambda x, **options: x * 3 + len(options))
    monkeypatch.setitem(globals(), "silu", F.silu)
    with ro.retain(model) as kept:
        ours = steps(model, x)
    ro.unfuse(model)
    assert_same(ours, steps(model, x))
    assert all(slot.grad is not None for slot in kept.values())


def test_a_call_that_is_an_error_stays_one(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TanhFirst()
    ro.fuse(model)
    monkeypatch.setattr(F, "gelu", F.silu)  # which has no form
    with pytest.raises(TypeError, match="approximate"):
        model(x)


def test_an_up_that_is_none_is_no_packed_gate(x: Tensor) -> None:
    model = SwiGLU()
    ro.fuse(model)
    model.up.forward = lambda x: None  # a projection that forgets to return
    with pytest.raises(TypeError, match="unsupported operand"):
        model(x)


def test_a_whole_step_in_bfloat16_under_autocast(x: Tensor) -> None:
    model = SwiGLU()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, x)
        ro.fuse(model)
        ours = run(model, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)
