"""Attention inside torch.compile: operators that the compiler calls and does not look into.

It would find that backward makes the scores that forward made already, and keep all of them from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops import parcel
from retainops.dispatch import backend_name
from retainops.ops._asked import Asked, Call, answers, cast, output_shape, scores_of, shape_of
from retainops.ops._attention import POINTS
from retainops.ops._attention_tiled import backward_in_tiles, forward_in_tiles
from retainops.ops._scores import Wanted
from retainops.part import Part, Places
from retainops.points import no_grad
from retainops.registry import Op
from retainops.relevance import KINDS, Relevance
from retainops.slots import Slot
from retainops.stats import Stats

Tensor = torch.Tensor
COUNTS = frozenset(("count", "nonfinite", "hist"))
"""Parts that are integers."""


@torch.library.custom_op("retainops::attention_answer", mutates_args=())
def answer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    do: Tensor,
    o: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    window: Sequence[int],
    of_s: str,
    over_s: str,
    at_s: Sequence[int],
    of_p: str,
    over_p: str,
    at_p: Sequence[int],
    kernels: bool,
) -> list[Tensor]:
    """What is asked of s and p, one after the other.

    Args:
        window: left and right; -1: not bounded.
        of_s, of_p: `Slot.parts`, with a blank between them.
        over_s, over_p: as of `Stats`.
        at_s, at_p: as `_as_numbers` has it.
        kernels: use them where they can, unless the backend is "reference" by now.
    """
    call = Call(is_causal, scale, enable_gqa, softcap, _bounds(window))
    shape = torch.Size((*do.shape[:-1], k.shape[-2]))
    names = of_s.split(), of_p.split()
    s = _asked(do, shape, names[0], over_s, _as_places(at_s))
    p = _asked(do, shape, names[1], over_p, _as_places(at_p))
    with torch.autocast(do.device.type, enabled=False):  # whatever is in force around backward
        found = answers(scores_of(call, (q, k, v, mask), do, o, None), shape, s, p, kernels and _kernels())
    tensors = []
    for of, one, parts in zip(names, (s, p), found, strict=True):
        for name in of:
            assert one is not None
            part = one.wanted.tensor if name == "dense" else parts[name]
            assert part is not None
            tensors.append(part.to(_dtype(name, do.dtype)))
    return tensors


@answer.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, do: Tensor, o: Tensor, *others: Any) -> list[Tensor]:
    of_s, over_s, at_s, of_p, over_p, at_p, _ = others[-7:]
    shape = torch.Size((*do.shape[:-1], k.shape[-2]))
    found = []
    for of, over, at in ((of_s, over_s, at_s), (of_p, over_p, at_p)):
        for name in of.split():
            wanted, places = Wanted(over=over), _as_places(at)
            size = _picked_shape(shape, places) if name == "dense" else shape_of(name, wanted, shape)
            found.append(torch.empty(size, dtype=_dtype(name, do.dtype), device=do.device))
    return found


def _asked(do: Tensor, shape: torch.Size, names: Sequence[str], over: str, places: Places) -> Asked | None:
    if not names:
        return None
    dense = "dense" in names
    tensor = torch.empty(_picked_shape(shape, places), dtype=do.dtype, device=do.device) if dense else None
    parts = tuple(name for name in names if name != "dense" and name not in KINDS)
    return Asked(Wanted(tensor, False, parts, over, tuple(name for name in names if name in KINDS)), places)


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a part of a point of this dtype."""
    if name == "dense":
        return dtype
    return torch.int64 if name in COUNTS else torch.promote_types(dtype, torch.float32)


def _picked_shape(shape: torch.Size, places: Places) -> torch.Size:
    sizes = list(shape)
    for dim, at in places:
        sizes[dim] = len(at)
    return torch.Size(sizes)


def _as_numbers(places: Places) -> list[int]:
    """For heads, queries and keys: how many, and which; -1: all."""
    at = dict(places)
    numbers: list[int] = []
    for dim in (-3, -2, -1):
        numbers += [len(at[dim]), *at[dim]] if dim in at else [-1]
    return numbers


def _as_places(numbers: Sequence[int]) -> Places:
    found, i = [], 0
    for dim in (-3, -2, -1):
        size = numbers[i] if numbers else -1
        if size >= 0:
            found.append((dim, tuple(numbers[i + 1 : i + 1 + size])))
        i += 1 + max(size, 0)
    return tuple(found)


@torch.library.custom_op("retainops::attention_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    window: Sequence[int],
) -> Tensor:
    """`forward_in_tiles`."""
    y = q.new_empty(output_shape(q, k, v, enable_gqa))
    forward_in_tiles(Call(is_causal, scale, enable_gqa, softcap, _bounds(window)), (q, k, v, mask), y)
    return y


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: bool, scale: Any, enable_gqa: bool, *__: Any) -> Tensor:
    return q.new_empty(output_shape(q, k, v, enable_gqa))


@torch.library.custom_op("retainops::attention_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    do: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
    window: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """`backward_in_tiles`, the gradients that are needed."""
    call = Call(is_causal, scale, enable_gqa, softcap, _bounds(window))
    grads = backward_in_tiles(call, (q, k, v, mask), do, needed)
    return [grad.contiguous() for grad in grads if grad is not None]


@backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *others: Any) -> list[Tensor]:
    tensors = zip((q, k, v, mask), others[-1], strict=True)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t, need in tensors if t is not None and need]


class Tiled(torch.autograd.Function):
    """Attention in tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        fixed: tuple[Any, ...],
        needed: list[bool],
    ) -> Tensor:
        ctx.fixed, ctx.needed = fixed, needed
        ctx.save_for_backward(q, k, v, mask)
        return forward(q, k, v, mask, *fixed)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        found, needed = backward(*ctx.saved_tensors, do, *ctx.fixed, ctx.needed), ctx.needed
        grads = [found[sum(needed[:i])] if need else None for i, need in enumerate(needed)]
        return *grads, None, None


def tiled(call: Call, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """`_attention_tiled.tiled`, as it is traced."""
    q, k, v, mask = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(dtype) for t in (q, k, v))
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    needed = [t is not None and t.requires_grad for t in (q, k, v, mask)]
    q, k, v = (t.view_as(t) for t in (q, k, v))  # Dynamo refuses one tensor in two places
    return Tiled.apply(q, k, v, mask, _fixed(call), needed)


def _fixed(call: Call) -> tuple[Any, ...]:
    left, right = (-1 if w is None else w for w in call.window)
    return call.is_causal, call.scale, call.enable_gqa, call.softcap, [left, right]


def _bounds(window: Sequence[int]) -> tuple[int | None, int | None]:
    left, right = (None if w < 0 else w for w in window)
    return left, right


def _kernels() -> bool:
    """By the backend that is in force while tracing: backward may run in a thread that does not know of it."""
    return backend_name() != "reference"


# What torch.compiler.assume_constant_result does, without loading torch._dynamo with the library.
_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Ear(torch.autograd.Function):
    """As `_attention.Ear`; its backward returns parcels to the slots' carriers, inputs of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        o: Tensor,
        s: Tensor | None,
        p: Tensor | None,
        call: tuple[Any, ...],
        asked: Any,
        kernels: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.call, ctx.asked, ctx.kernels = call, asked, kernels
        ctx.save_for_backward(o, *tensors)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        o, q, k, v, mask = ctx.saved_tensors
        (of_s, over_s, at_s), (of_p, over_p, at_p) = ctx.asked
        asked = " ".join(of_s), over_s, at_s, " ".join(of_p), over_p, at_p
        found = answer(q, k, v, mask, do, o, *ctx.call, *asked, ctx.kernels)
        s = parcel.pack("s", of_s, *found[: len(of_s)]) if of_s else None
        p = parcel.pack("p", of_p, *found[len(of_s) :]) if of_p else None
        return do, s, p, *[None] * 7


def listen(op: Op, call: Call, o: Tensor, tensors: Sequence[Tensor | None], slots: Mapping[str, Slot]) -> Tensor:
    """As `_attention.listen`, as it is traced."""
    k = tensors[1]
    assert k is not None
    shape = torch.Size((*o.shape[:-1], k.shape[-2]))
    carriers, asked = [], []
    for name in POINTS:
        slot = slots.get(name)
        carriers.append(None if slot is None else slot.carrier)
        asked.append(((), "tensor", []) if slot is None else _request(op, slot, o, shape))
    alone = cast(tensors, o.dtype, torch.is_autocast_enabled(o.device.type))
    return Ear.apply(o, *carriers, _fixed(call), tuple(asked), _kernels(), *alone)


def _request(op: Op, slot: Slot, o: Tensor, shape: torch.Size) -> tuple[tuple[str, ...], str, list[int]]:
    if not o.requires_grad:
        raise no_grad(op.name, slot.name)
    want, over, at = slot.want, "tensor", []
    if isinstance(want, (Stats, Relevance)):
        want.check(op.name, slot.name, shape, o.dtype, o.device)
        over = want.over
    if isinstance(want, Part):
        at = _as_numbers(want.resolve(op.name, slot.name, shape))
    return slot.parts, over, at
