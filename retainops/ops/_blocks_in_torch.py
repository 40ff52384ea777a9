"""One block of logits in plain PyTorch, where the kernels cannot take it: in place, for nobody else holds the block.

And what comes before and after all blocks, kernels or not: the rows' numbers begin as those of no logits, and end as
the rows' losses.
"""

from __future__ import annotations

from typing import Protocol

import torch

from retainops.ops._cross_entropy import Loss, Rows
from retainops.ops.cross_entropy import shares

Tensor = torch.Tensor


class Keeper(Protocol):
    """Takes what is wanted of the logits' gradient, a block at a time; to `Kept` it is the slot of the block.

    Attributes:
        at: the rows and columns of the present block.
        like: of the point's dtype and device, of no dims.
        wants_value: the point's value is wanted too.
    """

    at: tuple[slice, slice]
    like: Tensor
    wants_value: bool

    def keep(self, grad: Tensor, value: Tensor | None) -> None:
        """Take the present block's; the value is None unless it is wanted."""


def begin(rows: Rows) -> None:
    """Before the first block."""
    rows.max.fill_(-float("inf"))
    for row in (rows.loss, rows.logsum, rows.share):
        row.zero_()


def ended(loss: Loss) -> Rows:
    """After the last one."""
    (rest, m, total, picked), given = loss.rows, loss.options
    logsum = total.log()
    found = shares(loss.target, loss.weight, given.ignore_index, loss.classes, m.dtype)
    share, kept = found[0].unsqueeze(-1), found[1].unsqueeze(-1)
    losses = (1 - given.label_smoothing) * share * (logsum - (picked - m))
    if given.label_smoothing:
        losses = losses + given.label_smoothing / loss.classes * (loss.weights * (m + logsum) - rest)
    if given.z_loss:
        losses = losses + given.z_loss * (m + logsum).square()
    return Rows(losses.masked_fill(~kept, 0.0), m, logsum, share)


def forward_in_place(z: Tensor, loss: Loss) -> None:
    """Bring the loss's rows up to date with the logits z, which are lost."""
    z = _softcapped(z, loss.options.softcap)[0].to(loss.rows.max.dtype)
    rest, m, total, picked = loss.rows
    if loss.options.label_smoothing:
        rest += (z if loss.weight is None else z * loss.weight.to(z.dtype)).sum(-1, keepdim=True)
    place, there = _place(z, loss)
    picked.copy_(torch.where(there, z.gather(-1, place), picked))
    above = torch.maximum(m, z.amax(-1, keepdim=True))
    finite = above.masked_fill(above == -float("inf"), 0.0)
    total.mul_((m - finite).exp_()).add_(z.sub_(finite).exp_().sum(-1, keepdim=True))
    m.copy_(above)


def backward_in_place(z: Tensor, loss: Loss, dloss: Tensor, keeper: Keeper | None) -> Tensor:
    """The gradient of the logits z, which are lost.

    Args:
        z: some columns of the rows.
        loss: as forward has left it.
        dloss: the gradient of each row's loss, which broadcasts with (n, 1).
        keeper: gets the gradient of what enters the softmax.
    """
    dtype, given, rows = z.dtype, loss.options, loss.rows
    z, slope = _softcapped(z, given.softcap, and_slope=True)
    z, kept = z.to(rows.max.dtype), loss.target.long().unsqueeze(-1) != given.ignore_index
    value = z.clone() if keeper is not None and keeper.wants_value else None
    # dloss is inf where the mean is of no row.
    hit = torch.where(kept, dloss * ((1 - given.label_smoothing) * rows.share), 0)
    total = hit
    if given.label_smoothing:
        each = torch.where(kept, dloss * (given.label_smoothing / loss.classes), 0)
        total = total + each * loss.weights
    if given.z_loss:
        total = total + torch.where(kept, dloss * (2 * given.z_loss) * (rows.max + rows.logsum), 0)
    z.sub_(rows.max).sub_(rows.logsum).exp_().mul_(total)
    place, there = _place(z, loss)
    z.scatter_add_(-1, place, torch.where(there, -hit, 0))
    if given.label_smoothing:
        z.sub_(each if loss.weight is None else each * loss.weight.to(z.dtype))
    if keeper is not None:
        keeper.keep(z, value)
    return (z if slope is None else z.mul_(slope)).to(dtype)


def _softcapped(z: Tensor, cap: float | None, and_slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """The capped logits, and how they change with what is capped (1 without a cap: None)."""
    if cap is None:
        return z, None
    c = z.to(torch.promote_types(z.dtype, torch.float32)).div_(cap).tanh_()
    return (cap * c, 1 - c * c) if and_slope else (c.mul_(cap), None)


def _place(z: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """The column of each row's target, (n, 1), and whether it is one of z's; 0 if not."""
    place = loss.target.unsqueeze(-1).long() - loss.first
    there = (place >= 0) & (place < z.shape[-1])
    return torch.where(there, place, 0), there
