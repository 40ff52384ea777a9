"""Gated units, and the feed-forward block of most language models."""

from __future__ import annotations

import torch
from torch import nn

from retainops.nn.point import HoldsPoints
from retainops.ops.gated import GATED, PACKED
from retainops.registry import PointInfo


class Gated(HoldsPoints):
    """f(gate) * up in one kernel, of two tensors or of the halves of one; its points are gate, up and act = f(gate).

    Of two tensors gate and up are inputs, so they are in memory: to ask for their gradients costs a copy each, as
    `retain_grad()` does. Of a packed tensor they are interiors, stored from the backward kernel.

    Attributes:
        unit: the name of the op.
    """

    unit: str

    def point_infos(self) -> tuple[PointInfo, ...]:
        gate, up = (PointInfo(name, name, f"of {name}") for name in ("gate", "up"))
        return gate, up, *GATED[self.unit].points

    def gated(self, gate: torch.Tensor, up: torch.Tensor | None, gate_first: bool = True) -> torch.Tensor:
        """The unit; without `up`, `gate` is the packed tensor."""
        if up is None:
            return self.call(gate, gate_first, op=PACKED[self.unit])
        return self.call(self.point("gate", gate), self.point("up", up), op=GATED[self.unit])


class SwiGLU(Gated):
    """silu(gate) * up in one kernel, the gated unit of LLaMA; its points are gate, up and act = silu(gate).

    Args:
        gate_first: of a packed tensor: whether gate is its first half (as in Phi-3) or its second (as in diffusers).

    Shapes:
        gate, up: (...), which broadcast; the output: their broadcast shape. Without up, gate is the packed tensor,
        (..., 2n), and the output is (..., n).

    Raises:
        ValueError: the last dim of a packed tensor is odd.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 2 * 16), ro.nn.SwiGLU(), nn.Linear(16, 8))
        >>> with ro.retain(model, "1.act") as kept:
        ...     model(x).sum().backward()
        >>> kept["1.act"].grad
    """

    unit = "swiglu"

    def __init__(self, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first

    def forward(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        return self.gated(gate, up, self.gate_first)

    def extra_repr(self) -> str:
        return "" if self.gate_first else "gate_first=False"


class GEGLU(SwiGLU):
    """gelu(gate) * up in one kernel; points, shapes and errors are those of `SwiGLU`.

    Args:
        approximate: "none" (by erf) or "tanh", as of `torch.nn.GELU`, whose attribute it is too.
        gate_first: as of `SwiGLU`.

    Raises:
        ValueError: another `approximate`; of one that was set later, in forward.

    Example:
        >>> ro.nn.GEGLU("tanh")(gate, up)
    """

    def __init__(self, approximate: str = "none", gate_first: bool = True) -> None:
        super().__init__(gate_first)
        self.approximate = approximate
        _ = self.unit  # which checks it

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The op that `approximate` says."""
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f'GEGLU: approximate is {self.approximate!r}; expected "none" or "tanh"')
        return "geglu" if self.approximate == "none" else "geglu_tanh"

    def extra_repr(self) -> str:
        shown = [f"approximate='{self.approximate}'", super().extra_repr()]
        return ", ".join(part for part in shown if part)


class ReGLU(SwiGLU):
    """relu(gate) * up in one kernel; arguments, points, shapes and errors are those of `SwiGLU`.

    Example:
        >>> ro.nn.ReGLU()(gate, up)
    """

    unit = "reglu"


class GLU(Gated):
    """sigmoid(gate) * up in one kernel, as `torch.nn.GLU`; its points are gate, up and act = sigmoid(gate).

    Args:
        dim: of a packed tensor: the dim to halve. The first half is up, the second gate. Along another dim than the
            last the halves are taken as two tensors, and autograd puts their gradients together with a copy.

    Shapes:
        gate: the packed tensor, (..., 2n, ...); the output: (..., n, ...). Or gate and up: (...), which broadcast.

    Raises:
        ValueError: the dim to halve is of odd size.
        IndexError: the tensor has no such dim.

    Example:
        >>> ro.nn.GLU()(x)  # torch.nn.GLU()(x)
    """

    unit = "glu"

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        if up is None and isinstance(gate, torch.Tensor) and self.dim not in (-1, gate.dim() - 1):
            up, gate = self._halves(gate)
        return self.gated(gate, up, gate_first=False)

    def _halves(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not -x.dim() <= self.dim < x.dim():
            raise IndexError(
                f"GLU: dim is {self.dim}, and the input's shape is {tuple(x.shape)}; expected one of its dims"
            )
        if x.shape[self.dim] % 2:
            raise ValueError(f"GLU: the input's shape is {tuple(x.shape)}; expected an even size in dim {self.dim}")
        return x.chunk(2, dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "geglu",
    "gelu_tanh": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
    "sigmoid": "glu",
}
"""From the name of f, also as Hugging Face's configurations say it, to the unit."""


class GatedMLP(Gated):
    """down(f(gate(x)) * up(x)), the feed-forward block of LLaMA; its points are gate, up and act = f(gate).

    Its state dict is that of Hugging Face's `LlamaMLP` (`gate_proj`, `up_proj`, `down_proj`), and of `Phi3MLP`
    (`gate_up_proj`, `down_proj`) if it is packed.

    Args:
        hidden_size: the width of x and of the output.
        intermediate_size: the width between.
        act: f: "silu", "gelu", "gelu_tanh" (or "gelu_pytorch_tanh"), "relu" or "sigmoid". It is an attribute too.
        bias: whether the linear layers have one.
        packed: one linear layer for gate and up. Their values are then never separate tensors, and to ask for their
            gradients costs one store each.
        device, dtype: of the parameters.

    Shapes:
        x and the output: (..., hidden_size); the points: (..., intermediate_size).

    Raises:
        ValueError: another `act`; of one that was set later, in forward.

    Example:
        >>> layer.mlp = ro.nn.GatedMLP(4096, 14336)
        >>> with ro.retain(model, "layers.*.mlp.act", ro.Stats("l2")) as kept:
        ...     loss_of(model(x)).backward()
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act: str = "silu",
        *,
        bias: bool = False,
        packed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.act, self.packed = act, packed
        _ = self.unit  # which checks act

        def linear(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=bias, device=device, dtype=dtype)

        if packed:
            self.gate_up_proj = linear(hidden_size, 2 * intermediate_size)
        else:
            self.gate_proj = linear(hidden_size, intermediate_size)
            self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """The op that `act` says."""
        if self.act not in ACTIVATIONS:
            raise ValueError(f"GatedMLP: act is {self.act!r}; expected one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self.act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.gated(self.gate_up_proj(x), None) if self.packed else self.gated(self.gate_proj(x), self.up_proj(x))
        return self.down_proj(h)

    def extra_repr(self) -> str:
        return f"act='{self.act}'" + (", packed=True" if self.packed else "")
