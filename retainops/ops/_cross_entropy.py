"""How losses of rows of logits run on kernels/cross_entropy.py: cross_entropy, and a block of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from retainops.arrivals import last_first
from retainops.dispatch import HAS_TRITON
from retainops.ops._plan import Plan
from retainops.registry import Op
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import cross_entropy as kernels
    from retainops.ops._launch import launch
    from retainops.ops._operands import Grad, Kept
    from retainops.ops._rows import Tiling, covers, row_tiles
    from retainops.ops._walk import Walk, power_of_2

    # Each row's own numbers take registers and instructions of every thread, so a thread has many elements.
    NARROW = Tiling(widest=512, elements=1024, chunk=512)
    MIDDLE = Tiling(widest=1024, elements=1024, chunk=1024, a_thread=32)  # a warp a row: no barriers
    BROAD = Tiling(widest=2048, elements=2048, chunk=2048)
    WIDE = Tiling(widest=4096, elements=4096, chunk=4096)
    BACKWARD = Tiling(widest=1024, elements=1024, chunk=1024)  # elementwise

Tensor = torch.Tensor
MOST_ROWS = 1 << 16
"""Whose losses one program adds up: two small kernels of PyTorch take longer."""


class Options(NamedTuple):
    """What a loss depends on besides tensors, as the public functions have it."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None


class Rows(NamedTuple):
    """What forward leaves of each row, (..., 1): its loss, and what backward needs: maximum, log-sum and weight.

    While logits come block by block, these hold what is known so far: the sum of the weighted logits, their maximum m,
    the sum of exp(z - m), and z of the target.
    """

    loss: Tensor
    max: Tensor
    logsum: Tensor
    share: Tensor

    @staticmethod
    def of(before: Sequence[int], dtype: torch.dtype, device: torch.device) -> Rows:
        """Not yet written; `before` and `dtype` are those of logits (before, V)."""
        held = torch.promote_types(dtype, torch.float32)
        return Rows(*(torch.empty((*before, 1), dtype=held, device=device) for _ in Rows._fields))


class Loss(NamedTuple):
    """A loss at work: all that it depends on besides the logits.

    Attributes:
        target: (...,), the rows' classes.
        weight: that of each class in hand, or None.
        options: of the op.
        rows: what forward leaves, or has left.
        weights: the sum of the weights of all classes.
        classes: how many there are in all.
        first: the first class in hand.
    """

    target: Tensor
    weight: Tensor | None
    options: Options
    rows: Rows
    weights: Tensor | float
    classes: int
    first: int = 0

    @staticmethod
    def of(target: Tensor, weight: Tensor | None, options: Options, classes: int, rows: Rows) -> Loss:
        """The loss of all rows and classes."""
        weights: Tensor | float = float(classes)
        if weight is not None and options.label_smoothing:  # which alone asks for it
            weights = weight.sum(dtype=rows.max.dtype)
        return Loss(target, weight, options, rows, weights, classes)

    def block(self, rows: slice, columns: slice) -> Loss:
        """That of some rows, some of whose classes are in hand."""
        weight = None if self.weight is None else self.weight[columns]
        part = Rows(*(row[rows] for row in self.rows))
        return self._replace(target=self.target[rows], weight=weight, rows=part, first=columns.start)

    def operands(self) -> tuple[Any, ...]:
        """What the kernels take between the logits and the rows."""
        _, _, smoothing, z_loss, softcap = self.options
        numbers = float(smoothing), float(z_loss), softcap and float(softcap)
        return self.target.unsqueeze(-1), self.weight, self.weights, *numbers

    def constants(self) -> dict[str, Any]:
        """The kernels' own arguments. (Triton knows no numbers of NumPy's, and no comparison of them.)"""
        given = self.options
        return {
            "FIRST": self.first,
            "IGNORE": int(given.ignore_index),
            "SMOOTHED": bool(given.label_smoothing),
            "PENALISED": bool(given.z_loss),
            "CAPPED": given.softcap is not None,
        }


def rows_forward(logits: Tensor, loss: Loss, whole: bool = True) -> None:
    """Write the loss's rows; or, where the logits are not the whole rows, bring them up to date."""
    held, n = loss.rows.max.dtype, logits.shape[-1]
    cuts = (NARROW, 512), (MIDDLE, 8192), (BROAD, 16384)
    tiling = next((t for t, widest in cuts if n <= widest), WIDE).held_in(held)
    launch(
        kernels.cross_entropy_fwd_kernel,
        logits.shape,
        held,
        *(logits, *loss.operands(), *loss.rows),
        walked=tiling.walk,
        programs=row_tiles,
        WHOLE=covers,
        ALL_CLASSES=whole,
        **loss.constants(),
    )


def rows_backward(
    logits: Tensor, loss: Loss, dloss: Tensor, dx: Grad, kept: Sequence[Kept | None], divisor: Tensor | None = None
) -> None:
    """Write the gradient of the logits.

    Args:
        logits: some columns of the rows, or all.
        loss: as forward has left it.
        dloss: the gradient of each row's loss, which broadcasts with (..., 1); times the divisor, if there is one.
        dx: where the gradient goes.
        kept: the same for the points, logits and p.
    """
    held = loss.rows.max.dtype
    tiling = BACKWARD.held_in(held)
    launch(
        kernels.cross_entropy_bwd_kernel,
        logits.shape,
        held,
        *(logits, *loss.operands(), *loss.rows[1:], dloss, divisor, dx, *kept),
        walked=tiling.walk,
        WHOLE=covers,
        CLASSES=loss.classes,
        **loss.constants(),
    )


def reduce(rows: Rows, y: Tensor, given: Options) -> Tensor | None:
    """Write the sum of the rows' losses, or their mean; what that is divided by."""
    mean = given.reduction == "mean"
    count = rows.loss.numel()
    if not 0 < count <= MOST_ROWS:
        divisor = rows.share.sum() if mean else None
        y.copy_(reduced(rows.loss, divisor, given))
        return divisor
    divisor = rows.share.new_empty(()) if mean else None
    losses, shares = rows.loss.view(-1), rows.share.view(-1) if mean else None
    launch(
        kernels.cross_entropy_mean_kernel,
        losses.shape,
        losses.dtype,
        *(losses, shares, y, divisor),
        walked=_in_one,
        programs=lambda _: 1,
        SUMS=has_parts(given),
    )
    return divisor


def _in_one(shape: torch.Size, tensors: Sequence[Tensor], *_: Sequence[torch.Size]) -> Walk:
    """Large tiles: a program that goes over all of them waits for memory once for each."""
    n = shape[0]
    return Walk((1, n), ((), (0,)), (1, min(power_of_2(n), 1 << 13)), 16, (1,))


def reduced(loss: Tensor, divisor: Tensor | None, given: Options) -> Tensor:
    """The sum of the rows' losses, or their mean by a divisor."""
    if divisor is None:
        return loss.sum()
    mean = loss.sum() / divisor
    return mean + 0 / divisor if has_parts(given) else mean


def has_parts(given: Options) -> bool:
    """Whether a loss is a sum. A mean by 0 is NaN then: eager code adds the rest to that of likelihoods, 0 / 0."""
    return bool(given.label_smoothing or given.z_loss)


def row_gradient(dy: Tensor, given: Options, divisor: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of each row's loss, from that of the output: it broadcasts with `like`, (..., 1)."""
    if given.reduction == "none":
        return dy.unsqueeze(-1)
    return dy if divisor is None else dy.to(like.dtype) / divisor


class CrossEntropy:
    """cross_entropy on its kernels."""

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        return inputs

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor | None, ...]:
        logits, target, weight, *options = inputs
        rows = Rows.of(target.shape, logits.dtype, logits.device)
        loss = Loss.of(target, weight, Options(*options), logits.shape[-1], rows)
        if loss.options.reduction == "none":
            y = layout.empty()
            rows_forward(logits, loss._replace(rows=rows._replace(loss=y.unsqueeze(-1))))
            return y, *rows[1:], None
        rows_forward(logits, loss)
        y = layout.empty()
        return y, *rows[1:], reduce(rows, y, loss.options)

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        logits, target, weight, *options, m, logsum, share, divisor = inputs
        (dy,) = dys
        assert dy is not None
        loss = Loss.of(target, weight, Options(*options), logits.shape[-1], Rows(share, m, logsum, share))
        dx = Grad(logits, logits.shape, needed[0])
        of_points = {name: Kept(op.name, slots[name], leaves[name]) for name in last_first(leaves)}
        kept = [of_points.get(p.name) for p in op.points]
        dloss = dy.unsqueeze(-1) if loss.options.reduction == "none" else dy
        rows_backward(logits, loss, dloss, dx, kept, divisor)
        return [dx.finish(), None, None, *([None] * len(options)), *(c.finish() if c else None for c in kept)]
