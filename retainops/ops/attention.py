"""Scaled dot product attention, whose scores and probabilities can be asked for. docs/ops/attention.md derives it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from retainops import registry
from retainops.dispatch import HAS_TRITON, ambient, backend_name, dense, requested, transformed, why_reference
from retainops.ops import _attention_compiled
from retainops.ops._asked import Call, cast, default_scale, output_shape, scores_of
from retainops.ops._attention import POINTS, listen, lse_of, reached
from retainops.ops._attention_tiled import tiled
from retainops.ops._check import check_tensor, refuses_dtypes
from retainops.ops._check_attention import (
    Window,
    autocasts,
    bounds,
    check,
    check_head_sizes,
    product_dtype,
    sdpa,
    validate,
)
from retainops.points import reader, tap
from retainops.registry import Op, Point, PointInfo
from retainops.retained import Retained
from retainops.shards import replicated
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.ops import _scores_kernels

Tensor = torch.Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    softcap: float | None = None,
    window: Window = None,
    retain: Retained | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, whose scores and probabilities can be asked for.

    Without softcap, window and retain it is that function and nothing else. With retain its kernels still make the
    output and the gradients of q, k and v, to the same bits (but with dropout); what was asked for is made again from
    q, k and v in backward, tile by tile, and never exists as a whole unless it was asked for as a whole.

    Args:
        q: (..., H, Nq, D), of a floating dtype.
        k: (..., H, Nk, D); with enable_gqa (..., Hk, Nk, D), where Hk divides H.
        v: (..., H, Nk, Dv), or of Hk heads, as k.
        attn_mask: what broadcasts to (..., H, Nq, Nk). Of dtype bool: True where a key takes part. Floating: added.
        dropout_p, is_causal, scale, enable_gqa: as of `scaled_dot_product_attention`: dropout is there whenever
            dropout_p is, causality counts from the top left, and scale None is 1 / sqrt(D).
        softcap: c makes scores c * tanh(score / c), before any mask.
        window: query i sees keys i - left to i + right of (left, right); None: not bounded on that side; an int w is
            (w, w). It counts from the top left, and goes with a mask and is_causal.
        retain: `Retained("s", "p", "o")` to keep the gradients of these, or forms of them: `Part`, `Stats`, of p
            `Relevance`.

    Returns:
        (..., H, Nq, Dv), of q's dtype (autocast: of that which q is cast to). A query that sees no key is 0. With
        retain it is a view, on which PyTorch refuses in-place operations; use out-of-place ones.

    Raises:
        RuntimeError, TypeError, ValueError: as of `scaled_dot_product_attention`; a softcap not above 0, a window that
            is none, a point retained that no gradient reaches, a `Relevance` where it has no meaning.
        IndexError: a `Part` out of range.
        KeyError: `retain` names another point than those below.

    Points:
        s = scale * q @ k.mT, capped, masked, (..., H, Nq, Nk): what enters the softmax; -inf where masked.
        p = softmax(s), (..., H, Nq, Nk): before dropout, whose factors its gradient contains. 0 for a query that sees
            no key.
        o = p @ v, (..., H, Nq, Dv): the output.

        With dropout, s and p are kept by PyTorch's operations in memory of (..., H, Nq, Nk).

    Example:
        >>> kept = ro.Retained(p=ro.Relevance("chefer"), s=ro.Stats("l2", over="heads"))
        >>> ro.attention(q, k, v, is_causal=True, retain=kept).sum().backward()
        >>> kept.p.chefer  # (batch, N, N)

    Source: Dao 2023 (arXiv 2307.08691) for making tiles of scores again.
    """
    check_head_sizes(q, k)
    if retain is None and softcap is None and window is None:
        return sdpa((q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    requests = () if retain is None else (retain,)
    return attention_of((q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, softcap, window), requests)


def attention_of(inputs: tuple[Any, ...], requests: Sequence[Any]) -> Tensor:
    """`attention` of these inputs, for several requests at once."""
    *tensors, dropout_p, is_causal, scale, enable_gqa, softcap, window = inputs + (None,) * (10 - len(inputs))
    check(softcap, window, requests)
    if isinstance(scale, Tensor) and not (torch.compiler.is_compiling() or scale.dim() or scale.requires_grad):
        scale = float(scale)  # as PyTorch's function does, which refuses the others
    call = Call(is_causal, scale, enable_gqa, softcap, bounds(window))
    inputs = (*tensors, dropout_p, *call)
    check_tensor("attention", **dict(zip(("q", "k", "v"), tensors, strict=False)))
    if tensors[3] is not None:
        check_tensor("attention", attn_mask=tensors[3])
    if any(t is not None and t.is_nested for t in tensors):
        raise RuntimeError("attention: a nested tensor with retain, softcap or window; pad it, and mask the padding")
    each = [requested(ATTENTION, inputs, retain) for retain in requests]
    of_scores = any(name in slots for slots in each for name in POINTS)
    compiling = torch.compiler.is_compiling()
    if (why := why_definition(inputs, of_scores)) is not None:
        if of_scores:
            refuse(why)
        validate(inputs)
        definition: Any = attention_reference
        return definition(*(reached(inputs) if of_scores else inputs), several_readers(each))
    if is_plain(inputs):
        o = sdpa(inputs)
    elif compiling:
        validate(inputs)
        o = _attention_compiled.tiled(call, tensors, product_dtype(tensors[0]))
    else:
        validate(inputs)
        o = tiled(ATTENTION, inputs, product_dtype(tensors[0]))
    kernels = of_scores and not compiling and on_kernels(inputs)
    # An added mask may leave it no room for the logarithm of the sum; in float32 the scores' maximum alone does not.
    added = tensors[3] is not None and tensors[3].dtype != torch.bool
    lse = lse_of(o) if kernels and not added and o.dtype != torch.float32 else None
    if of_scores and not compiling:
        o = listen(ATTENTION, call, o, tensors, each, kernels, lse)
    for slots in each:
        if compiling and any(name in slots for name in POINTS):
            o = _attention_compiled.listen(ATTENTION, call, o, tensors, slots)
    for slots in each:
        if "o" in slots:
            o = tap("attention", slots["o"], o)
    return o


def why_definition(inputs: tuple[Any, ...], of_scores: bool) -> str | None:
    """Why the definition itself must run, all of its scores in memory; None: it need not."""
    q, k, v, mask, dropout_p, _, _, enable_gqa, *_ = inputs
    tensors, is_tiled = (q, k, v, mask), not is_plain(inputs)
    if dropout_p and (of_scores or is_tiled):
        return "dropout_p is not 0"
    if is_tiled and enable_gqa and k.shape[-3] != v.shape[-3]:
        return "k and v have not the same heads"
    if is_tiled and mask is not None and mask.requires_grad and q.dim() > 4:
        return "the mask of several dims before the heads requires grad"
    if torch.compiler.is_compiling():  # what is left is nothing Dynamo can trace
        return None
    if around := ambient() if is_tiled else transformed():
        return around
    if not all(dense(t) for t in tensors if t is not None):
        return "an input is not dense memory"
    return refuses_dtypes(*(t for t in tensors if t is not None and t.dtype != torch.bool))


def is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether PyTorch's kernels can make the output."""
    softcap, window = inputs[-2:]
    return softcap is None and window == (None, None)


def on_kernels(inputs: tuple[Any, ...]) -> bool:
    """Whether the scores are made again by the kernels."""
    if (why := why_reference(ATTENTION, inputs[:-1])) is not None:
        refuse(why)
    return why is None


def refuse(why: str) -> None:
    """Raise where nothing but the kernels will do."""
    if not torch.compiler.is_compiling() and backend_name() == "triton":
        raise RuntimeError(
            f'attention: the backend is "triton", and the kernels cannot take this call: {why}; '
            'use backend("auto") to let it take the reference path'
        )


def several_readers(requests: Sequence[Mapping[str, Slot]]) -> Point:
    """A `point` that hands to the slots of several requests."""
    points = [reader("attention", slots) for slots in requests]

    def point(name: str, value: Tensor) -> Tensor:
        for each in points:
            value = each(name, value)
        return value

    return point


def attention_reference(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *rest: Any,
) -> Tensor:
    """The definition; `rest` is `point`, or softcap, window and `point`."""
    *bounded, point = rest
    softcap, window = bounded or (None, None)
    casts, dtype = autocasts(q), product_dtype(q)
    if casts:
        q, k, v = (t.to(dtype) for t in (q, k, v))
        attn_mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(dtype)
    # Values may have leading dims that neither queries nor keys have: points have all of them.
    q = q.expand(*output_shape(q, k, v, enable_gqa)[:-2], *q.shape[-2:])
    with torch.autocast(q.device.type, enabled=False) if casts else contextlib.nullcontext():
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        s = q @ k.transpose(-2, -1) * (default_scale(q) if scale is None else scale)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if attn_mask is not None:
            is_boolean = attn_mask.dtype == torch.bool
            s = s.masked_fill(attn_mask.logical_not(), -torch.inf) if is_boolean else (s + attn_mask).to(s.dtype)
        if is_causal or window is not None:
            s = s.masked_fill(replicated(hidden(s, is_causal, window), s), -torch.inf)
        s = point("s", s)
        # A row that sees no key must be gone before the softmax: nan of it would come back in backward.
        dead = (s == -torch.inf).all(-1, keepdim=True)
        p = point("p", torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0))
        return point("o", F.dropout(p, dropout_p) @ v)


def hidden(s: Tensor, causal: bool, window: Window) -> Tensor:
    """True where causality and window let no key in, (Nq, Nk)."""
    left, right = bounds(window)
    none = torch.zeros(s.shape[-2:], dtype=torch.bool, device=s.device)
    every = ~none
    if causal:
        right = 0 if right is None else min(right, 0)
    before = none if left is None else every.tril(-left - 1)
    return before if right is None else before | every.triu(right + 1)


def _refuses(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: Any = 0.0, *rest: Any) -> str | None:
    """Of the kernels that make the scores again."""
    if dropout_p:
        return "dropout_p is not 0"
    tensors = (q, k, v, attn_mask)
    if why := refuses_dtypes(*(t for t in tensors if t is not None and t.dtype != torch.bool)):
        return why
    is_causal, scale, enable_gqa, softcap = (*rest, *(False, None, False, None)[len(rest) :])[:4]
    call = Call(is_causal, scale, enable_gqa, softcap, (None, None))
    o = q.new_empty(()).to(product_dtype(q)).expand(output_shape(q, k, v, call.enable_gqa))
    scores = scores_of(call, cast(tensors, o.dtype, autocasts(q)), o, None, None)
    return _scores_kernels.refuses(scores, None, None) if scores.shape.numel() else None


def _launch(inputs: tuple[Any, ...], slots: Mapping[str, Slot]) -> Tensor:
    return attention_of(inputs, (Retained.of(slots),) if slots else ())


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Self-attention of (..., N, H * D): heads of 64 where they fit, else two heads of all columns."""
    n, width = (1, 1, *shape)[-2:]
    heads, d = (width // 64, 64) if width % 64 == 0 else (2, width)
    size = (shape[:-2].numel(), heads, n, d)

    def drawn() -> Tensor:
        x = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64)
        return x.to(device, dtype)

    return drawn(), drawn(), drawn(), None, 0.0, True, None, False


def _traffic(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[int, int, int]:
    """Forward reads q, k, v and writes o; backward reads these and do, and writes dq, dk, dv."""
    read, out = (q.numel() + k.numel() + v.numel()) * q.element_size(), q.numel() * q.element_size()
    return read + out, 2 * (read + out), q.shape[:-1].numel() * k.shape[-2] * q.element_size()


ATTENTION = registry.register(
    Op(
        name="attention",
        call=attention,
        formula="softmax(scale * q @ k.mT) @ v",
        points=(
            PointInfo("s", "scale * q @ k.mT, capped, masked", "(..., H, Nq, Nk)"),
            PointInfo("p", "softmax(s)", "(..., H, Nq, Nk)"),
            PointInfo("o", "p @ v", "(..., H, Nq, Dv)"),
        ),
        reference=attention_reference,
        launch=_launch,
        refuses=_refuses,
        sample=_sample,
        traffic=_traffic,
        kind="attention",
    )
)
