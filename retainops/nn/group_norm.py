"""GroupNorm: a module of group_norm."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import nn

from retainops.nn._affine import make_weights, reset_weights
from retainops.nn.point import HoldsPoints
from retainops.ops.group_norm import GROUP_NORM


class GroupNorm(HoldsPoints):
    """`ro.group_norm`; its point is xhat. It stands in for `torch.nn.GroupNorm`, state dict included.

    Args:
        num_groups: a divisor of num_channels.
        num_channels: the size of dim 1.
        eps: above 0.
        affine: whether there are weight and bias.
        device, dtype: of both.
        bias: whether there is a bias, besides the weight.

    Shapes:
        x and the output: (batch, num_channels, ...).

    Raises:
        TypeError: num_groups or num_channels is not an integer.
        ValueError: num_groups does not divide num_channels.
        RuntimeError: in forward, dim 1 is not of the weight's size.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), ro.nn.GroupNorm(32, 64), nn.SiLU())
    """

    op = GROUP_NORM
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("num_groups", num_groups), ("num_channels", num_channels)):
            if not isinstance(size, numbers.Integral):
                raise TypeError(f"GroupNorm: {name} is {type(size).__name__}; expected an integer, such as 32")
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups} and num_channels is {num_channels}; expected a number of "
                "groups that divides the channels"
            )
        # A number of numpy would be an array in compiled code.
        self.num_groups, self.num_channels, self.eps, self.affine = int(num_groups), int(num_channels), eps, affine
        make_weights(self, self.num_channels, affine, affine and bias, device, dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        reset_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        shown = f"{self.num_groups}, {self.num_channels}, eps={self.eps}"
        if self.weight is None:
            return f"{shown}, affine=False"
        return shown if self.bias is not None else f"{shown}, bias=False"
