"""Weight and bias of the norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def make_weights(module: nn.Module, n: int, weight: bool, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
    """Register both, None for one that is not wanted, and set them."""
    for name, wanted in (("weight", weight), ("bias", bias)):
        parameter = nn.Parameter(torch.empty(n, device=device, dtype=dtype)) if wanted else None
        module.register_parameter(name, parameter)
    reset_weights(module)


def reset_weights(module: Any) -> None:
    """Set the weight to 1 and the bias to 0."""
    if module.weight is not None:
        nn.init.ones_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
