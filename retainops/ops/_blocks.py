"""A loss over the classes of a linear layer, block by block: the logits never exist as a whole.

Forward goes over the blocks with a few numbers a row, which it brings up to date. Backward makes the same blocks again,
by the same products and so to the same bits. Blocks are cut along the longer side: then what must be added up over
blocks is the gradient of the smaller factor, and that of the larger one is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from retainops.dispatch import HAS_TRITON, plain
from retainops.ops._blocks_in_torch import Keeper, backward_in_place, begin, ended, forward_in_place
from retainops.ops._cross_entropy import Loss, Rows, rows_backward, rows_forward

if HAS_TRITON:
    from retainops.ops._operands import Grad, Kept

Tensor = torch.Tensor
ELEMENTS = 1 << 27
"""Of a block of logits, unless the caller says otherwise: 256 MiB in bfloat16."""
ELEMENTS_ON_CPU = 1 << 22
"""The same where smaller blocks are faster, since caches hold them: 16 MiB in float32."""


class Layer(NamedTuple):
    """A linear layer at work: logits = x @ weight.T + bias.

    Attributes:
        x, weight, bias: (n, H), (V, H), (V,) or None.
        dtype: of the product: under autocast a narrower one than theirs.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def block(self, rows: slice, columns: slice) -> Layer:
        """Some of the rows and of the classes, in the dtype of the product."""
        bias = None if self.bias is None else self.bias[columns].to(self.dtype)
        return Layer(self.x[rows].to(self.dtype), self.weight[columns].to(self.dtype), bias, self.dtype)

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight, self.bias)


class Cut(NamedTuple):
    """How many rows and columns a block has."""

    rows: int
    columns: int

    @staticmethod
    def of(chunk: int | None, rows: int, classes: int, device: torch.device) -> Cut:
        """Blocks of as many elements as `chunk` rows have, cut along the longer side."""
        chunk = chunk or max((ELEMENTS_ON_CPU if device.type == "cpu" else ELEMENTS) // classes, 1)
        if rows > classes or chunk >= rows:
            return Cut(chunk, classes)
        columns = max(chunk * classes // rows, 1)
        return Cut(rows, columns - columns % 128 if columns > 128 else columns)

    def blocks(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """One after the other; an empty one of no rows, so that all is written."""
        for i in range(0, max(rows, 1), self.rows):
            for j in range(0, columns, self.columns):
                yield slice(i, min(i + self.rows, rows)), slice(j, min(j + self.columns, columns))


def forward(layer: Layer, loss: Loss, chunk: int | None, kernels: bool) -> Rows:
    """The loss of each row, and what backward needs of it.

    Args:
        layer: whose outputs are the logits.
        loss: of the logits; its rows are not yet written.
        chunk: as of the op.
        kernels: use them, if they can.
    """
    n, on_kernels = len(layer.x), kernels and kernels_can(layer, loss)
    begin(loss.rows)
    with torch.autocast(layer.x.device.type, enabled=False):
        for at, columns in Cut.of(chunk, n, loss.classes, layer.x.device).blocks(n, loss.classes):
            z, part = layer.block(at, columns).logits(), loss.block(at, columns)
            if on_kernels:
                rows_forward(z, part, whole=False)
            else:
                forward_in_place(z, part)
            del z  # before the next block is made
    return ended(loss)


def backward(
    layer: Layer,
    loss: Loss,
    chunk: int | None,
    kernels: bool,
    dloss: Tensor,
    needed: Sequence[bool],
    keeper: Keeper | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight and bias, not yet rounded.

    Args:
        layer, loss, chunk, kernels: as in forward, whose result are the loss's rows.
        dloss: the gradient of each row's loss, which broadcasts with (n, 1).
        needed: which gradients are.
        keeper: takes what is wanted of the logits' gradient.
    """
    n = len(layer.x)
    cut = Cut.of(chunk, n, loss.classes, layer.x.device)
    dx = Products(layer.x, layer.dtype, needed[0], added=cut.columns < loss.classes)
    dw = Products(layer.weight, layer.dtype, needed[1], added=cut.rows < n)
    db = torch.zeros(loss.classes, dtype=loss.rows.max.dtype, device=layer.x.device) if needed[2] else None
    gradient = _on_kernels if kernels and kernels_can(layer, loss) else backward_in_place
    with torch.autocast(layer.x.device.type, enabled=False):
        for at, columns in cut.blocks(n, loss.classes):
            if keeper is not None:
                keeper.at = (at, columns)
            part = layer.block(at, columns)
            dz = gradient(part.logits(), loss.block(at, columns), dloss[at] if dloss.dim() else dloss, keeper)
            dx.add(at, dz, part.weight)
            dw.add(columns, dz.t(), part.x)
            if db is not None:
                db[columns] += dz.sum(0, dtype=db.dtype)
            del dz  # before the next block is made
    return dx.total, dw.total, db


def kernels_can(layer: Layer, loss: Loss) -> bool:
    """Whether the kernels can read all of it. (A backward may run elsewhere than its forward did.)"""
    tensors = (layer.x, layer.weight, layer.bias, loss.target, loss.weight)
    return HAS_TRITON and all(plain(t) for t in tensors if t is not None)


def _on_kernels(z: Tensor, loss: Loss, dloss: Tensor, keeper: Keeper | None) -> Tensor:
    """As `backward_in_place`."""
    kept = None
    if keeper is not None:
        slot: Any = keeper
        kept = Kept("linear_cross_entropy", slot, keeper.like.expand(z.shape))
    rows_backward(z, loss, dloss, Grad(z, z.shape, True, tensor=z), (kept, None))
    if kept is not None:
        kept.finish()
    return z


class Products:
    """A gradient made of products of two matrices, one a block.

    Products that are added up over blocks are so in float32 (float64 for float64), and rounded once, by the caller.

    Args:
        like: what it is the gradient of.
        dtype: of the matrices.
        needed: whether anybody wants it.
        added: whether several blocks go to one place.
    """

    def __init__(self, like: Tensor, dtype: torch.dtype, needed: bool, added: bool) -> None:
        held = dtype if like.dtype == dtype and not added else torch.promote_types(dtype, torch.float32)
        new = torch.zeros if added else torch.empty
        self.total = new(like.shape, dtype=held, device=like.device) if needed else None
        self.added = added

    def add(self, at: slice, a: Tensor, b: Tensor) -> None:
        """Add a @ b to some rows."""
        if self.total is None:
            return
        total = self.total[at]
        if total.dtype == a.dtype:
            total.addmm_(a, b, beta=1 if self.added else 0)
        elif self.added:
            total.add_(_wide_product(a, b, total.dtype))
        else:
            total.copy_(_wide_product(a, b, total.dtype))


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, not rounded to their dtype."""
    if a.is_cuda:
        try:
            return torch.mm(a, b, out_dtype=dtype)
        except RuntimeError:  # not on every device, and not under every setting of matrix products
            pass
    return torch.mm(a.to(dtype), b.to(dtype))
