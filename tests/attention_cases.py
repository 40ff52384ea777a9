"""Calls of attention of every kind, and what eager PyTorch makes of each with `retain_grad()`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        q, k, v: shapes (B, H, N, D).
        mask: None, or a kind: see `_mask`.
        strided: heads and tokens lie in memory the other way round, as a projection leaves them.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: str | None = None
    causal: bool = False
    gqa: bool = False
    scale: float | None = None
    softcap: float | None = None
    window: int | tuple[int | None, int | None] | None = None
    strided: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """Of the call, besides tensors."""
        return {
            "is_causal": self.causal,
            "scale": self.scale,
            "enable_gqa": self.gqa,
            "softcap": self.softcap,
            "window": self.window,
        }

    def tensors(
        self, dtype: torch.dtype, device: str = "cpu", seed: int = 3
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v, which require grad, and the mask."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(shape: tuple[int, ...]) -> Tensor:
            if self.strided:
                b, h, n, d = shape
                x = torch.randn((b, n, h, d), generator=generator, dtype=torch.float64).to(device, dtype)
                return x.transpose(1, 2).detach().requires_grad_()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

        q, k, v = drawn(self.q), drawn(self.k), drawn(self.v)
        return q, k, v, _mask(self.mask, (*self.q[:-1], self.k[-2]), dtype, device, generator)


def _mask(
    kind: str | None, shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: torch.Generator
) -> Tensor | None:
    if kind is None:
        return None
    *before, n, m = shape

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if kind == "boolean":
        return (drawn(n, m) > -0.5).to(device)
    if kind == "padding":  # one of the batch has fewer keys
        keys = (
            torch.arange(m).expand(before[0], 1, 1, m)
            < torch.tensor([max(m - 3 * i, 1) for i in range(before[0])])[:, None, None, None]
        )
        return keys.to(device)
    if kind == "dead rows":
        return (torch.arange(n)[:, None] % 3 != 1).expand(n, m).logical_and(drawn(n, m) > -1).to(device)
    if kind == "added dead rows":
        dead = torch.arange(n)[:, None] % 4 == 2
        return drawn(n, m).masked_fill(dead, -torch.inf).to(device, dtype)
    if kind == "added":
        return drawn(n, m).to(device, dtype)
    if kind == "added in each head":
        return drawn(1, before[-1], n, m).to(device, dtype)
    if kind == "added to keys":
        return drawn(before[0], 1, 1, m).to(device, dtype)
    assert kind == "added float32"
    return drawn(n, m).to(device, torch.float32)


def _same(b: int, h: int, n: int, d: int, **more: Any) -> Case:
    return Case((b, h, n, d), (b, h, n, d), (b, h, n, d), **more)


def _other(b: int, h: int, n: int, m: int, d: int, **more: Any) -> Case:
    return Case((b, h, n, d), (b, h, m, d), (b, h, m, d), **more)


CASES = {
    "plain": _same(2, 3, 37, 16),
    "one head": _same(1, 1, 16, 64),
    "causal": _same(2, 2, 33, 40, causal=True),
    "causal, fewer queries": _other(2, 2, 9, 33, 16, causal=True),
    "causal, fewer keys": _other(2, 2, 33, 9, 16, causal=True),
    "other keys": _other(1, 3, 21, 34, 64),
    "boolean": _same(2, 2, 19, 16, mask="boolean"),
    "padding": _same(3, 2, 17, 16, mask="padding"),
    "dead rows": _same(1, 2, 13, 16, mask="dead rows"),
    "added": _other(2, 2, 12, 20, 16, mask="added"),
    "added in each head": _same(2, 3, 14, 16, mask="added in each head"),
    "added to keys": _same(2, 2, 15, 16, mask="added to keys"),
    "added float32": _same(1, 2, 15, 16, mask="added float32"),
    "added dead rows": _same(1, 2, 13, 16, mask="added dead rows"),
    "grouped": Case((2, 6, 18, 16), (2, 2, 18, 16), (2, 2, 18, 16), gqa=True),
    "grouped, causal, strided": Case(
        (2, 4, 18, 16), (2, 1, 18, 16), (2, 1, 18, 16), gqa=True, causal=True, strided=True
    ),
    "strided": _same(2, 3, 20, 16, strided=True),
    "scaled": _same(1, 2, 20, 16, scale=0.5),
    "heads of 80": _same(1, 2, 17, 80),
    "heads of 128": _same(1, 2, 17, 128, causal=True),
    "heads of 256": _same(1, 1, 17, 256),
    "other values": Case((1, 2, 15, 16), (1, 2, 11, 16), (1, 2, 11, 24)),
    "one query": _other(2, 2, 1, 20, 16),
    "one key": _other(2, 2, 20, 1, 16),
    "no query": _other(2, 2, 0, 5, 16),
    "no key": _other(2, 2, 5, 0, 16),
    "softcap": _same(1, 2, 20, 16, softcap=1.5),
    "softcap, causal, grouped": Case(
        (1, 4, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16), gqa=True, causal=True, softcap=2.0
    ),
    "softcap, boolean": _same(1, 2, 20, 16, softcap=1.5, mask="dead rows"),
    "softcap, added": _same(2, 2, 20, 16, softcap=1.5, mask="added in each head"),
    "window": _same(1, 2, 25, 16, window=3),
    "window to the left, causal": _same(1, 2, 25, 16, window=(4, 2), causal=True),
    "window to the right": _other(1, 2, 12, 25, 16, window=(None, 3)),
    "window past the keys": _other(1, 2, 25, 9, 16, window=(2, None)),
}
CAUSAL = CASES["causal"]
SMALL = Case((1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3))


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """s, p and o in plain PyTorch, with `retain_grad()` called on each: in the dtype of the inputs."""
    if case.gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.softcap is not None:
        s = case.softcap * (s / case.softcap).tanh()
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else (s + mask).to(s.dtype)
    s = s.masked_fill(~sees(case, s.shape[-2], s.shape[-1], s.device), -torch.inf)
    if s.requires_grad:
        s.retain_grad()
    dead = torch.isneginf(s).all(-1, keepdim=True)
    p = torch.where(dead, 0.0, torch.where(dead, 0.0, s).softmax(-1))
    if p.requires_grad:
        p.retain_grad()
    o = p @ v
    if o.requires_grad:
        o.retain_grad()
    return {"s": s, "p": p, "o": o}


def sees(case: Case, n: int, m: int, device: torch.device) -> Tensor:
    """Which keys a query sees, by causality and window, (n, m): one by one, as they are defined."""
    left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
    rows = [
        [
            not (case.causal and j > i)
            and not (left is not None and j < i - left)
            and not (right is not None and j > i + right)
            for j in range(m)
        ]
        for i in range(n)
    ]
    return torch.tensor(rows, dtype=torch.bool, device=device).reshape(n, m)


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """A leaf of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def loss_of(o: Tensor, seed: int = 5) -> Tensor:
    """A random projection: no gradient of it is near zero for a reason of its own."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
    return (o * direction).sum()


def truth(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, dict[str, Tensor]]:
    """By name, of s, p, o and the inputs: value and grad of eager PyTorch in float64, of inputs rounded to a dtype."""
    return run_eager(case, dtype, torch.float64, device)


def run_eager(
    case: Case, dtype: torch.dtype, computed: torch.dtype, device: str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """As `truth`, computed in another dtype."""
    *qkv, mask = case.tensors(dtype, device)
    q, k, v = (t.detach().to(computed).requires_grad_() for t in qkv)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(computed)
    points = eager(case, q, k, v, mask)
    loss_of(points["o"]).backward()
    found = {name: {"value": t.detach(), "grad": t.grad} for name, t in points.items()}
    return found | {name: {"value": t.detach(), "grad": t.grad} for name, t in (("q", q), ("k", k), ("v", v))}


def error(x: Tensor, true: Tensor) -> float:
    """max |x - true| over elements where neither is infinite or nan; those must be so in both."""
    assert x.shape == true.shape
    assert torch.equal(x.double().isfinite(), true.isfinite())
    apart = (x.double() - true)[true.isfinite()]
    return apart.abs().max().item() if apart.numel() else 0.0


def bar(eager: Tensor, true: Tensor, dtype: torch.dtype, times: float = 1.0, units: float = 1.0) -> float:
    """So many times eager's error, or so many units in the last place of the largest element, whichever is larger."""
    largest = true[true.isfinite()].abs().max().item() if true.isfinite().any() else 0.0
    return max(times * error(eager, true), units * torch.finfo(dtype).eps * largest)
