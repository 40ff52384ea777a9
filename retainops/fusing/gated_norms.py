"""RMSNorms with a gate, as hybrid language models of transformers have them after linear attention or a state space."""

from __future__ import annotations

from typing import Any

import torch

from retainops.fusing.norms import LlamaRMSNorm, epsilon, weight_of
from retainops.ops.gated import GATED
from retainops.ops.norm import RMS_NORM
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


class GateFirstRMSNorm(LlamaRMSNorm):
    """Mamba 2's: norm(x * silu(gate)) in float32, each group of the channels by itself; then the weight."""

    def point_infos(self) -> tuple[PointInfo, ...]:
        gate, up = PointInfo("gate", "gate", "of gate"), PointInfo("up", "x", "of x")
        xhat = PointInfo("xhat", "up * act / sqrt(mean((up * act)^2) + eps)", "of x, in groups")
        return gate, up, PointInfo("act", "silu(gate)", "of gate"), xhat

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return self.fused_from.forward(self, x)  # type: ignore[union-attr]
        gate, up = self.point("gate", gate), self.point("up", x)
        gated = self.call(gate.float(), up.float(), op=UNITS["silu"])
        return _scaled(self, self.call(_grouped(self, gated), None, epsilon(self), 0.0, False), x)

    @classmethod
    def plain(cls, module: Any, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        gated = UNITS["silu"].reference(gate.float(), x.float(), unretained)
        return _scaled(
            module, RMS_NORM.reference(_grouped(module, gated), None, epsilon(module), 0.0, False, unretained), x
        )


def _grouped(module: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, module.group_size))


def _scaled(module: Any, y: Tensor, x: Tensor) -> Tensor:
    return weight_of(module) * y.flatten(-2).to(x.dtype)


KINDS: tuple[type[LlamaRMSNorm], ...] = GatedRMSNorm, WideGatedRMSNorm, GateFirstRMSNorm
UNITS = {"silu": GATED["swiglu"], "swish": GATED["swiglu"], "sigmoid": GATED["glu"]}
"""From the name of an activation, as transformers has it, to the unit."""
