"""From what was asked of attention to what answers it: any leading dims, several requests, parts of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from retainops.dispatch import HAS_TRITON, plain
from retainops.ops import _scores
from retainops.ops._scores import Scores, Wanted
from retainops.part import Places, picked
from retainops.relevance import KINDS
from retainops.stats import HIST_BINS, Stats

if HAS_TRITON:
    from retainops.ops import _scores_kernels

Tensor = torch.Tensor
Parts = dict[str, Tensor]


class Call(NamedTuple):
    """Of a call's arguments, those that are no tensors.

    Attributes:
        is_causal, scale, enable_gqa, softcap: as of `attention`.
        window: (left, right).
    """

    is_causal: bool
    scale: float | None
    enable_gqa: bool
    softcap: float | None
    window: tuple[int | None, int | None]


class Asked(NamedTuple):
    """What is asked of one point.

    Attributes:
        wanted: its tensor has as many dims as the point.
        places: of the scores, to which it goes; (): all of them.
    """

    wanted: Wanted
    places: Places = ()


def cast(tensors: Sequence[Tensor | None], dtype: torch.dtype, casts: bool) -> list[Tensor | None]:
    """As autocast did, if it does."""
    alone = [None if t is None else t.detach() for t in tensors]
    return [t if t is None or not casts or t.dtype == torch.bool else t.to(dtype) for t in alone]


def output_shape(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Of attention: leading dims broadcast, those of heads by groups."""
    if enable_gqa:
        before = (*torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3]), q.shape[-3])
    else:
        before = tuple(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2]))
    return (*before, q.shape[-2], v.shape[-1])


def scores_of(call: Call, tensors: Sequence[Tensor | None], do: Tensor, o: Tensor | None, lse: Tensor | None) -> Scores:
    """The scores of a call of (q, k, v, mask), in dims (B, H, N, D); lse has these already."""
    q, k, v, mask = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    before, of_scores = do.shape[:-2], (*do.shape[:-1], k.shape[-2])
    if call.enable_gqa and k.shape[-3] != v.shape[-3]:  # the groups have no one size
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    kv_before = (*before[:-1], k.shape[-3]) if call.enable_gqa else before
    q = q.expand(*before, *q.shape[-2:])
    k, v = (t.expand(*kv_before, *t.shape[-2:]) for t in (k, v))
    return Scores(
        q=in_4_dims(q),
        k=in_4_dims(k),
        v=in_4_dims(v),
        mask=None if mask is None else in_4_dims(mask.expand(of_scores)),
        do=in_4_dims(do),
        o=None if o is None else in_4_dims(o),
        lse=lse,
        scale=default_scale(q) if call.scale is None else call.scale,
        causal=call.is_causal,
        window=call.window,
        softcap=call.softcap,
        q_at=None,
        k_at=None,
    )


def default_scale(q: Any) -> float:
    """1 / sqrt(D); of no columns, whose products are 0, any number."""
    return 1 / math.sqrt(max(q.shape[-1], 1))


def in_4_dims(x: Tensor) -> Tensor:
    """(..., H, N, D) as (B, H, N, D): a view, wherever it can be."""
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x.reshape(-1, *x.shape[-3:]) if x.dim() > 4 and x.shape.numel() else x.flatten(0, -4)


def answers(scores: Scores, shape: torch.Size, s: Asked | None, p: Asked | None, kernels: bool) -> tuple[Parts, Parts]:
    """Write what was asked of s and of p; the parts of statistics and the relevances of each.

    Args:
        scores: of the whole call.
        shape: of its scores, in as many dims as they have.
        s, p: what of them.
        kernels: use the kernels where they can.
    """
    if s is not None and p is not None and s.places != p.places:
        return answers(scores, shape, s, None, kernels)[0], answers(scores, shape, None, p, kernels)[1]
    places = next((asked.places for asked in (s, p) if asked is not None), ())
    wanted = [None if asked is None else in_4_dims_of(asked.wanted) for asked in (s, p)]
    found = _answer(scores, wanted[0], wanted[1], places, kernels)
    for asked, w in zip((s, p), wanted, strict=True):
        to, there = (None, None) if asked is None or w is None else (asked.wanted.tensor, w.tensor)
        if to is not None and there is not None and there.data_ptr() != to.data_ptr():
            to.copy_(there.view(to.shape))
    of_s, of_p = (_in_dims(parts, w, shape) for parts, w in zip(found, wanted, strict=True))
    return of_s, of_p


def in_4_dims_of(wanted: Wanted) -> Wanted:
    """Where it goes in dims (B, H, Nq, Nk): a copy of a buffer whose dims before the last three do not merge."""
    return wanted if wanted.tensor is None else wanted._replace(tensor=in_4_dims(wanted.tensor.detach()))


def _answer(scores: Scores, s: Wanted | None, p: Wanted | None, places: Places, kernels: bool) -> tuple[Parts, Parts]:
    kernels = kernels and HAS_TRITON and all(plain(t) for t in _tensors(scores))
    if not kernels:
        scores = scores._replace(lse=None, o=None)  # the tiles make them again, nearer to the truth
    if places:
        scores = picked_of(scores, places, kernels, takes_rows=s is not None or (p is not None and p.takes_value))
    if kernels and _scores_kernels.refuses(scores, s, p) is None:
        return _scores_kernels.answer(scores, s, p)
    return _scores.answer(scores, s, p)


def _tensors(scores: Scores) -> list[Tensor]:
    return [x for x in scores if isinstance(x, Tensor)]


def picked_of(scores: Scores, places: Places, kernels: bool, takes_rows: bool = True) -> Scores:
    """The scores of chosen heads, queries and keys: as few as there are of them.

    takes_rows: p is of account, and so, where keys are chosen, the numbers of whole rows.
    """
    at = dict(places)
    h, n, m = scores.shape[1:]
    if -3 in at:
        groups = h // scores.k.shape[1]
        of_heads, of_groups = ((-3, at[-3]),), ((-3, tuple(i // groups for i in at[-3])),)
        scores = _picked(scores, of_heads, ("q", "do", "o", "mask"))
        scores = _picked(scores, of_groups, ("k", "v"))
        scores = _picked(scores, ((-2, at[-3]),), ("lse",))
    if -2 in at:
        scores = _picked(scores, ((-2, at[-2]),), ("q", "do", "o", "mask"))
        scores = _picked(scores, ((-1, at[-2]),), ("lse",))
        scores = scores._replace(q_at=picked(torch.arange(n, device=scores.q.device), ((-1, at[-2]),)))
    if -1 in at:
        if takes_rows:
            scores = _with_row_numbers(scores, kernels)
        scores = _picked(scores, ((-2, at[-1]),), ("k", "v"))
        scores = _picked(scores, ((-1, at[-1]),), ("mask",))
        scores = scores._replace(k_at=picked(torch.arange(m, device=scores.q.device), ((-1, at[-1]),)))
    return scores


def _with_row_numbers(scores: Scores, kernels: bool) -> Scores:
    if kernels and _scores_kernels.refuses(scores, None, None) is None:
        scores = _scores_kernels.with_lse(scores)
        return scores._replace(delta=_scores_kernels.delta_of(scores))
    return _scores.row_numbers(scores)


def _picked(scores: Scores, places: Places, names: Sequence[str]) -> Scores:
    tensors: dict[str, Any] = {name: getattr(scores, name) for name in names}
    tensors = {name: pick(x, places) for name, x in tensors.items() if x is not None}
    return scores._replace(**tensors)


def pick(x: Tensor, places: Places) -> Tensor:
    """`picked`, of which a broadcast dim stays one."""
    for dim, at in places:
        if at and not x.stride(dim):  # as many of the same, whichever they are
            x = x.narrow(dim, 0, 1).expand(_with(x.shape, dim, len(at)))
        else:
            x = picked(x, ((dim, at),))
    return x


def _with(shape: torch.Size, dim: int, size: int) -> torch.Size:
    sizes = list(shape)
    sizes[dim] = size
    return torch.Size(sizes)


def _in_dims(parts: Parts, wanted: Wanted | None, shape: torch.Size) -> Parts:
    """Parts of (B, H, Nq, Nk) as those of the point's own shape."""
    if wanted is None:
        return {}
    return {name: part.reshape(shape_of(name, wanted, shape)) for name, part in parts.items()}


def shape_of(name: str, wanted: Wanted, shape: torch.Size) -> torch.Size:
    """Of a part of a point of this shape."""
    if name in KINDS:
        return torch.Size((*shape[:-3], *shape[-2 if KINDS[name].square else -1 :]))
    if name == "hist":
        return torch.Size((HIST_BINS,))
    return torch.Size(()) if name == "count" else Stats("sum", over=wanted.over).shape(shape)
