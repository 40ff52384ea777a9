"""group_norm: y = xhat * weight + bias, xhat normalised over groups of channels. docs/ops/group_norm.md derives it."""

from __future__ import annotations

import math
from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops import _fused
from retainops.ops._check import refuses_dtypes
from retainops.ops._check_group_norm import check_group_norm
from retainops.ops._group_norm import GroupNorm
from retainops.ops.norm import around_mean, rsqrt
from retainops.registry import Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over each group of channels of each element of a batch.

    Args:
        x: (batch, channels, ...), of any floating dtype, layout and device. Channels-last is not copied.
        num_groups: a divisor of channels. A group is so many channels that lie next to each other.
        weight, bias: (channels,), of any floating dtype, or None for none.
        eps: above 0.
        retain: `Retained("xhat")` to keep the gradient of the loss with respect to xhat.

    Returns:
        Of x's shape, dtype and layout. All is computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: x or a weight is not a tensor, x is of integers or bool, num_groups is not an integer, eps is not a
            number, or `retain` is not a `Retained`.
        ValueError: eps is not above 0.
        RuntimeError: x has no channels, num_groups does not divide them, a weight is not of shape (channels,), the
            devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than xhat.

    Points:
        xhat = (x - mean(x)) / sqrt(var(x) + eps), of x's shape, in float32 (float64 for float64).

    Example:
        >>> kept = ro.Retained(xhat=ro.Stats("l2"))
        >>> ro.group_norm(images, 32, norm.weight, norm.bias, retain=kept).sum().backward()

    Source: Wu and He 2018 (arXiv 1803.08494).
    """
    check_group_norm(x, num_groups, weight, bias, eps)
    return run(GROUP_NORM, (x, num_groups, weight, bias, eps), retain)


def group_norm_reference(x: Any, num_groups: int, weight: Any, bias: Any, eps: float, point: Point) -> Tensor:
    """The definition."""
    held = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (num_groups, -1))
    group = list(range(2, held.dim()))
    centred, square = around_mean(held, lambda x: x.mean(group, keepdim=True))
    y = point("xhat", (centred * rsqrt(square + eps)).flatten(1, 2))
    each = (x.shape[1], *(1 for _ in x.shape[2:]))
    if weight is not None:
        y = y * weight.to(y.dtype).view(each)
    if bias is not None:
        y = y + bias.to(y.dtype).view(each)
    return y.to(x.dtype)


def _refuses(x: Any, num_groups: Any, weight: Any = None, bias: Any = None, *_: Any) -> str | None:
    return refuses_dtypes(*(t for t in (x, weight, bias) if t is not None))


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Images of 64 channels, if the rows are a multiple of that; otherwise nothing but batch and channels."""
    *before, n = shape
    rows = math.prod(before)
    whole = (rows, n) if rows % 64 else (rows // 64, 64, n)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).to(device, dtype)

    weights = (drawn(whole[1]) for _ in range(2))
    return drawn(*whole), math.gcd(whole[1], 32), *weights, 1e-5


def _traffic(x: Tensor, *_: Any) -> tuple[int, int, int]:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    size = x.numel() * x.element_size()
    return 2 * size, 3 * size, x.numel() * max(x.element_size(), 4)


GROUP_NORM = _fused.register(
    GroupNorm(),
    name="group_norm",
    call=group_norm,
    formula="xhat * weight + bias",
    points=(PointInfo("xhat", "(x - mean(x)) / sqrt(var(x) + eps)", "of x", inputs=(0,)),),
    reference=group_norm_reference,
    refuses=_refuses,
    sample=_sample,
    traffic=_traffic,
    kind="row",
)
