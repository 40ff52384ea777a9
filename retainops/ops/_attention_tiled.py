"""Attention by tiles of query rows in plain PyTorch, for what PyTorch's own kernels lack: softcap and window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from retainops.dispatch import dense
from retainops.ops import _fused
from retainops.ops._asked import Call, cast, in_4_dims, output_shape, scores_of
from retainops.ops._plan import Output, Plan
from retainops.ops._scores import (
    Scores,
    Tile,
    cut,
    in_groups,
    probability_tile,
    product,
    score_gradient,
    score_tile,
)
from retainops.registry import Op
from retainops.slots import Slot

Tensor = torch.Tensor


def tiled(op: Op, inputs: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    """Attention of these inputs, its output of this dtype; nothing is asked of it."""
    q, k, v, *_ = inputs
    like = torch.empty(output_shape(q, k, v, inputs[7]), dtype=dtype, device="meta")
    output = Output(like.shape, like.stride(), dtype)
    layout = Plan((output,), {}, inputs[0].device)
    return _fused.Fused.apply(op, Tiled(), {}, layout, *inputs, *(None for _ in op.points))


class Tiled:
    """As `_fused.Kernels`."""

    reads = staticmethod(dense)

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        return inputs

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Any, ...]:
        y, (*tensors, _, causal, scale, gqa, softcap, window) = layout.empty(), inputs
        forward_in_tiles(Call(causal, scale, gqa, softcap, window), tensors, y)
        return y, y.dtype

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        *tensors, _, causal, scale, gqa, softcap, window, _dtype = inputs
        do = dys[0]
        assert do is not None
        grads = backward_in_tiles(Call(causal, scale, gqa, softcap, window), tensors, do, needed)
        return [*grads, *[None] * (len(inputs) - 1 - len(grads) + len(op.points))]


def forward_in_tiles(call: Call, tensors: Sequence[Tensor | None], y: Tensor) -> None:
    """Write the output of attention of (q, k, v, mask); it is dense."""
    # There is no gradient yet.
    scores = _scores(call, tensors, torch.zeros((), dtype=y.dtype, device=y.device).expand(y.shape))
    o = in_4_dims(y)
    with torch.autocast(y.device.type, enabled=False):
        for at in cut(scores):
            seen, _ = seen_by(scores, at)
            s, _ = score_tile(seen, at)
            at.of(o).copy_(product(probability_tile(seen, at, s), seen.v[at.batch].to(seen.held)))


def backward_in_tiles(
    call: Call, tensors: Sequence[Tensor | None], do: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of q, k, v and the mask, those that are needed."""
    scores = _scores(call, tensors, do)
    grads = Gradients(scores, tensors[3], needed)
    with torch.autocast(do.device.type, enabled=False):
        for at in cut(scores):
            grads.add(at)
    before = do.shape[:-2]
    of_kv = (*before[:-1], scores.k.shape[-3]) if call.enable_gqa else before
    found: list[Tensor | None] = []
    for x, b, grad in zip(tensors, (before, of_kv, of_kv), grads.of, strict=False):
        assert x is not None
        found.append(None if grad is None else grad.view(*b, *grad.shape[-2:]).sum_to_size(x.shape).to(x.dtype))
    mask = tensors[3]
    return [*found, None if grads.mask is None or mask is None else grads.mask.to(mask.dtype)]


def _scores(call: Call, tensors: Sequence[Tensor | None], do: Tensor) -> Scores:
    casts = any(t is not None and t.dtype != do.dtype for t in tensors[:3])  # as autocast does
    return scores_of(call, cast(tensors, do.dtype, casts), do, None, None)


def seen_by(scores: Scores, at: Tile) -> tuple[Scores, slice]:
    """Scores of the keys alone that some query of a tile may see by causality and window, and which these are."""
    m, (left, right) = scores.shape[-1], scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    first = 0 if left is None else min(max(at.rows.start - left, 0), m)
    last = m if right is None else min(max(at.rows.stop + right, first), m)
    keys = slice(first, last)
    seen = scores._replace(
        k=scores.k[:, :, keys],
        v=scores.v[:, :, keys],
        mask=None if scores.mask is None else scores.mask[..., keys],
        k_at=torch.arange(first, last, device=scores.q.device),
    )
    return seen, keys


class Gradients:
    """The gradients of q, k, v and a mask, a tile at a time.

    Attributes:
        of: of q, k, v in (B, H, N, D), in the dtype that is computed in; None where not needed.
        mask: of the mask, in its own shape.
    """

    def __init__(self, scores: Scores, mask: Tensor | None, needed: Sequence[bool]) -> None:
        self.scores, held = scores, scores.held
        self.of = [
            torch.zeros(t.shape, dtype=held, device=t.device) if need else None
            for t, need in zip((scores.q, scores.k, scores.v), needed, strict=False)
        ]
        self.mask = torch.zeros(mask.shape, dtype=held, device=mask.device) if mask is not None and needed[3] else None
        self.in_4_dims = None if self.mask is None else in_4_dims(self.mask)

    def add(self, at: Tile) -> None:
        """Those of a tile."""
        (scores, keys), (dq, dk, dv) = seen_by(self.scores, at), self.of
        s, capped = score_tile(scores, at)
        p = probability_tile(scores, at, s)
        do, groups = at.of(scores.do).to(scores.held), scores.k.shape[1]
        if dv is not None:
            dv[at.batch, :, keys] += in_groups(p, groups).mT @ in_groups(do, groups)
        dp = product(do, scores.v[at.batch].to(scores.held).mT)
        ds = score_gradient(scores, at, p, dp)
        if self.in_4_dims is not None:
            to = self.in_4_dims
            places = (at.batch, slice(None), at.rows, keys)
            to = to[tuple(place if size > 1 else slice(None) for place, size in zip(places, to.shape, strict=True))]
            to += ds.sum_to_size(to.shape)
        if capped is not None:
            ds = ds * (1 - capped * capped)
        ds = ds.mul_(scores.scale)
        if dq is not None:
            at.of(dq).copy_(product(ds, scores.k[at.batch].to(scores.held)))
        if dk is not None:
            dk[at.batch, :, keys] += in_groups(ds, groups).mT @ in_groups(at.of(scores.q).to(scores.held), groups)
