"""Buffers of the caller's that a gradient is written into."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from retainops.shards import is_dtensor, local


class Into:
    """Ask for a point's gradient in a buffer of yours, written by the backward kernel itself.

    Args:
        buffer: a tensor of the point's shape and device, in the point's dtype, or float32 for a point of 16 bits (then
            it keeps what a kernel computed, unrounded). Any strides, but no two elements may share memory. It must not
            require grad.
        accumulate: False: the first gradient after the slot was made or `reset()` overwrites the buffer and later
            ones add to it. True: every gradient adds to what the buffer holds.

    Raises:
        TypeError: `buffer` is not a tensor.
        ValueError: `buffer` requires grad, was made in inference mode, is lazily negated, is not floating point, or
            overlaps itself.

    Example:
        >>> total = torch.zeros(1024, 1024)
        >>> y = ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(total, accumulate=True)))
    """

    __slots__ = ("accumulate", "buffer")

    def __init__(self, buffer: torch.Tensor, *, accumulate: bool = False) -> None:
        if not isinstance(buffer, torch.Tensor):
            raise TypeError(f"Into: buffer is {type(buffer).__name__}; expected a torch.Tensor to write into")
        if buffer.requires_grad:
            raise ValueError("Into: buffer requires grad; pass buffer.detach(), or a tensor made without it")
        if buffer.is_inference():
            raise ValueError("Into: buffer is of inference mode, where backward may not write; make it outside of that")
        if buffer.is_neg():  # a kernel would write past that
            raise ValueError("Into: buffer is a lazily negated view; pass a tensor such as torch.empty(shape)")
        if not buffer.is_floating_point() or buffer.layout != torch.strided:
            raise ValueError(f"Into: buffer is {buffer.dtype}, {buffer.layout}; expected a dense floating-point tensor")
        if overlaps_itself(buffer):
            raise ValueError(
                f"Into: elements of buffer share memory (shape {tuple(buffer.shape)}, strides {buffer.stride()}); "
                "pass a tensor that owns each element, such as torch.empty(shape)"
            )
        self.buffer = buffer
        self.accumulate = accumulate

    def check(self, op: str, point: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Raise if the buffer cannot hold a gradient like this."""
        buffer = self.buffer
        right_dtype = buffer.dtype in (dtype, torch.float32) if dtype != torch.float64 else buffer.dtype == dtype
        if buffer.shape != shape or buffer.device != device or not right_dtype:
            raise ValueError(
                f"{op}: the Into buffer for point '{point}' has shape {tuple(buffer.shape)}, {buffer.dtype}, on "
                f"{buffer.device}; expected shape {tuple(shape)}, {dtype}, on {device}"
                + ("" if dtype in (torch.float32, torch.float64) else " (or torch.float32)")
            )

    def check_kind(self, op: str, point: str, of_dtensor: bool) -> None:
        """Raise if the gradient is a DTensor and the buffer none, or the other way round."""
        if of_dtensor != is_dtensor(self.buffer):
            one, other = ("a DTensor", "is none") if of_dtensor else ("no DTensor", "is one")
            raise ValueError(
                f"{op}: the gradient of point '{point}' is {one}, and its Into buffer {other}; give it a buffer of the "
                "same kind, such as torch.zeros_like(the point's value)"
            )

    def __repr__(self) -> str:
        return f"Into({self.buffer.dtype} buffer{', accumulate=True' if self.accumulate else ''})"


def overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements of `t` may share memory (never False when they do)."""
    # Nothing is sorted: Dynamo traces it, with sizes that it does not know.
    dims = [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):
        span = 1
        for j, (other, size) in enumerate(dims):
            if j != i and other <= stride:
                span += other * (size - 1)
        if stride < span:
            return True
    return False


def share_memory(t: torch.Tensor, u: torch.Tensor) -> bool:
    """Whether the address ranges of `t` and `u` meet; of a DTensor, that of its own shard."""
    t, u = local(t), local(u)
    if t.device != u.device or not t.numel() or not u.numel():
        return False
    if t.layout != torch.strided or u.layout != torch.strided or t.untyped_storage().device.type == "meta":
        return False  # none of this kind, or, as of fake tensors, none at all
    (t0, t1), (u0, u1) = _range(t), _range(u)
    return t0 < u1 and u0 < t1


def check_apart(who: str, wants: Mapping[str, Any], groups: Mapping[str, Any] | None = None) -> None:
    """Raise if two points are asked for `Into` buffers that have an element in common.

    Only points of different ops may, where both add to what is there. One op's kernel may read ahead of its own writes.

    Args:
        who: whom the error names.
        wants: what is wanted, by the names of points.
        groups: which op each is of; None: all of one.
    """
    into = [(name, want) for name, want in wants.items() if isinstance(want, Into)]
    for (name, want), (other, wanted) in itertools.combinations(into, 2):
        apart = groups is not None and groups[name] is not groups[other]
        if (apart and want.accumulate and wanted.accumulate) or not have_in_common(want.buffer, wanted.buffer):
            continue
        remedy = ", or give both accumulate=True to have their sum" if apart else ""
        raise ValueError(
            f"{who}: the Into buffers for points '{name}' and '{other}' share memory, so that one would hold the "
            f"other's gradient; give each its own buffer{remedy}"
        )


def have_in_common(t: torch.Tensor, u: torch.Tensor) -> bool:
    """Whether an element of `t` and one of `u` share memory: columns of one matrix do not, though their ranges meet."""
    if not share_memory(t, u):
        return False
    t, u = local(t), local(u)
    of_t = [(t.element_size() * stride, size - 1, 0) for stride, size in zip(t.stride(), t.shape, strict=True)]
    of_u = [(u.element_size() * stride, 0, size - 1) for stride, size in zip(u.stride(), u.shape, strict=True)]
    bytes_of_both = (1, t.element_size() - 1, u.element_size() - 1)
    steps: dict[int, tuple[int, int]] = {}
    for stride, up, down in (*of_t, *of_u, bytes_of_both):
        more, fewer = steps.get(stride, (0, 0))
        steps[stride] = more + up, fewer + down
    found = sorted(((s, *n) for s, n in steps.items() if s and any(n)), reverse=True)
    return _reached(u.data_ptr() - t.data_ptr(), found)


def _reached(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether so many bytes are a sum of strides, each taken at most so often forwards and so often backwards."""
    if not distance or not steps:
        return not distance
    if distance % math.gcd(*(stride for stride, _, _ in steps)):
        return False
    (stride, up, down), *smaller = steps
    ahead, back = (sum(s * n[way] for s, *n in smaller) for way in (0, 1))
    first, last = -((ahead - distance) // stride), (distance + back) // stride
    return any(_reached(distance - stride * i, smaller) for i in range(max(first, -down), min(last, up) + 1))


def _range(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
