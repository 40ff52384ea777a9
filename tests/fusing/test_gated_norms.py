"""RMSNorms with a gate, as hybrid language models of transformers have them after their linear attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro

Tensor = torch.Tensor
N = 8
NORMS = {
    "qwen3_next": "Qwen3NextRMSNormGated",  # rounded before the weight, silu
    "olmo_hybrid": "OlmoHybridRMSNormGated",
    "kimi_linear": "KimiLinearRMSNormGated",  # rounded once, sigmoid
    "lara_mini": "LaraMiniRMSNormGated",  # rounded once, silu
    "mamba2": "MambaRMSNormGated",  # its gate comes first, silu
    "zamba2": "Zamba2RMSNormGated",
}
GROUPED = {"group_size": N // 2}
over_norms = pytest.mark.parametrize("norm", NORMS, indirect=True)


@pytest.fixture
def norm(request: pytest.FixtureRequest) -> nn.Module:
    name = request.param
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}", reason="an older transformers")
    norm: nn.Module = getattr(module, NORMS[name])(N, **GROUPED if name in ("mamba2", "zamba2") else {})
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.6, 1.5, N))
    return norm


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x, gate = ((3 * torch.randn(2, 5, N)).to(dtype).requires_grad_() for _ in range(2))
    return x, gate


def step(norm: Any, x: Tensor, gate: Tensor) -> list[Tensor]:
    norm.zero_grad()
    y = norm(x, gate=gate)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [x, gate, norm.weight], dy)
    return [y.detach(), *grads]


@over_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(norm: nn.Module, dtype: torch.dtype) -> None:
    norm, given = norm.to(dtype), inputs(dtype)
    theirs = step(norm, *given)
    true = step(copy.deepcopy(norm).float(), *(t.detach().float().requires_grad_() for t in given))
    assert [row.op for row in ro.fuse(norm)] == ["rms_norm"]
    for other in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        for ours, expected, exact in zip(step(other, *given), theirs, true, strict=True):
            assert ours.dtype == expected.dtype
            error = (expected.float() - exact).abs().max().item()
            # As far from float32 as theirs, or nearly. (In float32 that is theirs, which is no exacter than ours.)
            bound = 2 * error + (8 if dtype == torch.float32 else 4) * 1.2e-7 * exact.abs().max().item()
            torch.testing.assert_close(ours.float(), exact, rtol=0, atol=bound)
    ro.unfuse(norm)
    assert all(torch.equal(a, b) for a, b in zip(step(norm, *given), theirs, strict=True))


@over_norms
@pytest.mark.parametrize("compiled", [False, True])
def test_points(norm: Any, compiled: bool) -> None:
    torch._dynamo.reset()
    x, gate = inputs()
    wide = torch.sigmoid if getattr(norm, "activation", None) == "sigmoid" else torch.nn.functional.silu
    act, first = wide(gate), hasattr(norm, "group_size")
    groups = (x * act).unflatten(-1, (2, -1)) if first else x
    xhat = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    up = x if first else xhat * norm.weight
    for value in (xhat, act, up):
        value.retain_grad()
    (xhat.flatten(-2) * norm.weight if first else up * act).square().sum().backward()
    expected = {"xhat": xhat.grad, "gate": gate.grad, "up": up.grad, "act": act.grad}
    expected |= {} if first else {"y": xhat.grad}
    ro.fuse(norm)
    call = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    with ro.retain(norm) as kept:
        call(*inputs()).square().sum().backward()
    assert set(kept) == set(expected)
    for point, grad in expected.items():
        torch.testing.assert_close(kept[point].grad, grad, msg=point)


@pytest.mark.parametrize("norm", ["qwen3_next"], indirect=True)
def test_an_activation_that_is_set_later(norm: Any) -> None:
    x, gate = inputs()
    ro.fuse(norm)
    for activation in ("sigmoid", "gelu"):  # of the second there is no unit: the model's own code is called
        norm.activation = activation
        ours, other = step(norm, x, gate), copy.deepcopy(norm)
        ro.unfuse(other)
        for a, b in zip(ours, step(other, x, gate), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", ["mamba2"], indirect=True)
def test_a_gate_that_is_not_there(norm: Any) -> None:
    x, _ = inputs()
    expected = norm(x)
    ro.fuse(norm)
    assert torch.equal(norm(x), expected)
    wrong = torch.ones(1, N + 1)
    with pytest.raises(RuntimeError):
        norm(wrong, wrong)
