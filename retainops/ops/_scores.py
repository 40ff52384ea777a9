"""What can be asked of attention's scores and probabilities, answered from what makes them again.

`answer` is the contract of all who answer: here in plain PyTorch, by tiles of query rows, in memory of a tile's rows
times keys; `_scores_kernels.answer` in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from retainops.relevance import KINDS
from retainops.stats import MERGE, count, parts_of

Tensor = torch.Tensor
ELEMENTS = 1 << 21
"""Of a tile of scores: 8 MiB in float32."""


class Scores(NamedTuple):
    """All that makes any tile of the scores again, and of the gradients of scores and probabilities.

    Attributes:
        q: (B, H, Nq, D), any strides.
        k: (B, Hk, Nk, D); Hk divides H, and head h reads k[:, h // (H // Hk)].
        v: (B, Hk, Nk, Dv).
        mask: bool (True: takes part) or of a float dtype (added), which expands to (B, H, Nq, Nk); stride 0 where it is
            broadcast.
        do: (B, H, Nq, Dv), the gradient of the output.
        o: (B, H, Nq, Dv), the output; None: delta is made from tiles, where it is not given.
        lse: (B, H, Nq), float32 (float64 for float64): the logarithm of the sum of exp(s) over all keys; 0 where a row
            sees none; None: made from tiles first.
        scale: what the products of q and k are multiplied by.
        causal: key j takes part for queries i >= j, by their positions.
        window: (left, right): for those with i - left <= j <= i + right; None: not bounded on that side.
        softcap: s = softcap * tanh(scale * q k / softcap), before any mask; None: none.
        q_at, k_at: (Nq,), (Nk,), int64: positions, for causal and window, of queries and keys that were picked; None:
            0, 1, 2, ...
        delta: (B, H, Nq), as lse: rowsum(P * dP) over all keys; None: made from o and do, or from tiles. Where keys
            were picked, lse and delta are of all of them, and given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    do: Tensor
    o: Tensor | None
    lse: Tensor | None
    scale: float
    causal: bool
    window: tuple[int | None, int | None]
    softcap: float | None
    q_at: Tensor | None
    k_at: Tensor | None
    delta: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the scores: (B, H, Nq, Nk)."""
        return torch.Size((*self.q.shape[:-1], self.k.shape[-2]))

    @property
    def held(self) -> torch.dtype:
        """What is computed in."""
        return torch.promote_types(self.q.dtype, torch.float32)


class Wanted(NamedTuple):
    """What is wanted of one point's gradient.

    Attributes:
        tensor: (B, H, Nq, Nk), any strides: where it goes; None: nowhere.
        accumulate: add to what is there.
        parts: of statistics (`Stats.parts`).
        over: "tensor", "rows" or "queries", "channels", "heads", "keys".
        relevance: of "chefer", "legrad", "attn_grad"; of p only.
    """

    tensor: Tensor | None = None
    accumulate: bool = False
    parts: tuple[str, ...] = ()
    over: str = "tensor"
    relevance: tuple[str, ...] = ()

    @property
    def takes_value(self) -> bool:
        """Whether the point's value is needed too."""
        return "act_grad" in self.parts or any(KINDS[name].square for name in self.relevance)


def answer(scores: Scores, s: Wanted | None, p: Wanted | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write what is wanted of the gradients of s and p.

    Returns:
        For s and for p: the parts of statistics and the relevances, by name; of the shapes of `Stats.shape`, and of
        `Relevance`.
    """
    keep_s, keep_p = (None if w is None else Keeper(w, scores) for w in (s, p))
    for at, score, prob, dp in tiles(scores, probabilities=keep_s is not None or (p is not None and p.takes_value)):
        if keep_p is not None:
            keep_p.keep(at, dp, prob)
        if keep_s is not None:
            assert prob is not None
            delta = (prob * dp).sum(-1, keepdim=True) if scores.delta is None else scores.delta[..., at, None]
            keep_s.keep(at, prob * (dp - delta), score)
    return tuple({} if keep is None else keep.found() for keep in (keep_s, keep_p))  # type: ignore[return-value]


def row_tiles(scores: Scores) -> Iterator[slice]:
    """Query rows of a tile, one tile after the other."""
    b, h, n, m = scores.shape
    rows = max(ELEMENTS // max(b * h * m, 1), 1)
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def tiles(scores: Scores, probabilities: bool = True) -> Iterator[tuple[slice, Tensor | None, Tensor | None, Tensor]]:
    """Query rows, and of them s, P and dP; the first two are None unless wanted."""
    k, v = (t.to(scores.held).transpose(-1, -2) for t in (scores.k, scores.v))
    for at in row_tiles(scores):
        s = p = None
        if probabilities:
            s, _ = score_tile(scores, at, k)
            p = probability_tile(scores, at, s)
        yield at, s, p, product(scores.do[..., at, :], v)


def score_tile(scores: Scores, at: slice, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """s of some query rows, and tanh of what was capped; k is (B, Hk, D, Nk), in the dtype that is computed in."""
    s = product(scores.q[..., at, :], k).mul_(scores.scale)
    capped = None
    if scores.softcap is not None:
        capped = s.div_(scores.softcap).tanh_()
        s = capped * scores.softcap
    if scores.mask is not None:
        rows = scores.mask.expand(scores.shape)[..., at, :]
        s = s.masked_fill_(~rows, -torch.inf) if rows.dtype == torch.bool else s.add_(rows)
    if (hidden := hidden_tile(scores, at)) is not None:
        s = s.masked_fill_(hidden, -torch.inf)
    return s, capped


def hidden_tile(scores: Scores, at: slice) -> Tensor | None:
    """True where causal and window let no key in, (rows, Nk); None: they are not there."""
    left, right = scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    if left is None and right is None:
        return None
    device, (n, m) = scores.q.device, scores.shape[-2:]
    i = torch.arange(n, device=device) if scores.q_at is None else scores.q_at
    j = torch.arange(m, device=device) if scores.k_at is None else scores.k_at
    ahead = j - i[at, None]
    if right is None:
        return None if left is None else ahead < -left
    return ahead > right if left is None else (ahead < -left) | (ahead > right)


def probability_tile(scores: Scores, at: slice, s: Tensor) -> Tensor:
    """P of some query rows, from their s; 0 in a row that sees no key."""
    if scores.lse is not None:
        return (s - scores.lse[..., at, None]).exp_()  # exp(-inf) is 0, and a row of those has an lse of 0
    if not s.shape[-1]:
        return s.clone()
    return torch.softmax(s, -1).masked_fill_((s == -torch.inf).all(-1, keepdim=True), 0.0)


def product(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, N, D) @ (B, Hk, D, M) -> (B, H, N, M), in y's dtype; the heads of a group share one y, uncopied."""
    (b, h, n, d), groups = x.shape, y.shape[1]
    x = x.to(y.dtype).reshape(b, groups, h // max(groups, 1) * n, d)
    return (x @ y).view(b, h, n, y.shape[-1])


class Keeper:
    """Takes what is wanted of one point's gradient, some query rows at a time."""

    def __init__(self, wanted: Wanted, scores: Scores) -> None:
        self.wanted, self.shape = wanted, scores.shape
        self.like = torch.empty((), dtype=scores.held, device=scores.q.device)
        self.parts: dict[str, Tensor] = {}

    def keep(self, at: slice, grad: Tensor, value: Tensor | None) -> None:
        """Take the gradient of these rows, and their value if that is wanted."""
        wanted = self.wanted
        if wanted.tensor is not None:
            rows = wanted.tensor[..., at, :]
            rows.add_(grad) if wanted.accumulate else rows.copy_(grad)
        for name, part in self._taken(grad, value).items():
            self._merge(name, at, part)

    def _taken(self, grad: Tensor, value: Tensor | None) -> dict[str, Tensor]:
        names = self.wanted.parts + self.wanted.relevance
        return dict(zip(names, parts_of(names, self.wanted.over, grad, value), strict=True))

    def _merge(self, name: str, at: slice, part: Tensor) -> None:
        if name in KINDS:
            by_rows, dim = KINDS[name].square, -2
        else:
            by_rows, dim = self.wanted.over in ("rows", "queries") and name != "count", -1
        if name == "legrad":  # a mean over all queries
            part = part * ((at.stop - at.start) / self.shape[-2])
        if by_rows:
            size = list(part.shape)
            size[dim] = self.shape[-2]
            whole = self.parts.setdefault(name, part.new_empty(size))
            whole.narrow(dim, at.start, at.stop - at.start).copy_(part)
        else:
            self.parts[name] = MERGE[name](self.parts[name], part) if name in self.parts else part

    def found(self) -> dict[str, Tensor]:
        """All parts, once all rows were kept."""
        if not self.shape[-2]:
            nothing = self.like.expand(self.shape)
            return self._taken(nothing, nothing)
        if "count" in self.parts:
            self.parts["count"] = count(self.like.expand(self.shape), self.wanted.over)
        return self.parts
