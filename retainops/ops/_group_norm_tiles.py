"""Group norm of groups that are one tile each: x is read once each way. Others: _group_norm.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from retainops.dispatch import HAS_TRITON

if HAS_TRITON:
    from retainops.kernels import group_norm_tiles as kernels
    from retainops.ops._launch import launch
    from retainops.ops._operands import Kept
    from retainops.ops._rows import ALIGNED, covers
    from retainops.ops._walk import Walk, merge, own_strides, power_of_2, strides_in

Tensor = torch.Tensor
FORWARD, BACKWARD = 16384, 8192
"""Elements of 4 bytes of the largest tile: x, in backward also dy, 32 of each a thread. Half as many, of a tile and a
thread, where accesses are not 128 bits wide: each element has an address of its own then."""
SMALLEST = 128
"""Lanes of the smallest: with less, a program would have little to do but start."""
LANES = 2.5
"""Of a tile, for each element, at most: the others take instructions."""


class Given(NamedTuple):
    """What backward reads; mean and variance are at each batch and channel."""

    x: Tensor
    groups: int
    weight: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float
    dy: Tensor | None


def fits(x: Tensor, groups: int, held: torch.dtype, largest: int, *others: Tensor | None) -> bool:
    """Whether each group of x is a tile that registers hold, and each channel a row of memory that all of them share.

    A tile may have some lanes for each element, since channels and positions are each rounded up to a power of two.
    """
    if not x.numel():
        return False
    channels, positions = x.shape[1] // groups, x.shape[2:].numel()
    elements, lanes = channels * positions, power_of_2(channels) * power_of_2(positions)
    most = largest * 4 // held.itemsize // (2 if positions % ALIGNED else 1)
    if not SMALLEST <= lanes <= min(most, LANES * elements):
        return False
    return x.stride(-1) == 1 and _are_rows(x, *others)


def _are_rows(x: Tensor, *others: Tensor | None, summed: Sequence[torch.Size] = ()) -> bool:
    """Whether positions, the dims behind batch and channels, are walked as one dim in all of them."""
    strides = [strides_in(t, x.shape) for t in (x, *others) if t is not None]
    strides += [own_strides(small, x.shape) for small in summed]
    return len(merge(x.shape[2:], [s[2:] for s in strides])) == 1


def takes(x: Tensor, kept: Kept) -> bool:
    """Whether what is asked of a point can be written where x is walked in its groups."""
    return _are_rows(x, kept.tensor, summed=kept.summed)


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor,
    variance: Tensor,
) -> None:
    """Write y, and the mean and the variance at each batch and channel."""
    x, y, mean, variance = (_in_groups(t, groups) for t in (x, y, mean, variance))
    operands = x, _along(weight, x), _along(bias, x), eps, y, mean, variance
    launch(kernels.group_norm_tile_fwd_kernel, x.shape, mean.dtype, *operands, walked=walked, WHOLE=covers)


def backward(given: Given, outputs: Sequence[Tensor | None], kept: Kept | None) -> None:
    """Write the outputs that are not None: dx, and dw and db of each batch and channel; and what is asked."""
    groups = given.groups
    x, dy, dx, dw, db = (_in_groups(t, groups) for t in (given.x, given.dy, *outputs))
    mean, variance = (_in_groups(t, groups)[:, :, :1] for t in (given.mean, given.variance))  # of all channels the same
    if kept is not None:
        kept.unflatten(1, (groups, x.shape[2]))
    operands = x, mean, variance, _along(given.weight, x), given.eps, dy, dx, dw, db, kept
    launch(
        kernels.group_norm_tile_bwd_kernel,
        x.shape,
        mean.dtype,
        *operands,
        walked=walked,
        WHOLE=covers,
        enable_fp_fusion=False,  # which sums are fused depends on what else is asked for, and with it the last bit
    )


def walked(
    shape: torch.Size, tensors: Sequence[Tensor], summed: Sequence[torch.Size], *_: Sequence[torch.Size]
) -> Walk:
    """Tiles of (channels of a group, positions), for `launch`."""
    strides = [strides_in(t, shape) for t in tensors] + [own_strides(s, shape) for s in summed]
    outer = merge(shape[:2], [s[:2] for s in strides])
    ((positions, size),) = merge(shape[3:], [s[3:] for s in strides])
    merged = [*outer, ((2,), shape[2]), (tuple(d + 3 for d in positions), size)]
    block = power_of_2(shape[2]), power_of_2(size)
    a_thread = (64 if size % ALIGNED else 128) // max(4, *(t.element_size() for t in tensors))
    warps = min(max(block[0] * block[1] // (32 * a_thread), 1), 16)
    return Walk(tuple(n for _, n in merged), tuple(d for d, _ in merged), block, warps, (shape[0] * shape[1],))


def _in_groups(t: Any, groups: int) -> Any:
    """(batch, groups, channels of a group, ...), of a tensor."""
    return None if t is None else t.unflatten(1, (groups, -1))


def _along(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight for each channel of each group, of a shape that broadcasts to x."""
    return None if weight is None else weight.view(*x.shape[1:3], *(1 for _ in x.shape[3:]))
