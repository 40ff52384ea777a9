"""Relevance: what a map of "who mattered to whom" needs of attention's probabilities and their gradient, and no more.

Each is a mean over heads, so that no tensor of (heads, queries, keys) need exist. They are kept like the parts of
statistics: over uses and backward calls they add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

HEADS = -3
"""The dim of heads in (..., heads, queries, keys)."""


@dataclass(frozen=True)
class Kind:
    """One relevance.

    Attributes:
        formula: of P and dP.
        of: its value, of the gradient dP and of P; P may be None where `square` is False.
        square: it is of each query and each key, to be multiplied over layers: queries and keys are the same tokens.
    """

    formula: str
    of: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    square: bool


def _attn_grad(g: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    assert p is not None
    return _mean(p * g, HEADS)


def _chefer(g: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    assert p is not None
    return _mean((p * g).relu(), HEADS)


def _legrad(g: torch.Tensor, p: torch.Tensor | None) -> torch.Tensor:
    return _mean(g.relu(), HEADS, -2)


def _mean(x: torch.Tensor, *dims: int) -> torch.Tensor:
    """The mean; 0 of nothing."""
    return x.sum(dims) / max(math.prod([x.shape[dim] for dim in dims]), 1)


KINDS: dict[str, Kind] = {
    "chefer": Kind("mean over heads of relu(P * dP)", _chefer, True),
    "legrad": Kind("mean over heads and queries of relu(dP)", _legrad, False),
    "attn_grad": Kind("mean over heads of P * dP", _attn_grad, True),
}


class Relevance:
    """Ask attention for relevance instead of the gradient of its probabilities: nothing of (heads, N, N) exists.

    With P the probabilities and dP the gradient of the loss with respect to them:

        chefer     mean over heads of relu(P * dP)              (batch, queries, keys)
        attn_grad  mean over heads of P * dP                    (batch, queries, keys)
        legrad     mean over heads and queries of relu(dP)      (batch, keys)

    Each becomes an attribute of the slot, in float32 (float64 for float64); None before backward. Over several uses and
    backward calls they add up, until `reset()`. It is for the point `p` of attention.

    Args:
        *names: of "chefer", "attn_grad" and "legrad". The first two are multiplied over layers, and so are of
            self-attention alone: as many queries as keys.

    Raises:
        TypeError: a name is not a string.
        ValueError: nothing is named, or a name is unknown. Later, by the op: for another point than `p`, no dim of
            heads, or "chefer" and "attn_grad" of attention to other tokens.

    Example:
        >>> kept = ro.Retained(p=ro.Relevance("chefer", "legrad"))
        >>> ro.attention(q, k, v, retain=kept).sum().backward()
        >>> kept.p.chefer, kept.p.legrad

    Source: Chefer et al. 2021 (arXiv 2103.15679) and Bousselham et al. 2024 (arXiv 2404.03214).
    """

    __slots__ = ("names",)
    grad = False
    over = "tensor"  # its shape is its own

    def __init__(self, *names: str) -> None:
        if not names:
            raise ValueError(f"Relevance: nothing asked for; name some of {', '.join(KINDS)}")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f'Relevance: a name is {name!r}; expected strings, as in Relevance("chefer", "legrad")')
            if name not in KINDS:
                raise ValueError(
                    f"Relevance: unknown relevance {name!r}; expected some of {', '.join(KINDS)}; a statistic of the "
                    "same point is ro.Stats(...), in a second ro.retain"
                )
        self.names = tuple(dict.fromkeys(names))

    @property
    def parts(self) -> tuple[str, ...]:
        """What it is read off: each is a part of its own."""
        return self.names

    def check(self, op: str, point: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Raise if there is none of a gradient like this."""
        if len(shape) < 3:
            raise ValueError(
                f"{op}: Relevance of point '{point}', which has shape {tuple(shape)}; expected (..., heads, queries, "
                "keys): unsqueeze a dim of one head"
            )
        square = [name for name in self.names if KINDS[name].square]
        if square and shape[-2] != shape[-1]:
            raise ValueError(
                f"{op}: Relevance({', '.join(map(repr, square))}) of point '{point}', of {shape[-2]} queries and "
                f'{shape[-1]} keys; it is of self-attention, where both are the same tokens; ask for "legrad", for '
                "Stats, or for the gradient"
            )

    def __repr__(self) -> str:
        return f"Relevance({', '.join(self.names)})"
