"""Arguments of attention: what is checked of them, and what PyTorch's function checks and makes of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from retainops.part import Part
from retainops.relevance import Relevance
from retainops.retained import Retained

Tensor = torch.Tensor
Window = int | tuple[int | None, int | None] | None
Bounds = tuple[int | None, int | None]


def check(
    softcap: Any,
    window: Any,
    requests: Sequence[Any],
) -> None:
    """Of the arguments, those that `scaled_dot_product_attention` does not check."""
    op = "attention"
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real):
            raise TypeError(
                f"{op}: softcap is {type(softcap).__name__}; expected a number above 0, such as 50.0, or None"
            )
        if not 0 < float(softcap) < math.inf:  # of a symbolic number too
            raise ValueError(f"{op}: softcap is {softcap}; expected a number above 0, such as 50.0, or None")
    if window is not None:
        sides = (window,) if not isinstance(window, tuple) else window
        right_type = all(isinstance(w, int) and not isinstance(w, bool) for w in sides if w is not None)
        if not right_type or (isinstance(window, tuple) and len(window) != 2):
            raise TypeError(f"{op}: window is {window!r}; expected an int, or (left, right) of ints or None")
        if any(w is not None and w < 0 for w in sides):
            raise ValueError(f"{op}: window is {window!r}; expected numbers of keys to each side, 0 or above")
    for name, slot in (item for retain in requests if isinstance(retain, Retained) for item in retain.items()):
        if why := misfit(name, slot.want):
            raise ValueError(f"{op}: point '{name}' was asked for {slot.want}; {why}")


def misfit(point: str, want: Any) -> str | None:
    """Why this point of attention cannot be wanted in this form; None: it can."""
    if isinstance(want, Relevance) and point != "p":
        return "it is of the probabilities: ask point 'p'"
    of_keys = getattr(want, "over", "") == "keys" or (isinstance(want, Part) and "keys" in want.chosen)
    if point == "o" and of_keys:
        return "it has no keys: ask for heads or queries of it"
    return None


def check_head_sizes(q: Any, k: Any) -> None:
    """What PyTorch refuses in the words of a product of matrices."""
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.is_nested or k.is_nested:
        return
    if min(q.dim(), k.dim()) > 1 and q.shape[-1] != k.shape[-1]:
        raise RuntimeError(
            f"attention: q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)} have heads of different sizes, "
            "the last dim; expected one size (that of v is its own)"
        )


def validate(inputs: tuple[Any, ...]) -> None:
    """Raise what PyTorch raises of these inputs, by its function of their shapes.

    In compiled code that would be in the graph; there the products refuse shapes, but not dtypes.
    """
    cast_to = product_dtype(inputs[0]) if autocasts(inputs[0]) else None  # it would not on meta
    if torch.compiler.is_compiling():
        _check_dtypes(*(None if t is None else _cast(t, cast_to) for t in inputs[:4]))
    else:
        q, k, v, mask = (None if t is None else _on_meta(t, _cast(t, cast_to)) for t in inputs[:4])
        sdpa((q, k, v, mask, inputs[4], False, *inputs[6:8]))


def _check_dtypes(q: Any, k: Any, v: Any, mask: Any) -> None:
    if not q == k == v:
        raise RuntimeError(f"attention: q is {q}, k {k} and v {v}; expected one dtype")
    if mask not in (None, torch.bool, torch.float32, q):
        raise RuntimeError(f"attention: attn_mask is {mask}; expected torch.bool, torch.float32 or q's {q}")


def _cast(t: Tensor, cast_to: torch.dtype | None) -> torch.dtype:
    """What autocast makes of a dtype, if it is on: then with a dtype to cast to."""
    return t.dtype if cast_to is None or t.dtype in (torch.bool, torch.float64) else cast_to


def _on_meta(t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="meta")


def sdpa(inputs: Sequence[Any]) -> Tensor:
    """PyTorch's function of our inputs."""
    q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, *_ = inputs
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def bounds(window: Window) -> Bounds:
    """(left, right) of a window, None where it has no bound."""
    if window is None:
        return None, None
    return (window, window) if isinstance(window, int) else window


def autocasts(q: Any) -> bool:
    """Whether autocast is on for q's device; to ask it of meta is an error."""
    return bool(q.device.type != "meta" and torch.is_autocast_enabled(q.device.type))


def product_dtype(q: Any) -> torch.dtype:
    """The dtype of products: under autocast a narrower one than q's."""
    if autocasts(q) and q.dtype != torch.float64:
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype
