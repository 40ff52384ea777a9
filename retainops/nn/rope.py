"""Rope: a module of rope."""

from __future__ import annotations

import torch

from retainops.nn.point import HoldsPoints
from retainops.ops.rope import ROPE


class Rope(HoldsPoints):
    """Rotary position embedding of q and k in one kernel; its points are q_rot and k_rot, the outputs.

    It has no parameters and no tables: a model computes cos and sin once for all its layers.

    Args:
        interleaved: whether elements (2j, 2j + 1) are a pair, or (j, j + rot / 2).
        half_tables: cos and sin have one column for each pair.

    Shapes:
        q, k and the outputs: (batch, heads, seq, dim), the heads of each its own; cos, sin: (seq, rot) or
        (batch, seq, rot), rot <= dim; with half_tables rot / 2 columns.

    Raises:
        TypeError: a flag is not True or False.

    Example:
        >>> self.rope = ro.nn.Rope()
        >>> q, k = self.rope(q, k, cos, sin)
    """

    op = ROPE

    def __init__(self, *, interleaved: bool = False, half_tables: bool = False) -> None:
        super().__init__()
        for name, flag in {"interleaved": interleaved, "half_tables": half_tables}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"Rope: {name} is {type(flag).__name__}; expected True or False")
        self.interleaved, self.half_tables = interleaved, half_tables

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_rot, k_rot = self.call(q, k, cos, sin, self.interleaved, self.half_tables)
        return q_rot, k_rot

    def extra_repr(self) -> str:
        flags = {"interleaved": self.interleaved, "half_tables": self.half_tables}
        return ", ".join(f"{name}=True" for name, flag in flags.items() if flag)
