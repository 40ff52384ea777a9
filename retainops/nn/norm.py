"""Norms: RMSNorm, LayerNorm, both of a sum, and GroupNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retainops.nn.point import HoldsPoints
from retainops.ops.group_norm import GROUP_NORM
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM, eps_of


class RMSNorm(HoldsPoints):
    """`ro.rms_norm` in one kernel each way; its points are xhat, and y, which weight multiplies.

    It stands in for `torch.nn.RMSNorm` of one dim, and for those of Hugging Face's models: LLaMA's and its relatives'
    with `round_first=True`, Gemma's with `offset=1.0`. Their state dicts fit.

    Args:
        normalized_shape: n, the size of the last dim; or (n,).
        eps: above 0; None: the machine epsilon of float32 (of float64 for float64), as `torch.nn.RMSNorm` has it.
        elementwise_affine: whether there is a weight. It starts at 1 - offset, so that nothing is scaled.
        offset, round_first: as of `ro.rms_norm`.
        device, dtype: of the weight.

    Shapes:
        x and the output: (..., n).

    Raises:
        TypeError, ValueError: normalized_shape is not one size.

    Example:
        >>> norm = ro.nn.RMSNorm(4096, round_first=True)
        >>> norm.load_state_dict(llama.model.norm.state_dict())
    """

    op = RMS_NORM
    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        *,
        offset: float = 0.0,
        round_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (_one_size(type(self).__name__, normalized_shape),)
        self.eps, self.offset, self.round_first = eps, offset, round_first
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 - offset."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, *self._options(x))

    def _options(self, x: torch.Tensor) -> tuple[Any, ...]:
        eps = eps_of(x) if self.eps is None else self.eps
        return self.weight, eps, self.offset, self.round_first

    def extra_repr(self) -> str:
        shown = [str(self.normalized_shape[0]), f"eps={self.eps}"]
        shown += ["elementwise_affine=False"] * (self.weight is None) + [f"offset={self.offset}"] * bool(self.offset)
        return ", ".join(shown + ["round_first=True"] * self.round_first)


class LayerNorm(HoldsPoints):
    """`ro.layer_norm` in one kernel each way; its point is xhat.

    It stands in for `torch.nn.LayerNorm` of one dim, state dict included.

    Args:
        normalized_shape: n, the size of the last dim; or (n,).
        eps: above 0.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias, besides the weight.
        device, dtype: of both.

    Shapes:
        x and the output: (..., n).

    Raises:
        TypeError, ValueError: normalized_shape is not one size.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), ro.nn.LayerNorm(64))
    """

    op = LAYER_NORM
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | tuple[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n = _one_size(type(self).__name__, normalized_shape)
        self.normalized_shape, self.eps = (n,), eps
        _make_weights(self, n, elementwise_affine, elementwise_affine and bias, device, dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        _reset_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        shown = f"{self.normalized_shape[0]}, eps={self.eps}"
        if self.weight is None:
            return f"{shown}, elementwise_affine=False"
        return shown if self.bias is not None else f"{shown}, bias=False"


class AddRMSNorm(RMSNorm):
    """`ro.add_rms_norm` in one kernel each way: of a residual stream. Its points are summed, xhat and y.

    Arguments and state dict are those of `RMSNorm`.

    Shapes:
        x, residual and both outputs, the normed sum and the sum: (..., n).

    Example:
        >>> h, residual = self.norm(self.attention(h), residual)
    """

    op = ADD_RMS_NORM

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y, summed = self.call(x, residual, *self._options(residual))
        return y, summed


class AddLayerNorm(LayerNorm):
    """`ro.add_layer_norm` in one kernel each way: of a residual stream. Its points are summed and xhat.

    Arguments and state dict are those of `LayerNorm`.

    Shapes:
        x, residual and both outputs, the normed sum and the sum: (..., n).

    Example:
        >>> h, residual = self.norm(self.attention(h), residual)
    """

    op = ADD_LAYER_NORM

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        y, summed = self.call(x, residual, self.weight, self.bias, self.eps)
        return y, summed


class GroupNorm(HoldsPoints):
    """`ro.group_norm`; its point is xhat. It stands in for `torch.nn.GroupNorm`, state dict included.

    Args:
        num_groups: a divisor of num_channels.
        num_channels: the size of dim 1.
        eps: above 0.
        affine: whether there are weight and bias.
        device, dtype: of both.

    Shapes:
        x and the output: (batch, num_channels, ...).

    Raises:
        ValueError: num_groups does not divide num_channels.

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
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups is {num_groups} and num_channels is {num_channels}; expected a number of "
                "groups that divides the channels"
            )
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        _make_weights(self, num_channels, affine, affine, device, dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        _reset_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        shown = f"{self.num_groups}, {self.num_channels}, eps={self.eps}"
        return shown if self.weight is not None else f"{shown}, affine=False"


def _one_size(name: str, normalized_shape: Any) -> int:
    given = normalized_shape
    sizes = (given,) if isinstance(given, int) else given
    if not isinstance(sizes, (tuple, list, torch.Size)) or not all(isinstance(n, int) for n in sizes):
        raise TypeError(
            f"{name}: normalized_shape is {type(given).__name__}; expected an integer, the size of the last dim"
        )
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(
            f"{name}: normalized_shape is {given}; expected one size above 0: the norm is over the last dim, so "
            "flatten the dims to be normalised"
        )
    return sizes[0]


def _make_weights(
    module: LayerNorm | GroupNorm, n: int, weight: bool, bias: bool, device: Any, dtype: torch.dtype | None
) -> None:
    for name, wanted in (("weight", weight), ("bias", bias)):
        parameter = nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if wanted else None
        module.register_parameter(name, parameter)
    _reset_weights(module)


def _reset_weights(module: LayerNorm | GroupNorm) -> None:
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
