"""Norms as people write them themselves: by a call of PyTorch's function, or out of its parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import rms_norm

from tests.no_torchvision import import_timm

Tensor = torch.Tensor
N = 8


def drawn(near: float = 1.0) -> nn.Parameter:
    return nn.Parameter(near + torch.linspace(-0.4, 0.5, N))


class LayerNorm(nn.Module):
    """nanoGPT's."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = drawn(), drawn(0.0) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class Scaled(nn.Module):
    """torchtune's names."""

    def __init__(self) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.scale = (N,), 1e-6, drawn()


class CallingRMSNorm(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return F.rms_norm(x.float(), normalized_shape=shape, weight=self.scale, eps=self.eps).to(x.dtype)


class Bare(nn.Module):
    """Without a weight, and with the eps that PyTorch takes then."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, [x.size(-1)])


class Groups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = drawn(), drawn(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, 2, self.w, self.b, eps=1e-6)


class OfAnyDtype(nn.LayerNorm):
    """open_clip's."""

    def __init__(self) -> None:
        super().__init__(N)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.to(dtype)


class TuneRMSNorm(Scaled):
    """torchtune's, before it called PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)
        return normed * self.scale


class LitRMSNorm(nn.Module):
    """LitGPT's."""

    def __init__(self, add_unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = drawn(0.0 if add_unit_offset else 1.0)
        self.eps, self.dim, self.add_unit_offset = 1e-6, -1, add_unit_offset

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        norm_x = torch.mean(x * x, dim=self.dim, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + self.eps)
        weight = (1 + self.weight) if self.add_unit_offset else self.weight
        return (x_normed * weight.float()).to(dtype=dtype)


class GammaRMS_Norm(nn.Module):
    """LLaMA's original, in other names; scale is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_eps, self.scale, self.gamma = 1e-5, 2.0, drawn()

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.gamma


class AroundTheMeanLayerNorm(Scaled):
    """Cohere's."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        mean = wide.mean(-1, keepdim=True)
        variance = (wide - mean).pow(2).mean(-1, keepdim=True)
        wide = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (self.scale.to(torch.float32) * wide).to(x.dtype)


class WeightlessRMSNorm(nn.Module):
    """LTX-Video's, as diffusers has it; nanochat's is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, None

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class EmptyLayerNorm(nn.Module):
    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is None
        wide = x.float() - x.float().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def of_timm() -> nn.Module:
    return import_timm().layers.RmsNorm(N)


CALLS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nanoGPT": (LayerNorm, "F.layer_norm"),
    "nanoGPT, no bias": (lambda: LayerNorm(False), "F.layer_norm"),
    "torchtune, calling": (CallingRMSNorm, "F.rms_norm"),
    "no weight": (Bare, "rms_norm"),
    "groups": (Groups, "nn.functional.group_norm"),
    "open_clip": (OfAnyDtype, "F.layer_norm"),
    "timm": (of_timm, "rms_norm"),
}
WRITTEN: dict[str, Callable[[], nn.Module]] = {
    "torchtune": TuneRMSNorm,
    "LitGPT": LitRMSNorm,
    "LitGPT, offset": lambda: LitRMSNorm(True),
    "other names": GammaRMS_Norm,
    "around the mean": AroundTheMeanLayerNorm,
    "no weight, written": WeightlessRMSNorm,
    "no weight, around the mean": EmptyLayerNorm,
}
OPS = {name: f"functional_norm({function})" for name, (_, function) in CALLS.items()}
OPS |= {
    **dict.fromkeys(WRITTEN, "rms_norm"),
    "around the mean": "layer_norm",
    "no weight, around the mean": "layer_norm",
}
MAKERS: dict[str, Callable[[], nn.Module]] = {name: make for name, (make, _) in CALLS.items()} | WRITTEN


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(5, N, generator=torch.Generator().manual_seed(1))).to(dtype)
