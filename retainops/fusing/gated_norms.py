"""RMSNorms with a gate after them, as hybrid language models of transformers have them after their linear attention."""

from __future__ import annotations

from typing import Any

import torch

from retainops.fusing.norms import LlamaRMSNorm
from retainops.ops.gated import GATED
from retainops.points import unretained
from retainops.registry import PointInfo

Tensor = torch.Tensor


class GatedRMSNorm(LlamaRMSNorm):
    """Qwen3-Next's, of a linear attention's output: act(gate) * norm(x), act in float32. Its gate comes second."""

    widens = False

    def point_infos(self) -> tuple[PointInfo, ...]:
        gate, up = PointInfo("gate", "gate", "of gate"), PointInfo("up", "the norm of x", "of x")
        return *self.op.points, gate, up, PointInfo("act", "f(gate), f the activation", "of gate")

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        unit = UNITS.get(self.activation)  # type: ignore[call-overload]
        if unit is None or gate is None:
            return self.fused_from.forward(self, x, gate)  # type: ignore[union-attr]
        up = self.point("up", super().forward(x.float() if self.widens else x))
        gate = self.point("gate", gate)
        return self.call(gate.float(), up, op=unit).to(x.dtype)

    @classmethod
    def plain(cls, module: Any, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        up = super().plain(module, x.float() if cls.widens else x)
        return UNITS[module.activation].reference(gate.float(), up, unretained).to(x.dtype)


class WideGatedRMSNorm(GatedRMSNorm):
    """Kimi-Linear's: all in float32, rounded once."""

    widens = True


KINDS: tuple[type[GatedRMSNorm], ...] = GatedRMSNorm, WideGatedRMSNorm
UNITS = {"silu": GATED["swiglu"], "swish": GATED["swiglu"], "sigmoid": GATED["glu"]}
"""From the name of an activation, as transformers has it, to the unit."""
