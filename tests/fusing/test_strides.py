"""What a fused module returns lies in memory as what it returned before: code after it may take a view of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import retainops as ro
from tests.conftest import Path
from tests.fusing.own_norms import AroundTheMeanLayerNorm, GammaRMS_Norm, LitRMSNorm

Tensor = torch.Tensor
N = 8


class LayerNormCall(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (N,))


class RMSNormCall(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (N,))


class GroupNormCall(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 1)


class Sum(nn.Module):
    """Both are returned: the norm, and the sum."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + x.flip(0)
        r = h
        h = self.norm(h)
        return h, r


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) * x


class Bias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class Rotary(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = k = x.unsqueeze(1) if x.dim() == 3 else x.expand(2, 3, 4, N)
        angles = q[:, 0].detach()
        cos, sin = torch.cos(angles), torch.sin(angles)
        return apply_rotary_pos_emb(q, k, cos, sin)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(N),
    "RMSNorm": lambda: nn.RMSNorm(N),
    "Softmax": lambda: nn.Softmax(-1),
    "Softmax, another dim": lambda: nn.Softmax(1),
    "LogSoftmax": lambda: nn.LogSoftmax(0),
    "F.layer_norm": LayerNormCall,
    "F.rms_norm": RMSNormCall,
    "F.group_norm": GroupNormCall,
    "written, rounded first": GammaRMS_Norm,
    "written, rounded once": LitRMSNorm,
    "written, around the mean": AroundTheMeanLayerNorm,
    "sum and LayerNorm": lambda: Sum(nn.LayerNorm(N)),
    "sum and a written one": lambda: Sum(LitRMSNorm()),
    "gated": Gate,
    "bias_act": Bias,
    "rope": Rotary,
}
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 5, N),
    "transposed": lambda: torch.randn(2, N, 5).transpose(1, 2),
    "rows apart": lambda: torch.randn(2, 10, N)[:, ::2],
    "elements apart": lambda: torch.randn(2, 5, 2 * N)[..., ::2],
    "batch inside": lambda: torch.randn(5, 2, N).transpose(0, 1),
    "expanded": lambda: torch.randn(1, 5, N).expand(2, 5, N),
    "channels last": lambda: torch.randn(2, 3, 4, N).contiguous(memory_format=torch.channels_last),
    "a crop of channels last": lambda: torch.randn(2, 3, 6, N).contiguous(memory_format=torch.channels_last)[:, :, 1:5],
    "channels in front": lambda: torch.randn(2, N, 3, 4).permute(0, 2, 3, 1),
}


def strides(out: Any) -> list[tuple[int, ...]]:
    return [t.stride() for t in (out if isinstance(out, tuple) else (out,))]


def check(model: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    before = model(x)
    assert ro.fuse(model).replaced
    after = model(x)
    with ro.retain(model):
        asked = model(x)
    torch.testing.assert_close(after, before)
    assert strides(after) == strides(before)
    assert strides(asked) == strides(before)


over_modules = pytest.mark.parametrize("name", MODULES)


@over_modules
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_stay(name: str, layout: str) -> None:
    torch.manual_seed(0)
    check(MODULES[name](), LAYOUTS[layout]())


@over_modules
@pytest.mark.parametrize("layout", ["transposed", "channels last"])
def test_strides_stay_on_the_kernels(name: str, layout: str, kernels: Path) -> None:
    torch.manual_seed(0)
    check(MODULES[name]().to(kernels.device), LAYOUTS[layout]().to(kernels.device))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, N, 3, 5),
        torch.randn(2, N, 3, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(2, N, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
        torch.randn(2, 3, N, 5).transpose(1, 2),
        torch.randn(2, N, 5, 6).contiguous(memory_format=torch.channels_last)[..., 1:5],
        torch.randn(2, 5, N).mT,
        torch.randn(N, 2).t(),
    ],
    ids=lambda x: f"{(*x.shape,)}, {x.stride()}",
)
def test_group_norm(x: Tensor) -> None:
    check(nn.GroupNorm(2, N), x)


def test_softmax_of_dims_of_size_1() -> None:
    check(nn.Softmax(1), torch.randn(2, 1, 1, N))


def test_a_sum_that_broadcasts() -> None:
    class Broadcast(Sum):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = x[0] + x
            r = h
            h = self.norm(h)
            return h, r

    check(Broadcast(nn.LayerNorm(N)), torch.randn(2, N, 5).transpose(1, 2))


def test_dropout_after_a_norm_draws_the_same() -> None:
    """Its numbers go to elements in the order of memory."""
    model, x = nn.Sequential(nn.LayerNorm(N), nn.Dropout(0.5)), torch.randn(2, N, 5).transpose(1, 2)
    torch.manual_seed(1)
    before = model(x)
    ro.fuse(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("ask", [("s",), ("p",), ("o",), ("s", "p", "o")], ids=str)
def test_attention_of_one_query(ask: tuple[str, ...]) -> None:
    """The strides of a dim of size 1 decide what PyTorch takes for channels-last."""
    q, k, v = torch.randn(2, 4, 36, 1).mT.chunk(3, dim=3)
    expected = F.scaled_dot_product_attention(q, k, v).stride()
    assert ro.attention(q.requires_grad_(), k, v, retain=ro.Retained(*ask)).stride() == expected


def test_a_point_of_a_dim_of_size_1() -> None:
    x = torch.empty_strided((2, 4, 1, 12), (48, 12, 1, 1), requires_grad=True)
    assert ro.point(x, "x", retain=ro.Retained("x")).stride() == x.stride()
