"""Chains of elementwise operations that models use, each one op. docs/ops/chains.md derives them."""

from __future__ import annotations

import functools
import numbers
from typing import Any

import torch
from torch.nn import functional as F

from retainops import registry
from retainops.dispatch import run
from retainops.ops._check import check_elementwise, check_tensor
from retainops.ops._pointwise import DY, Maths, Pointwise, functions_of, normal, pointwise
from retainops.ops.pointwise import FAMILY
from retainops.registry import Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def softcap(x: Tensor, cap: float | Tensor, *, retain: Retained | None = None) -> Tensor:
    """cap * tanh(x / cap) in one kernel: x, kept within (-cap, cap) smoothly, as Gemma 2 does to its logits.

    Args:
        x: tensor of any floating dtype, layout and device.
        cap: a number above 0, or a tensor that broadcasts with x (which is not checked: that would wait for the GPU).
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = x / cap.

    Returns:
        cap * tanh(x / cap), of the broadcast shape and the promoted dtype; c is held in float32 (float64 for float64).

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        ValueError: cap is a number that is not above 0.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = x / cap, of the broadcast shape.

    Example:
        >>> ro.softcap(logits, 30.0)

    Source: Gemma Team 2024, Gemma 2 (arXiv 2408.00118), section 2; Bello et al. 2016 (arXiv 1611.09940).
    """
    if isinstance(cap, numbers.Real) and not cap > 0:
        raise ValueError(f"softcap: cap is {cap}; expected a number above 0, such as 30.0")
    check_elementwise("softcap", x=x, cap=cap)
    return run(SOFTCAP, (x, cap), retain)


def softcap_reference(x: Any, cap: Any, point: Point) -> Tensor:
    """The definition."""
    c = point("c", x / cap)
    return cap * torch.tanh(c)


def scale_shift(x: Tensor, scale: float | Tensor, shift: float | Tensor, *, retain: Retained | None = None) -> Tensor:
    """x * (1 + scale) + shift in one kernel: the modulation of adaptive norms in diffusion transformers.

    Args:
        x, scale, shift: tensors of any floating dtype, layout and device whose shapes broadcast, or numbers.
        retain: `Retained("scaled")` to keep the gradient with respect to scaled = x * (1 + scale).

    Returns:
        x * (1 + scale) + shift, of the broadcast shape and the promoted dtype.

    Raises:
        TypeError, RuntimeError, KeyError: as of `softcap`.

    Points:
        scaled = x * (1 + scale), of the broadcast shape of x and scale.

    Example:
        >>> ro.scale_shift(norm(x), scale[:, None], shift[:, None])  # (batch, tokens, width), (batch, width)

    Source: Peebles and Xie 2023, Scalable Diffusion Models with Transformers (arXiv 2212.09748).
    """
    check_elementwise("scale_shift", x=x, scale=scale, shift=shift)
    return run(SCALE_SHIFT, (x, scale, shift), retain)


def scale_shift_reference(x: Any, scale: Any, shift: Any, point: Point) -> Tensor:
    """The definition."""
    scaled = point("scaled", x * (1 + scale))
    return scaled + shift


def squared_relu(x: Tensor, *, retain: Retained | None = None) -> Tensor:
    """relu(x)^2 in one kernel.

    Args:
        x: tensor of any floating dtype, layout and device.
        retain: `Retained("r")` to keep the gradient with respect to r = relu(x).

    Returns:
        relu(x)^2, of x's shape and dtype.

    Raises:
        TypeError, RuntimeError, KeyError: as of `softcap`.

    Points:
        r = relu(x), of x's shape.

    Example:
        >>> ro.squared_relu(x)

    Source: So et al. 2021, Primer (arXiv 2109.08668).
    """
    check_tensor("squared_relu", x=x)
    return run(SQUARED_RELU, (x,), retain)


def squared_relu_reference(x: Any, point: Point) -> Tensor:
    """The definition."""
    r = point("r", torch.relu(x))
    return torch.square(r)


def mish(x: Tensor, *, retain: Retained | None = None) -> Tensor:
    """x * tanh(softplus(x)) in one kernel.

    Args:
        x: tensor of any floating dtype, layout and device.
        retain: `Retained("s", "t")` to keep the gradients with respect to s = softplus(x) and t = tanh(s).

    Returns:
        x * tanh(softplus(x)), of x's shape and dtype.

    Raises:
        TypeError, RuntimeError, KeyError: as of `softcap`.

    Points:
        s = softplus(x) and t = tanh(s), of x's shape.

    Example:
        >>> ro.mish(x)

    Source: Misra 2019 (arXiv 1908.08681).
    """
    check_tensor("mish", x=x)
    return run(MISH, (x,), retain)


def mish_reference(x: Any, point: Point) -> Tensor:
    """The definition."""
    s = point("s", F.softplus(x))
    t = point("t", torch.tanh(s))
    return x * t


def siren(x: Tensor, w0: float | Tensor = 30.0, *, retain: Retained | None = None) -> Tensor:
    """sin(w0 * x) in one kernel, the activation of SIREN: `mul_sin(x, w0)`, whose point is c = w0 * x.

    Example:
        >>> ro.siren(linear(x), 30.0, retain=kept)

    Source: Sitzmann et al. 2020 (arXiv 2006.09661).
    """
    check_elementwise("siren", x=x, w0=w0)
    return FAMILY["mul_sin"](x, w0, retain=retain)


registry.alias("mul_sin", "siren", siren)


def _maths(name: str, narrow: bool = False) -> Maths:
    return functools.partial(functions_of, "chains", f"{name}_forward", f"{name}_backward", narrow=narrow)


def _of(x: str, inputs: tuple[int, ...] | None = None, /, **interiors: str) -> list[PointInfo]:
    return [PointInfo(name, formula, f"of {x}", inputs) for name, formula in interiors.items()]


SOFTCAP = pointwise(
    softcap,
    "cap * tanh(x / cap)",
    softcap_reference,
    Pointwise(_maths("softcap"), grads=2, narrow=_maths("softcap", narrow=True)),
    name="softcap",
    points=_of("x and cap, broadcast", c="x / cap"),
    sample=normal(1, 2.5),
)
SCALE_SHIFT = pointwise(
    scale_shift,
    "x * (1 + scale) + shift",
    scale_shift_reference,
    Pointwise(_maths("scale_shift"), grads=3, unread=(2,), equal={2: DY}),
    name="scale_shift",
    points=_of("x and scale, broadcast", (0, 1), scaled="x * (1 + scale)"),
    sample=normal(3),
)
SQUARED_RELU = pointwise(
    squared_relu,
    "relu(x)^2",
    squared_relu_reference,
    Pointwise(_maths("squared_relu"), grads=1),
    name="squared_relu",
    points=_of("x", r="relu(x)"),
    sample=normal(1),
)
MISH = pointwise(
    mish,
    "x * tanh(softplus(x))",
    mish_reference,
    Pointwise(_maths("mish"), grads=1, narrow=_maths("mish", narrow=True)),
    name="mish",
    points=_of("x", s="softplus(x)", t="tanh(s)"),
    sample=normal(1),
)
