"""What a fused op keeps from its forward for its backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch


class Unread:
    """In the place of an input on which no derivative depends: its layout, without its memory."""

    def __init__(self, x: torch.Tensor) -> None:
        self.shape, self.strides, self.dtype, self.device = x.shape, x.stride(), x.dtype, x.device

    @functools.cached_property
    def like(self) -> torch.Tensor:
        """A tensor of the layout, made when somebody looks: that takes longer than all the rest."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    @staticmethod
    def of(x: torch.Tensor | None) -> Unread | None:
        """Of what need not be there."""
        return None if x is None else Unread(x)

    def get_device(self) -> int:
        """As of a tensor."""
        return -1 if self.device.index is None else self.device.index

    def zeros(self) -> torch.Tensor:
        """A tensor of the shape, of one stored element, for a reference whose gradients do not depend on it."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.shape)

    def empty_like(self) -> torch.Tensor:
        """A new tensor laid out as the input."""
        return torch.empty_like(self.like, device=self.device)


def saved(ctx: Any, kept: Sequence[Any]) -> list[Any]:
    """Keep what backward needs: tensors under autograd's watch (freed and checked for in-place changes).

    Returns:
        What is to be kept besides: numbers, and whatever stands for a tensor.
    """
    tensors = [x if isinstance(x, torch.Tensor) else None for x in kept]
    ctx.save_for_backward(*tensors)
    ctx.shapes = [None if t is None else t.shape for t in tensors]
    return [x if t is None else None for t, x in zip(tensors, kept, strict=True)]


def restored(ctx: Any) -> list[Any]:
    """The inputs that `saved` kept, in their places.

    Raises:
        RuntimeError: a hook on saved tensors gave back another shape: a kernel would read what is not there.
    """
    tensors = ctx.saved_tensors
    for x, shape in zip(tensors, ctx.shapes, strict=True):
        if x is not None and x.shape != shape:
            raise RuntimeError(
                f"{ctx.op.name}: a tensor of shape {tuple(shape)} was saved for backward, and {tuple(x.shape)} came "
                "back; let the unpack hook of saved_tensors_hooks return the shape that it was given"
            )
    return [x if other is None else other for x, other in zip(tensors, ctx.others, strict=True)]
