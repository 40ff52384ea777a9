"""What can be asked of attention's scores and probabilities, answered from what makes them again.

`answer` is the contract of all who answer: here in plain PyTorch, by tiles of query rows, in memory of a tile's rows
times keys; `_scores_kernels.answer` in Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from retainops.relevance import KINDS
from retainops.stats import MERGE, TAKE_VALUE, Stats, count, parts_of

Tensor = torch.Tensor
ELEMENTS = 1 << 21
"""Of a tile of scores: 8 MiB in float32."""
FEWEST_ROWS = 16
"""Of a tile: of fewer rows, a matrix product is slow. It wins over ELEMENTS, where H * Nk is above 131072."""


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
        top: (B, H, Nq), as lse: a number to take off each row of s first, of which lse then is; None: 0. A mask may add
            so much to a whole row (-1e9, to all keys of a padded query) that the sum's logarithm is lost beside it.
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
    top: Tensor | None = None

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
        return not TAKE_VALUE.isdisjoint(self.parts + self.relevance)


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
            keep_s.keep(at, score_gradient(scores, at, prob, dp), score)
    of_s, of_p = ({} if keep is None else keep.found() for keep in (keep_s, keep_p))
    return of_s, of_p


class Tile(NamedTuple):
    """Some elements of the batch, and query rows of all their heads."""

    batch: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """Of (B, H, Nq, ...)."""
        return x[self.batch, :, self.rows]


def cut(scores: Scores) -> Iterator[Tile]:
    """The tiles, one after the other."""
    b, h, n, m = scores.shape
    fits = max(ELEMENTS // max(h * m, 1), 1)  # rows of one element of the batch
    rows = min(max(fits // max(b, 1), FEWEST_ROWS), max(n, 1))
    batch = max(fits // rows, 1)
    for i in range(0, b, batch):
        for j in range(0, n, rows):
            yield Tile(slice(i, min(i + batch, b)), slice(j, min(j + rows, n)))


def tiles(scores: Scores, probabilities: bool = True) -> Iterator[tuple[Tile, Tensor | None, Tensor | None, Tensor]]:
    """Each tile, and of it s, P and dP; the first two are None unless wanted."""
    for at in cut(scores):
        s = p = None
        if probabilities:
            s, _ = score_tile(scores, at)
            p = probability_tile(scores, at, s)
        yield at, s, p, product(at.of(scores.do), scores.v[at.batch].to(scores.held).mT)


def score_tile(scores: Scores, at: Tile) -> tuple[Tensor, Tensor | None]:
    """s, and tanh of what was capped."""
    s = product(at.of(scores.q), scores.k[at.batch].to(scores.held).mT).mul_(scores.scale)
    capped = None
    if scores.softcap is not None:
        capped = s.div_(scores.softcap).tanh_()
        s = capped * scores.softcap
    if scores.mask is not None:
        rows = at.of(scores.mask.expand(scores.shape))
        s = s.masked_fill_(~rows, -torch.inf) if rows.dtype == torch.bool else s.add_(rows)
    if (hidden := hidden_tile(scores, at)) is not None:
        s = s.masked_fill_(hidden, -torch.inf)
    return s, capped


def hidden_tile(scores: Scores, at: Tile) -> Tensor | None:
    """True where causal and window let no key in, (rows, Nk); None: they are not there."""
    left, right = scores.window
    if scores.causal:
        right = 0 if right is None else min(right, 0)
    if left is None and right is None:
        return None
    device, (n, m) = scores.q.device, scores.shape[-2:]
    i = torch.arange(n, device=device) if scores.q_at is None else scores.q_at
    j = torch.arange(m, device=device) if scores.k_at is None else scores.k_at
    ahead = j - i[at.rows, None]
    if right is None:
        return None if left is None else ahead < -left
    return ahead > right if left is None else (ahead < -left) | (ahead > right)


def probability_tile(scores: Scores, at: Tile, s: Tensor) -> Tensor:
    """P, from s; 0 in a row that sees no key."""
    if scores.lse is not None:
        if scores.top is not None:
            s = s - at.of(scores.top).unsqueeze(-1)
        return (s - at.of(scores.lse).unsqueeze(-1)).exp_()  # exp(-inf) is 0, and a row of those has an lse of 0
    if not s.shape[-1]:
        return s.clone()
    return torch.softmax(s, -1).masked_fill_(s.amax(-1, keepdim=True) == -torch.inf, 0.0)


def score_gradient(scores: Scores, at: Tile, p: Tensor, dp: Tensor) -> Tensor:
    """dS of P and dP."""
    if scores.delta is not None:
        return (dp - at.of(scores.delta).unsqueeze(-1)).mul_(p)
    # Of the whole row in hand, and not of the output, which is rounded.
    return (dp - (p * dp).sum(-1, keepdim=True)).mul_(p)


def row_numbers(scores: Scores) -> Scores:
    """With lse, delta and top, for keys to be picked of it."""
    lse = torch.zeros(scores.shape[:-1], dtype=scores.held, device=scores.q.device)
    delta, top = torch.zeros_like(lse), torch.zeros_like(lse)
    for at, s, p, dp in tiles(scores):
        assert s is not None
        assert p is not None
        if s.shape[-1]:
            highest = s.amax(-1)
            highest = highest.masked_fill_(highest == -torch.inf, 0.0)
            of_rows = (s - highest.unsqueeze(-1)).logsumexp(-1)
            at.of(top).copy_(highest)
            at.of(lse).copy_(of_rows.masked_fill_(of_rows == -torch.inf, 0.0))
        at.of(delta).copy_((p * dp).sum(-1))
    return scores._replace(lse=lse, delta=delta, top=top)


def product(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, N, D) @ (B, Hk, D, M) -> (B, H, N, M), in y's dtype; the heads of a group share one y, uncopied."""
    return (in_groups(x.to(y.dtype), y.shape[1]) @ y).view(*x.shape[:-1], y.shape[-1])


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(B, H, N, D) as (B, Hk, H / Hk * N, D): rows of all heads that share a key."""
    b, h, n, d = x.shape
    return x.reshape(b, groups, h // max(groups, 1) * n, d)


class Keeper:
    """Takes what is wanted of one point's gradient, a tile at a time."""

    def __init__(self, wanted: Wanted, scores: Scores) -> None:
        self.wanted, self.shape = wanted, scores.shape
        self.dtype = scores.q.dtype
        self.like = torch.empty((), dtype=scores.held, device=scores.q.device)
        self.parts: dict[str, Tensor] = {}

    def keep(self, at: Tile, grad: Tensor, value: Tensor | None) -> None:
        """Take the gradient of a tile, and the value if that is wanted."""
        wanted = self.wanted
        if wanted.tensor is not None:
            to = at.of(wanted.tensor)
            to.add_(grad) if wanted.accumulate else to.copy_(grad)
        for name, part in self._taken(grad, value).items():
            if name == "legrad":  # a mean over all queries
                part.mul_(grad.shape[-2] / self.shape[-2])
            if name not in self.parts:
                # Zero is neutral: they are sums, or maxima of magnitudes.
                size = part.shape if name == "hist" else self._shape(name)
                self.parts[name] = torch.zeros(size, dtype=part.dtype, device=part.device)
            place = self.parts[name][self._place(name, at)]
            place.copy_(MERGE[name](place, part))

    def _taken(self, grad: Tensor, value: Tensor | None) -> dict[str, Tensor]:
        names = tuple(name for name in self.wanted.parts if name != "count") + self.wanted.relevance
        return dict(zip(names, parts_of(names, self.wanted.over, grad, value, self.dtype), strict=True))

    def _shape(self, name: str) -> torch.Size:
        if name in KINDS:
            return torch.Size((self.shape[0], *self.shape[-2 if KINDS[name].square else -1 :]))
        return Stats("sum", over=self.wanted.over).shape(self.shape)

    def _place(self, name: str, at: Tile) -> Any:
        if name in KINDS:
            return (at.batch, at.rows) if KINDS[name].square else at.batch
        over = self.wanted.over
        if name == "hist" or over in ("tensor", "channels"):
            return ...
        return (at.batch, slice(None), at.rows) if over in ("rows", "queries") else at.batch

    def found(self) -> dict[str, Tensor]:
        """All parts, once all tiles were kept."""
        nothing = self.like.expand(self.shape)
        found = self._taken(nothing, nothing) if not self.shape.numel() else self.parts
        if "count" in self.wanted.parts:
            found["count"] = count(nothing, self.wanted.over)
        return found
