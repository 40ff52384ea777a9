"""softmax and log_softmax over the last dim, of scale * x with a mask. docs/ops/softmax.md derives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from retainops import registry
from retainops.dispatch import run
from retainops.ops import _fused
from retainops.ops._check import refuses_dtypes, refuses_rows
from retainops.ops._softmax import Softmax, check
from retainops.registry import Op, PointInfo
from retainops.retained import Retained
from retainops.shards import replicated
from retainops.slots import Slot

Tensor = torch.Tensor


def softmax(
    x: Tensor,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """softmax(scale * x) over the last dim, masked, in one kernel each way.

    Args:
        x: (..., n), of any floating dtype, layout and device; any n.
        scale: a number, or a floating-point tensor of no dims (then the reference path is taken).
        mask: None, or a tensor that broadcasts to x's shape. Of dtype bool: True where an element takes part, as in
            `torch.nn.functional.scaled_dot_product_attention`. Floating: added to scale * x; it may require grad.
        causal: x is (..., queries, keys), and key j takes part only for queries i >= j, counted from the top left as by
            `is_causal` of `scaled_dot_product_attention`. It goes with a mask, too.
        retain: `Retained("scaled", "p")` to keep the gradients of the loss with respect to these.

    Returns:
        (..., n), of the dtype that x and a floating mask promote to, contiguous. All is computed in float32 (float64
        for float64). A row of which nothing takes part is NaN, as softmax of nothing but -inf is in PyTorch.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: a mask that does not broadcast to x or is on another device, `causal` for an x of fewer than two
            dims, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than those below.

    Points:
        scaled = scale * x, masked, (..., n): -inf where it is masked.
        p = softmax(scaled), (..., n): the output. To ask for it keeps x for backward, besides p.

    Example:
        >>> kept = ro.Retained("p", scaled=ro.Stats("l2", over="rows"))
        >>> p = ro.softmax(q @ k.mT, q.shape[-1] ** -0.5, causal=True, retain=kept)

    Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax (arXiv 1805.02867).
    """
    check("softmax", x, scale, mask, causal)
    return run(SOFTMAX, (x, scale, mask, causal, None), retain)


def log_softmax(
    x: Tensor,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """log(softmax(scale * x)) over the last dim, masked, in one kernel each way; as `softmax` in all else.

    Points:
        scaled = scale * x, masked, (..., n): -inf where it is masked. There is no p: the logarithm is not taken of a
        probability, and the gradient with respect to one, dy / p, would be infinite where p underflows.

    Example:
        >>> loss = -ro.log_softmax(logits).gather(-1, target[:, None]).mean()
    """
    check("log_softmax", x, scale, mask, causal)
    return run(LOG_SOFTMAX, (x, scale, mask, causal, None), retain)


def softmax_reference(x: Any, scale: Any, mask: Any, causal: bool, *rest: Any) -> Tensor:
    """The definition; `rest` is `point`, or the output that backward has in the place of x and `point`."""
    *saved, point = rest
    if any(p is not None for p in saved):
        p = _held(saved[0])
        scaled = point("scaled", _scaled(x, scale, mask, causal, hidden=0.0)).to(p.dtype)
        return (p * (scaled - (p * scaled).sum(-1, keepdim=True))).to(saved[0].dtype)
    return point("p", torch.softmax(point("scaled", _scaled(x, scale, mask, causal)), -1))


def log_softmax_reference(x: Any, scale: Any, mask: Any, causal: bool, *rest: Any) -> Tensor:
    """The definition; `rest` as of `softmax_reference`."""
    *saved, point = rest
    if any(y is not None for y in saved):
        y = _held(saved[0])
        scaled = point("scaled", _scaled(x, scale, mask, causal, hidden=0.0)).to(y.dtype)
        return (scaled - (y.exp() * scaled).sum(-1, keepdim=True)).to(saved[0].dtype)
    return torch.log_softmax(point("scaled", _scaled(x, scale, mask, causal)), -1)


def _scaled(x: Any, scale: Any, mask: Any, causal: bool, hidden: float = -torch.inf) -> Any:
    scaled = x * scale
    if mask is not None:
        scaled = scaled.masked_fill(mask.logical_not(), hidden) if mask.dtype == torch.bool else scaled + mask
    if causal:
        later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scaled = scaled.masked_fill(replicated(later, scaled), hidden)
    return scaled


def _held(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float32))


def _refuses(x: Any, scale: Any = 1.0, mask: Any = None, causal: Any = False, *_: Any) -> str | None:
    if isinstance(scale, Tensor):
        return "scale is a tensor, and the kernels take a number"
    if not x.dim():
        return "x has no dims"
    return refuses_rows(x) or refuses_dtypes(x, mask if mask is not None and mask.dtype != torch.bool else None)


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return x.to(device, dtype), 0.5, None, False


def _traffic(x: Tensor, *_: Any) -> tuple[int, int, int]:
    """Forward reads x and writes y; backward reads y and dy and writes dx."""
    size = x.numel() * x.element_size()
    return 2 * size, 3 * size, size


def _register(call: Any, formula: str, reference: Any, log: bool, **interiors: str) -> Op:
    alone, beside_x = Softmax(log), Softmax(log, keeps_x=True)

    def start(inputs: tuple[Any, ...], slots: Mapping[str, Slot]) -> Any:
        return _fused.launch(op, beside_x if "p" in slots else alone, inputs, slots)

    op = Op(
        name=call.__name__,
        call=call,
        formula=formula,
        points=tuple(PointInfo(name, value, "of x") for name, value in interiors.items()),
        reference=reference,
        launch=start,
        refuses=_refuses,
        sample=_sample,
        traffic=_traffic,
        kind="row",
    )
    return registry.register(op)


SCALED = "scale * x, masked"
SOFTMAX = _register(softmax, "softmax(scaled)", softmax_reference, log=False, scaled=SCALED, p="softmax(scaled)")
LOG_SOFTMAX = _register(log_softmax, "log(softmax(scaled))", log_softmax_reference, log=True, scaled=SCALED)
