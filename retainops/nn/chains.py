"""Modules of the chains that models use."""

from __future__ import annotations

import numbers

import torch
from torch import nn

from retainops.nn._held import Held, hold, shown
from retainops.nn.point import HoldsPoints
from retainops.ops._random import new_seed
from retainops.registry import find


class SoftCap(HoldsPoints):
    """cap * tanh(x / cap) in one kernel: x, kept within (-cap, cap) smoothly; its point is c = x / cap.

    Args:
        cap: a number above 0, or a tensor that broadcasts with x. An `nn.Parameter` is learned; another tensor is a
            buffer.

    Shapes:
        x: (...); the output: the broadcast shape of x and cap.

    Raises:
        TypeError: `cap` is neither a number nor a tensor.
        ValueError: `cap` is a number that is not above 0.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 1000), ro.nn.SoftCap(30.0))

    Source: Gemma Team 2024, Gemma 2 (arXiv 2408.00118).
    """

    op = find("softcap")
    cap: Held

    def __init__(self, cap: Held) -> None:
        super().__init__()
        if isinstance(cap, numbers.Real) and not cap > 0:
            raise ValueError(f"SoftCap: cap is {cap}; expected a number above 0, such as 30.0")
        hold(self, "cap", cap)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.cap)

    def extra_repr(self) -> str:
        return f"cap={shown(self.cap)}"


class ScaleShift(HoldsPoints):
    """x * (1 + scale) + shift in one kernel, of three inputs; its point is scaled = x * (1 + scale).

    Shapes:
        x, scale, shift: (...), which broadcast; the output: their broadcast shape.

    Example:
        >>> modulate = ro.nn.ScaleShift()
        >>> modulate(norm(x), scale[:, None], shift[:, None])  # (batch, tokens, width), (batch, width) twice

    Source: Peebles and Xie 2023, Scalable Diffusion Models with Transformers (arXiv 2212.09748).
    """

    op = find("scale_shift")

    def __init__(self) -> None:  # so that Python names this class where it is given arguments
        super().__init__()

    def forward(self, x: torch.Tensor, scale: Held, shift: Held) -> torch.Tensor:
        return self.call(x, scale, shift)


class BiasDropoutAdd(HoldsPoints):
    """residual + dropout(x + bias) in one kernel; its points are biased = x + bias and dropped = dropout(biased).

    In eval mode nothing is dropped. The mask is made again in backward and never stored.

    Args:
        p: the probability of an element to be dropped, as of `torch.nn.Dropout`.
        features: the size of a learned `bias`, which starts at zero; None: no bias.
        device, dtype: of the bias.

    Shapes:
        x, residual: (..., features), which broadcast; the output: their broadcast shape.

    Raises:
        ValueError: `p` is not in [0, 1].

    Example:
        >>> self.join = ro.nn.BiasDropoutAdd(0.1, features=512)  # and the linear layer before it has no bias
        >>> x = self.join(self.linear(h), x)
    """

    op = find("bias_dropout_add")
    p: float
    bias: nn.Parameter | None

    def __init__(
        self,
        p: float = 0.5,
        features: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(p, numbers.Real) or not 0 <= p <= 1:
            raise ValueError(f"BiasDropoutAdd: p is {p!r}; expected a probability, a number from 0 to 1")
        self.p = float(p)
        self.register_parameter(
            "bias", None if features is None else nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        bias = 0.0 if self.bias is None else self.bias
        if not self.training or self.p == 0:
            return self.call(x, bias, residual, 0.0, None)
        return self.call(x, bias, residual, self.p, new_seed(x.device))

    def extra_repr(self) -> str:
        return f"p={self.p}" + ("" if self.bias is None else f", features={len(self.bias)}")


class SquaredReLU(HoldsPoints):
    """relu(x)^2 in one kernel; its point is r = relu(x).

    Shapes:
        x and the output: (...).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), ro.nn.SquaredReLU(), nn.Linear(32, 8))

    Source: So et al. 2021, Primer (arXiv 2109.08668).
    """

    op = find("squared_relu")

    def __init__(self) -> None:  # so that Python names this class where it is given arguments
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


class Mish(HoldsPoints):
    """x * tanh(softplus(x)) in one kernel, as `torch.nn.Mish`; its points are s = softplus(x) and t = tanh(s).

    Args:
        inplace: False. It is there because `torch.nn.Mish` has it; no op writes to its input, which backward reads.

    Shapes:
        x and the output: (...).

    Raises:
        ValueError: `inplace` is True.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), ro.nn.Mish(), nn.Linear(32, 8))

    Source: Misra 2019 (arXiv 1908.08681).
    """

    op = find("mish")
    inplace: bool  # of each module: one that a rule fuses has its own

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        if inplace:
            raise ValueError(
                f"Mish: inplace is {inplace!r}; expected False: no op of retainops writes to its input, which backward "
                "reads; leave it out"
            )
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)
