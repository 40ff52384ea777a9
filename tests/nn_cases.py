"""Modules of the pointwise family, and what each computes in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from retainops.ops._random import new_seed, uniform
from tests.conftest import random_leaves

D = 6


class Case(NamedTuple):
    """A module, the shapes of its inputs, and what it computes in plain PyTorch, naming its points."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    expected: Callable[..., torch.Tensor]


def unit(f: Callable[[torch.Tensor], torch.Tensor], gate_first: bool = True) -> Callable[..., torch.Tensor]:
    def expected(m: nn.Module, point: Callable, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        if up is None:
            first, second = gate.chunk(2, dim=getattr(m, "dim", -1))
            gate, up = (first, second) if gate_first else (second, first)
        gate, up = point("gate", gate), point("up", up)
        return point("act", f(gate)) * up

    return expected


def sine(m: nn.Module, point: Callable, x: torch.Tensor) -> torch.Tensor:
    return torch.sin(point("c", x * (m.w0 if isinstance(m, ro.nn.Siren) else m.scale)))


def softcap(m: nn.Module, point: Callable, x: torch.Tensor) -> torch.Tensor:
    return m.cap * torch.tanh(point("c", x / m.cap))


def scale_shift(m: nn.Module, point: Callable, x: torch.Tensor, scale: torch.Tensor, shift: Any) -> torch.Tensor:
    return point("scaled", x * (1 + scale)) + shift


def squared_relu(m: nn.Module, point: Callable, x: torch.Tensor) -> torch.Tensor:
    return torch.square(point("r", torch.relu(x)))


def mish(m: nn.Module, point: Callable, x: torch.Tensor) -> torch.Tensor:
    return x * point("t", torch.tanh(point("s", F.softplus(x))))


def join(m: nn.Module, point: Callable, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    biased = point("biased", x + (0 if m.bias is None else m.bias))
    if m.training and m.p:
        keep = uniform(new_seed(x.device), x.shape) >= m.p
        biased = torch.where(keep, biased / (1 - m.p), 0.0)
    return residual + point("dropped", biased * 1)


def mlp(f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def expected(m: nn.Module, point: Callable, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.gate_up_proj(x).chunk(2, -1) if m.packed else (m.gate_proj(x), m.up_proj(x))
        gate, up = point("gate", gate), point("up", up)
        return m.down_proj(point("act", f(gate)) * up)

    return expected


def with_bias() -> nn.Module:
    module = ro.nn.BiasDropoutAdd(0.3, features=D)
    nn.init.normal_(module.bias)
    return module


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


TWO, PACKED = ((4, D), (4, D)), ((4, 2 * D),)
CASES = {
    "SwiGLU": Case(ro.nn.SwiGLU, TWO, unit(F.silu)),
    "SwiGLU packed": Case(ro.nn.SwiGLU, PACKED, unit(F.silu)),
    "SwiGLU gate last": Case(lambda: ro.nn.SwiGLU(gate_first=False), PACKED, unit(F.silu, False)),
    "GEGLU": Case(ro.nn.GEGLU, TWO, unit(F.gelu)),
    "GEGLU packed": Case(ro.nn.GEGLU, PACKED, unit(F.gelu)),
    "GEGLU tanh": Case(lambda: ro.nn.GEGLU("tanh"), TWO, unit(gelu_tanh)),
    "GEGLU tanh, gate last": Case(lambda: ro.nn.GEGLU("tanh", gate_first=False), PACKED, unit(gelu_tanh, False)),
    "ReGLU": Case(ro.nn.ReGLU, ((4, D), (D,)), unit(torch.relu)),
    "ReGLU packed": Case(ro.nn.ReGLU, PACKED, unit(torch.relu)),
    "GLU": Case(ro.nn.GLU, TWO, unit(torch.sigmoid)),
    "GLU packed": Case(ro.nn.GLU, PACKED, unit(torch.sigmoid, False)),
    "GLU of dim 1": Case(lambda: ro.nn.GLU(1), ((3, 4, D),), unit(torch.sigmoid, False)),
    "MulSin": Case(lambda: ro.nn.MulSin(nn.Parameter(torch.rand(D) + 1)), ((4, D),), sine),
    "Siren": Case(lambda: ro.nn.Siren(3.0), ((4, D),), sine),
    "Siren learned": Case(lambda: ro.nn.Siren(nn.Parameter(torch.rand(D) + 1)), ((4, D),), sine),
    "SoftCap": Case(lambda: ro.nn.SoftCap(2.0), ((4, D),), softcap),
    "SoftCap of a tensor": Case(lambda: ro.nn.SoftCap(torch.rand(D) + 1), ((4, D),), softcap),
    "ScaleShift": Case(ro.nn.ScaleShift, ((2, 4, D), (2, 1, D), (2, 1, D)), scale_shift),
    "SquaredReLU": Case(ro.nn.SquaredReLU, ((4, D),), squared_relu),
    "Mish": Case(ro.nn.Mish, ((4, D),), mish),
    "BiasDropoutAdd": Case(with_bias, TWO, join),
    "BiasDropoutAdd, no bias": Case(lambda: ro.nn.BiasDropoutAdd(0.5), TWO, join),
    "BiasDropoutAdd, p = 0": Case(lambda: ro.nn.BiasDropoutAdd(0.0), TWO, join),
    "GatedMLP": Case(lambda: ro.nn.GatedMLP(D, 8), ((2, 4, D),), mlp(F.silu)),
    "GatedMLP packed": Case(lambda: ro.nn.GatedMLP(D, 8, "gelu_tanh", packed=True), ((4, D),), mlp(gelu_tanh)),
}


def build(case: Case, device: str = "cpu") -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(11)
    return case.make().to(device), [random_leaves(device)(*shape) for shape in case.shapes]


def eager(case: Case, module: nn.Module, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(output, {point: its gradient}) in plain PyTorch; gradients of inputs and parameters as a side effect."""
    values: dict[str, torch.Tensor] = {}

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        values[name] = value * 1 if value.is_leaf else value
        values[name].retain_grad()
        return values[name]

    torch.manual_seed(12)
    y = case.expected(module, point, *inputs)
    y.backward(slope(y))
    return y.detach(), {name: value.grad for name, value in values.items()}


def slope(y: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)


def grads_of(module: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients, which are taken away."""
    found = []
    for t in (*inputs, *module.parameters()):
        found.append(t.grad)
        t.grad = None
    return found


def step(call: Callable, inputs: list[torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(12)
    y = call(*inputs)
    y.backward(slope(y))
    return y.detach()
