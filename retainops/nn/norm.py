"""Norms over the last dim: RMSNorm, LayerNorm, and both of a sum."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import nn

from retainops.nn._affine import make_weights, reset_weights
from retainops.nn.point import HoldsPoints
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM, eps_of


class RMSNorm(HoldsPoints):
    """`ro.rms_norm` in one kernel each way; its points are xhat, and y, which weight multiplies.

    It stands in for those of Hugging Face's models: LLaMA's and its relatives' with `round_first=True`, Gemma's with
    `offset=1.0`; and, with `eps=None`, for `torch.nn.RMSNorm` of one dim. Their state dicts fit.

    Args:
        normalized_shape: n, the size of the last dim; or (n,).
        eps: above 0. The default is that of Hugging Face's models, and not of `torch.nn.RMSNorm`, which is None: the
            machine epsilon of float32 (of float64 for float64).
        elementwise_affine: whether there is a weight. It starts at 1 - offset, so that nothing is scaled.
        device, dtype: of the weight.
        offset, round_first: as of `ro.rms_norm`.

    Shapes:
        x and the output: (..., n).

    Raises:
        TypeError, ValueError: normalized_shape is not one size.
        RuntimeError: in forward, the last dim is of another size.

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
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        round_first: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = (_one_size(type(self).__name__, normalized_shape),)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.offset, self.round_first = offset, round_first
        weight = torch.empty(self.normalized_shape, device=device, dtype=dtype) if elementwise_affine else None
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 - offset."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_size(self, x)
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
        RuntimeError: in forward, the last dim is of another size.

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
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n = _one_size(type(self).__name__, normalized_shape)
        self.normalized_shape, self.eps, self.elementwise_affine = (n,), eps, elementwise_affine
        make_weights(self, n, elementwise_affine, elementwise_affine and bias, device, dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        reset_weights(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_size(self, x)
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
        _check_size(self, x, residual)
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
        _check_size(self, x, residual)
        y, summed = self.call(x, residual, self.weight, self.bias, self.eps)
        return y, summed


def _one_size(name: str, normalized_shape: Any) -> int:
    given = normalized_shape
    sizes = (given,) if isinstance(given, numbers.Integral) else given
    if not isinstance(sizes, (tuple, list, torch.Size)) or not all(isinstance(n, numbers.Integral) for n in sizes):
        raise TypeError(
            f"{name}: normalized_shape is {type(given).__name__}; expected an integer, the size of the last dim"
        )
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(
            f"{name}: normalized_shape is {given}; expected one size above 0: the norm is over the last dim, so "
            "flatten the dims to be normalised"
        )
    return int(sizes[0])


def _check_size(module: RMSNorm | LayerNorm, *inputs: torch.Tensor) -> None:
    """The last dim, of a sum too, where no weight holds it to the size.

    Raises:
        RuntimeError: it is of another size.
    """
    if module.weight is not None or not all(isinstance(x, torch.Tensor) for x in inputs):
        return  # the op refuses what does not go with the weight, and what is no tensor
    shape = getattr(module, "normalized_shape", None)  # a module that a user's rule fused may have none, or a number
    n = shape[-1] if isinstance(shape, (tuple, list)) else shape
    if n is not None and max([x.shape[-1] if x.dim() else 1 for x in inputs]) != n:  # of a sum a size of 1 broadcasts
        given = f"x has shape {tuple(inputs[0].shape)}"
        if len(inputs) > 1:
            given += f" and residual has shape {tuple(inputs[1].shape)}"
        raise RuntimeError(
            f"{type(module).__name__}: {given}; expected (..., {n}), since normalized_shape is {n}: move the dim to be "
            "normalised to the end with .movedim(), or make the module with its size"
        )
