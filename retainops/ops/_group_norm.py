"""How group norm runs on its kernels. Groups that are one tile each: _group_norm_tiles.py."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from retainops.dispatch import HAS_TRITON
from retainops.ops._plan import Plan
from retainops.ops._saved import Unread
from retainops.registry import Op
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import group_norm as kernels
    from retainops.kernels.tiles import Operand
    from retainops.ops import _group_norm_tiles as tiles
    from retainops.ops._group_norm_tiles import Given
    from retainops.ops._launch import launch, launch_as_it_is
    from retainops.ops._operands import Grad, Kept
    from retainops.ops._walk import Walk, merge, own_strides, power_of_2, shares, strides_in

Tensor = torch.Tensor
BLOCK = 1024
"""Shares of a group that its program adds up at a time."""


class GroupNorm:
    """Group norm on its kernels: x is read once for the sums and once more for what depends on them, each way.

    But for groups that registers hold: once.
    """

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        x, groups, weight, bias, eps = inputs
        return x, groups, weight, Unread.of(bias), eps

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor, ...]:
        x, groups, weight, bias, eps = inputs
        held, y = layout.points["xhat"][1], layout.empty()
        mean, variance = (_of_channels(x, held) for _ in range(2))
        if tiles.fits(x, int(groups), held, tiles.FORWARD, y):
            tiles.forward(x, int(groups), weight, bias, float(eps), y, mean, variance)
            return y, mean, variance
        moments = [PerChannel(x) for _ in range(3)]
        launch(kernels.group_norm_moments_kernel, x.shape, held, x, *moments, walked=_walked)
        _each_group(kernels.group_norm_gather_kernel, x, int(groups), *moments, mean, variance, sizes=())
        given = x, mean, variance, _along(weight, x), _along(bias, x), float(eps)
        launch(kernels.group_norm_fwd_kernel, x.shape, held, *given, y, walked=_walked)
        return y, mean, variance

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        x, groups, weight, bias, eps, mean, variance = inputs
        needs_x, _, needs_weight, needs_bias, *_ = needed
        point = op.points[0].name
        kept = Kept(op.name, slots[point], leaves[point]) if point in leaves else None
        dx = Grad(x, x.shape, needs_x)
        given = Given(x, int(groups), weight, mean, variance, float(eps), dys[0])
        fits = tiles.fits(x, int(groups), mean.dtype, tiles.BACKWARD, dx.tensor, dys[0])
        dw, db = (self.by_tiles if fits else self.by_shares)(given, dx, needed, kept)
        dweight, dbias = _sum_like(weight, dw, needs_weight), _sum_like(bias, db, needs_bias)
        return [dx.finish(), None, dweight, dbias, None, kept.finish() if kept is not None else None]

    def by_tiles(
        self, given: Given, dx: Grad, needed: Sequence[bool], kept: Kept | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Backward in one kernel, but for points that lie otherwise: dw and db of each batch and channel, if needed."""
        dw, db = (_of_channels(given.x, given.mean.dtype) if needs else None for needs in needed[2:4])
        here = kept if kept is not None and tiles.takes(given.x, kept) else None
        if any(needed) or here is not None:
            tiles.backward(given, (dx.tensor, dw, db), here)
        if kept is not None and here is None:
            self.launch_backward(given, (None, None), None, kept)
        return dw, db

    def by_shares(
        self, given: Given, dx: Grad, needed: Sequence[bool], kept: Kept | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Backward in three: shares of dw and db, if needed."""
        x, _, _, mean, variance, eps, dy = given
        needs_x, _, needs_weight, needs_bias, *_ = needed
        dw, db = PerChannel(x, needs_x or needs_weight), PerChannel(x, needs_x or needs_bias)
        if any(needed):
            operands = x, mean, variance, eps, dy, dw, db
            launch(kernels.group_norm_sums_kernel, x.shape, mean.dtype, *operands, walked=_walked)
        if needs_x or kept is not None:
            means = self.projections(given, dw, db) if needs_x else (None, None)
            self.launch_backward(given, means, dx, kept)
        return dw.partial, db.partial

    def launch_backward(
        self, given: Given, means: tuple[Tensor | None, Tensor | None], dx: Grad | None, kept: Kept | None
    ) -> None:
        """dx, and what is asked of the point."""
        x, _, weight, mean, variance, eps, dy = given
        operands = x, mean, variance, _along(weight, x), *means, eps, dy, dx, kept
        # Which sums are fused depends on what else is asked for, and with it the last bit.
        bwd = kernels.group_norm_bwd_kernel
        launch(bwd, x.shape, mean.dtype, *operands, walked=_walked, enable_fp_fusion=False)

    def projections(self, given: Given, dw: PerChannel, db: PerChannel) -> tuple[Tensor, Tensor]:
        """The means over each group of the gradient of xhat, along xhat and along the ones; at each channel."""
        x, groups, weight, mean, *_ = given
        along, level = (_of_channels(x, mean.dtype) for _ in range(2))
        size = x[0, 0].numel() * (x.shape[1] // groups) if x.numel() else 0
        sizes = size, groups, 0 if weight is None else weight.stride(0)
        _each_group(kernels.group_norm_project_kernel, x, groups, dw, db, weight, along, level, sizes=sizes)
        return along, level


class PerChannel:
    """A sum over all but batch and channel: shares of it, one for each tile and channel, as a kernel leaves them."""

    tensor = None

    def __init__(self, x: Tensor, needed: bool = True) -> None:
        self.x, self.needed = x, needed
        self.summed = [_small(x)] if needed else []
        self.partial: Tensor | None = None

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.needed

    def place(self, way: Walk, shape: torch.Size) -> Any:
        """Where the shares go."""
        return shares(way, self.x.shape, self.summed[0]) if self.needed else None

    def operand(self, place: Any, held: torch.dtype) -> Operand:
        """What the kernel writes to."""
        if not self.needed:
            return Operand(None, ())
        rows, size, strides, tiles = place
        self.partial = torch.empty((rows, size), dtype=held, device=self.x.device)
        return Operand(self.partial, strides, tiles)


def _sum_like(weight: Tensor | Unread | None, shares: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient of a weight for each channel: the sum over the batch, too."""
    if weight is None or not needed:
        return None
    if shares is None:  # nothing was launched: a sum of no elements
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    return shares.view(-1, weight.shape[0]).sum(0).to(weight.dtype)


def _small(x: Tensor) -> torch.Size:
    return torch.Size((*x.shape[:2], *(1 for _ in x.shape[2:])))


def _of_channels(x: Tensor, held: torch.dtype) -> Tensor:
    """A number for each batch and channel, not yet written."""
    return torch.empty(_small(x), dtype=held, device=x.device)


def _along(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight for each channel, of a shape that broadcasts to x."""
    return None if weight is None else weight.view(-1, *_small(x)[2:])


def _each_group(kernel: Any, x: Tensor, groups: int, *operands: Any, sizes: Sequence[int]) -> None:
    """Launch a kernel with a program for each group."""
    if not x.numel():
        return
    given: list[Any] = [t.partial if isinstance(t, PerChannel) else t for t in operands]
    rows, channels = given[0].shape[0], x.shape[1] // groups
    launch_as_it_is(kernel, x.shape[0] * groups, x.device, *given, rows, channels, *sizes, BLOCK=BLOCK)


def _walked(
    shape: torch.Size, tensors: Sequence[Tensor], summed: Sequence[torch.Size], *_: Sequence[torch.Size]
) -> Walk:
    """Tiles that reach far along a channel: each leaves one share of a sum, and reads what a channel has once, once."""
    merged = merge(shape, [strides_in(t, shape) for t in tensors] + [own_strides(s, shape) for s in summed])
    while len(merged) < 2:
        merged.insert(0, ((), 1))
    spatial = [i for i, (dims, _) in enumerate(merged) if dims and dims[0] > 1]
    if spatial and spatial[-1] < len(merged) - 2:
        merged.insert(-1, merged.pop(spatial[-1]))
    sizes, dims = tuple(size for _, size in merged), tuple(dims for dims, _ in merged)
    if spatial and dims[-1][0] > 1:  # along a channel
        block_n = min(4096, power_of_2(sizes[-1]))
        block_m = min(4096 // block_n, power_of_2(sizes[-2]))
    else:  # across channels that lie next to each other
        block_n = min(64, power_of_2(sizes[-1]))
        block_m = min(8192 // block_n, power_of_2(sizes[-2]))
    programs = -(-sizes[-2] // block_m) * -(-sizes[-1] // block_n)
    for size in sizes[:-2]:
        programs *= size
    warps = min(max(block_m * block_n // 512, 1), 8)
    return Walk(sizes, dims, (block_m, block_n), warps, (programs,))
