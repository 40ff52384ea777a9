"""Gradients of what all rows have in common, such as weights: sums over rows, of which programs leave shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from retainops.kernels import rows as kernels
from retainops.kernels.tiles import Operand
from retainops.ops._launch import launch
from retainops.ops._walk import Walk, power_of_2


class Shares:
    """The gradient of what every row has in common, such as a weight: a share of the sum for each program.

    `sums` adds the shares: no atomics, the same bits at every run.
    """

    tensor = None
    summed: tuple[torch.Size, ...] = ()

    def __init__(self, x: torch.Tensor | None, needed: bool, programs: Callable[[Walk], int]) -> None:
        self.x, self.programs = x if needed else None, programs
        self.shares: torch.Tensor | None = None
        self.is_summed = self.x is not None

    def key(self) -> Hashable:
        """All that its place depends on."""
        return self.x is not None

    def place(self, way: Walk, shape: torch.Size) -> tuple[int, int]:
        """How many shares, of how many columns."""
        return self.programs(way), way.shape[-1]

    def operand(self, place: tuple[int, int], held: torch.dtype) -> Operand:
        """What the kernel writes to: one row a program."""
        if self.x is not None:
            self.shares = torch.empty(place, dtype=held, device=self.x.device)
        return Operand(self.shares, ())

    def empty(self) -> torch.Tensor | None:
        """For the gradient, in the input's shape and dtype; 0 if nothing was launched: a sum of no rows."""
        if self.x is None:
            return None
        new = torch.zeros if self.shares is None else torch.empty
        return new(self.x.shape, dtype=self.x.dtype, device=self.x.device)


def sums(*given: Shares) -> list[torch.Tensor | None]:
    """The gradients, of one input or two; None where nobody wants one. One launch for both: each takes microseconds."""
    found = [s.empty() for s in given]
    there = [
        (s.shares, y.view(1, -1)) for s, y in zip(given, found, strict=True) if s.shares is not None and y is not None
    ]
    if there:
        shares, outputs = zip(*there, strict=True)
        more = [None] * (2 - len(there))
        launch(
            kernels.sum_shares_kernel,
            shares[0].shape,
            shares[0].dtype,
            *(*shares, *more, *outputs, *more),
            walked=_down_columns,
            programs=lambda way: len(there) * way.grid[0],
        )
    return found


def _down_columns(shape: torch.Size, tensors: Sequence[torch.Tensor], *_: Sequence[torch.Size]) -> Walk:
    """Tiles of few columns, so that many programs share the work, and of many rows: each tile is a wait for memory."""
    rows, n = shape
    return Walk((rows, n), ((0,), (1,)), (min(power_of_2(rows), 256), 32), 8, (-(-n // 32),))
