"""Norms over the last dim: rms_norm, layer_norm, and both of a sum. docs/ops/norm.md derives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops import _fused
from retainops.ops._check import check_norm, refuses_dtypes, refuses_rows
from retainops.ops._norm import Norm
from retainops.registry import Op, Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dim, in one kernel each way.

    Args:
        x: (..., n), of any floating dtype, layout and device.
        weight: (n,), of any floating dtype, or None for none.
        eps: above 0.
        offset: what is added to weight; 1.0 for Gemma's.
        round_first: round the normalised value to x's dtype before weight, as Hugging Face's LLaMA does; otherwise
            all is computed in float32 and rounded once, as by `torch.nn.functional.rms_norm` and Gemma.
        retain: `Retained("xhat", "y")` to keep the gradients of the loss with respect to these.

    Returns:
        (..., n), of x's dtype; with round_first of what x's and weight's promote to.

    Raises:
        TypeError: x or weight is not a tensor, x is of integers or bool, eps or offset is not a number, or `retain` is
            not a `Retained`.
        ValueError: eps is not above 0.
        RuntimeError: x has no dims or no columns, weight is not of shape (n,), the devices differ, or a point is
            retained that no gradient reaches.
        KeyError: `retain` names another point than those below.

    Points:
        xhat = x / sqrt(mean(x^2) + eps), (..., n), in float32 (float64 for float64).
        y = xhat, rounded to x's dtype if round_first, (..., n): what weight multiplies.

    Example:
        >>> kept = ro.Retained(xhat=ro.Stats("l2", over="rows"))
        >>> ro.rms_norm(x, weight, retain=kept).sum().backward()

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
    """
    check_norm("rms_norm", x, eps, offset, weight=weight)
    return run(RMS_NORM, (x, weight, eps, offset, round_first), retain)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dim, in one kernel each way.

    Args:
        x: (..., n), of any floating dtype, layout and device.
        weight, bias: (n,), of any floating dtype, or None for none.
        eps: above 0.
        retain: `Retained("xhat")` to keep the gradient of the loss with respect to xhat.

    Returns:
        (..., n), of x's dtype. All is computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError, KeyError: as of `rms_norm`.

    Points:
        xhat = (x - mean(x)) / sqrt(var(x) + eps), (..., n), in float32 (float64 for float64).

    Example:
        >>> ro.layer_norm(x, norm.weight, norm.bias, retain=kept)

    Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450).
    """
    check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    return run(LAYER_NORM, (x, weight, bias, eps), retain)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    round_first: bool = False,
    *,
    retain: Retained | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of summed = x + residual, and the sum itself, in one kernel each way.

    Args:
        x, residual: (..., n). They may be one tensor, and may broadcast; then the reference path is taken.
        weight, eps, offset, round_first: as of `rms_norm`.
        retain: `Retained("summed", "xhat", "y")` to keep the gradients with respect to these.

    Returns:
        (the norm, summed), each (..., n), of the dtype that x and residual promote to (the norm with round_first as
        of `rms_norm`). The norm is that of the sum as it is returned, rounded to its dtype.

    Raises:
        TypeError, ValueError, RuntimeError, KeyError: as of `rms_norm`; or x and residual do not
            broadcast.

    Points:
        summed = x + residual, (..., n): its gradient, by both outputs, is also that of x and of residual.
        xhat = summed / sqrt(mean(summed^2) + eps), (..., n), in float32 (float64 for float64).
        y = xhat, rounded to summed's dtype if round_first, (..., n): what weight multiplies.

    Example:
        >>> h, residual = ro.add_rms_norm(attention(h), residual, weight)
    """
    check_norm("add_rms_norm", x, eps, offset, residual=residual, weight=weight)
    return run(ADD_RMS_NORM, (x, residual, weight, eps, offset, round_first), retain)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    retain: Retained | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of summed = x + residual, and the sum itself, in one kernel each way; as `add_rms_norm` in all else.

    Points:
        summed = x + residual, (..., n): its gradient, by both outputs, is also that of x and of residual.
        xhat = (summed - mean(summed)) / sqrt(var(summed) + eps), (..., n), in float32 (float64 for float64).

    Example:
        >>> h, residual = ro.add_layer_norm(attention(h), residual, weight, bias)
    """
    check_norm("add_layer_norm", x, eps, residual=residual, weight=weight, bias=bias)
    return run(ADD_LAYER_NORM, (x, residual, weight, bias, eps), retain)


def eps_of(x: Tensor) -> float:
    """What PyTorch takes for an eps of None: that of the dtype in which it computes, of x in 16 bits float32's."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def rms_norm_reference(x: Any, weight: Any, eps: float, offset: float, round_first: bool, point: Point) -> Tensor:
    """The definition."""
    held = _held(x)
    xhat = point("xhat", held * rsqrt(_mean(held * held) + eps))
    y = point("y", xhat.to(x.dtype) if round_first else xhat)
    if weight is None:
        return y.to(x.dtype)
    if not round_first:
        return (y * (weight.to(held.dtype) + offset)).to(x.dtype)
    wide = weight.to(torch.promote_types(held.dtype, weight.dtype)) + offset  # where 1 + a small weight has room
    return (y * wide).to(torch.promote_types(x.dtype, weight.dtype))


def layer_norm_reference(x: Any, weight: Any, bias: Any, eps: float, point: Point) -> Tensor:
    """The definition."""
    centred, square = around_mean(_held(x), _mean)
    held = centred.dtype
    y = point("xhat", centred * rsqrt(square + eps))
    if weight is not None:
        y = y * weight.to(held)
    if bias is not None:
        y = y + bias.to(held)
    return y.to(x.dtype)


def around_mean(x: Tensor, mean: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What is left of x around its mean, and the mean of its squares.

    The sum that gives a mean is rounded: where hardly anything is left, as in the kernels, the mean of that goes, too.
    It is nothing but rounding, and has no gradient.
    """
    middle = mean(x)
    centred = x - middle
    if not x.is_complex():
        seen, little = centred.detach(), 2.0**-15 * middle.detach()
        centred = centred - torch.where(mean(seen * seen) < little * little, mean(seen), 0.0)
    return centred, mean(centred * centred)


def rsqrt(x: Tensor) -> Tensor:
    """torch.rsqrt(x) of x > 0, to the bit, with the derivative of 1 / sqrt(x).

    Its own has a cube, which of 1e14 is inf in float32.
    """
    r = torch.sqrt(x).reciprocal()
    return r + (torch.rsqrt(x.detach()) - r.detach())


def add_rms_norm_reference(x: Any, residual: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    """The definition."""
    summed = rest[-1]("summed", x + residual)
    return rms_norm_reference(summed, *rest), summed


def add_layer_norm_reference(x: Any, residual: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    """The definition."""
    summed = rest[-1]("summed", x + residual)
    return layer_norm_reference(summed, *rest), summed


def _held(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(x: Tensor) -> Tensor:
    """Over the last dim, which must be there: `x.mean(-1)` takes a number for a row of one."""
    if isinstance(x, Tensor) and x.is_nested:  # whose sum has no backward
        return x.mean(-1, keepdim=True)
    return x.sum(-1, keepdim=True) / x.shape[-1]


def _register(call: Any, formula: str, reference: Any, norm: Norm, **interiors: str) -> Op:
    made_of = (0, 1) if norm.residual else (0,)
    return _fused.register(
        norm,
        name=call.__name__,
        call=call,
        formula=formula,
        points=tuple(PointInfo(name, value, "of x", inputs=made_of) for name, value in interiors.items()),
        reference=reference,
        refuses=functools.partial(_refuses, norm),
        sample=functools.partial(_sample, norm),
        traffic=functools.partial(_traffic, norm),
        outputs=("", "summed") if norm.residual else (),
        kind="row",
    )


def _refuses(norm: Norm, *inputs: Any) -> str | None:
    if norm.residual and inputs[0].shape != inputs[1].shape:
        return "x and residual are of different shapes"
    rest = inputs[1 + norm.residual :]
    if not norm.centred and len(rest) == 4:  # `explain` may have left out what has a default
        weight, _, _, round_first = rest
        if round_first and weight is not None and weight.dtype == torch.float64 != inputs[0].dtype:
            return f"round_first with a weight of torch.float64 and x of {inputs[0].dtype}: the kernels hold both as x"
    return refuses_rows(inputs[0]) or refuses_dtypes(*(x for x in inputs if x is not None))


def _sample(norm: Norm, shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> Any:
    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).to(device, dtype)

    x = [drawn(*shape) for _ in range(1 + norm.residual)]
    weights = [drawn(shape[-1]) for _ in range(1 + norm.centred)]
    return (*x, *weights, 1e-5) if norm.centred else (*x, *weights, 1e-6, 0.0, False)


def _traffic(norm: Norm, *inputs: Any) -> tuple[int, int, int]:
    """Forward reads x and writes y; backward reads x and dy and writes dx; a sum is one more to read and to write."""
    x, residual, *weights = norm.parts(inputs)[:4]
    size, small = x.numel() * x.element_size(), sum(w.numel() * w.element_size() for w in weights if w is not None)
    more = 2 * size if residual is not None else 0
    return 2 * size + more + small, 3 * size + more // 2 + 2 * small, x.numel() * max(x.element_size(), 4)


RMS_NORM = _register(
    rms_norm,
    "xhat * (weight + offset)",
    rms_norm_reference,
    Norm(centred=False, residual=False),
    xhat="x / sqrt(mean(x^2) + eps)",
    y="xhat, rounded to x's dtype if round_first",
)
LAYER_NORM = _register(
    layer_norm,
    "xhat * weight + bias",
    layer_norm_reference,
    Norm(centred=True, residual=False),
    xhat="(x - mean(x)) / sqrt(var(x) + eps)",
)
ADD_RMS_NORM = _register(
    add_rms_norm,
    "xhat * (weight + offset), summed",
    add_rms_norm_reference,
    Norm(centred=False, residual=True),
    summed="x + residual",
    xhat="summed / sqrt(mean(summed^2) + eps)",
    y="xhat, rounded to summed's dtype if round_first",
)
ADD_LAYER_NORM = _register(
    add_layer_norm,
    "xhat * weight + bias, summed",
    add_layer_norm_reference,
    Norm(centred=True, residual=True),
    summed="x + residual",
    xhat="(summed - mean(summed)) / sqrt(var(summed) + eps)",
)
