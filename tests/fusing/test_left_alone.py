"""What `ro.fuse` leaves alone, and the reason that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from tests.fusing.blocks import Block, Norm, TinyRMSNorm, assert_same, run


class Loud(nn.LayerNorm):
    """It overrides forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class LoudRMSNorm(TinyRMSNorm):
    """It overrides forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class OtherRMSNorm(nn.Module):
    """Its attributes are an RMSNorm's, and it is none."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)


class CountingRMSNorm(Norm):
    """It counts its calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return Norm.forward(self, x)


class Counting(nn.Module):
    """RMSNorm with a side effect, all in one class."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight, self.eps, self.calls = nn.Parameter(torch.ones(n)), 1e-6, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


Counting.__name__ = "CountingLayerNorm"


class Pickling(nn.LayerNorm):
    """It is pickled in a way of its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


def patched() -> nn.Module:
    norm = nn.LayerNorm(8)
    norm.forward = lambda x: x * 3
    return norm


def eps_of(norm: nn.Module, eps: float) -> nn.Module:
    norm.variance_epsilon = eps
    return norm


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "overriding": (lambda: Loud(8), "it overrides the forward of torch.nn.LayerNorm"),
    "overriding an RMSNorm": (lambda: LoudRMSNorm(8), "it overrides the forward of Norm"),
    "another norm": (lambda: OtherRMSNorm(8), "no norm of retainops computes what it does"),
    "a subclass that counts": (lambda: CountingRMSNorm(8), "it overrides the forward of Norm"),
    "one that counts": (lambda: Counting(8), "its forward does more than to return a value"),
    "patched": (patched, "its forward is set on the module itself"),
    "pickling itself": (lambda: Pickling(8), "Pickling copies itself in a way of its own"),
    "over two dims": (lambda: nn.LayerNorm((4, 8)), r"it is over several dims, (4, 8)"),
    "no eps": (lambda: nn.LayerNorm(8, eps=0), "its eps is 0; the op takes one above 0"),
    "no eps, of groups": (lambda: nn.GroupNorm(2, 8, eps=0.0), "its eps is 0.0; the op takes one above 0"),
    "no eps, RMSNorm": (lambda: nn.RMSNorm(8, eps=0.0), "its eps is 0.0; the op takes one above 0"),
    "no eps, an RMSNorm of its own": (lambda: eps_of(TinyRMSNorm(8), 0.0), "its eps is 0.0; the op takes one above 0"),
    "no dim": (lambda: nn.Softmax(), "it has no dim"),
    "int8": (
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)}),
        "its weights are torch.int8",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_and_said(name: str) -> None:
    make_one, why = LEFT[name]
    module = make_one()
    kind, state = type(module), dict(vars(module))
    table = ro.fuse(nn.Sequential(module))
    assert [(row.name, row.op, row.why) for row in table] == [("0", None, why)]
    assert (type(module), vars(module)) == (kind, state)


class Quantised(nn.Module):
    """What a quantised linear layer of some library looks like."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().max() / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


def test_quantised_layers_are_called_as_they_are(block: Block, x: torch.Tensor) -> None:
    block.gate, block.fc = Quantised(block.gate), Quantised(block.fc)
    theirs = block(x)
    table = ro.fuse(block)
    assert {(row.name, row.why) for row in table.left} == {("gate", WHY), ("fc", WHY)}
    assert "gated(act)" in {row.op for row in table}
    torch.testing.assert_close(block(x), theirs)


WHY = "its weights are torch.int8"


def test_a_parametrized_weight_is_not_computed(block: Block) -> None:
    """By spectral_norm's, each time that it is looked at, the estimate of the norm moves."""
    estimate = nn.utils.parametrizations.spectral_norm(block.fc).parametrizations.weight[0]._u
    before = estimate.clone()
    assert "fc is a torch.nn.utils.parametrize.ParametrizedLinear" in str(ro.fuse(block))
    assert torch.equal(estimate, before)


def test_layers_of_a_library_that_quantises(block: Block, x: torch.Tensor) -> None:
    class Linear4bit(nn.Linear):
        __module__ = "bitsandbytes.nn.modules"

    for name in ("gate", "fc"):
        layer = Linear4bit(8, 8)
        layer.load_state_dict(getattr(block, name).state_dict())
        setattr(block, name, layer)
    theirs = run(block, x)
    table = ro.fuse(block)
    assert {(row.name, row.why) for row in table.left} == {
        ("", "bias_act(fc, gelu): fc is a bitsandbytes.nn.modules.Linear4bit"),
        ("gate", "it is quantised, by bitsandbytes"),
        ("fc", "it is quantised, by bitsandbytes"),
    }
    assert_same(run(block, x), theirs)


def test_a_method_that_is_of_no_module() -> None:
    """As one that was made by exec."""
    made: dict[str, Any] = {}
    exec("def forward(self, x): return 2 * x", {"__name__": None}, made)
    assert made["forward"].__module__ is None
    assert not ro.fuse(type("Made", (nn.Module,), made)()).replaced
