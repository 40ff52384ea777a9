"""How rope runs on its kernel, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from retainops.dispatch import HAS_TRITON
from retainops.ops._check import is_stand_in
from retainops.ops._plan import Plan
from retainops.registry import Op
from retainops.slots import Slot

if HAS_TRITON:
    import triton.language as tl

    from retainops.kernels import rope as kernels
    from retainops.ops._launch import launch, launch_as_it_is
    from retainops.ops._operands import Kept
    from retainops.ops._saved import Unread
    from retainops.ops._walk import power_of_2

Tensor = torch.Tensor
WIDEST = 4096
"""The widest head that the kernel takes."""
TILE = 1024
"""Pairs of a tile, in 4 warps: of one head, as many tokens as that gives."""
PROGRAMS = 1056
"""Heads are shared among programs until there are so many: 8 for each multiprocessor of the largest GPUs."""


class Rope:
    """rope on its kernel; both passes are the same launch, of q and k or of their gradients."""

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[Tensor | None], values: bool) -> Sequence[Any]:
        q, k, *others = inputs
        return inputs if values else (Unread(q), Unread(k), *others)

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[Tensor, ...]:
        q, k, *tables = inputs
        outputs = layout.empty(0), layout.empty(1)
        _turn((q, k), outputs, *tables, inverse=False)
        return outputs

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, Tensor],
    ) -> list[Tensor | None]:
        q, k, *tables = inputs
        wanted = [x if need and dy is not None else None for x, need, dy in zip((q, k), needed, dys, strict=False)]
        grads = tuple(None if x is None else _empty_like(x) for x in wanted)
        _turn(tuple(dys), grads, *tables, inverse=True)
        asked = ["act_grad" in slots[p.name].parts if p.name in leaves else False for p in op.points]
        values = tuple(torch.empty_like(x) if ask else None for x, ask in zip((q, k), asked, strict=True))
        _turn((q, k), values, *tables, inverse=False)
        at = zip(op.points, dys, values, strict=True)
        points = [_kept(op, point.name, dy, value, slots, leaves) for point, dy, value in at]
        return [*grads, None, None, None, None, *points]


def _kept(
    op: Op,
    name: str,
    dy: Tensor | None,
    value: Tensor | None,
    slots: Mapping[str, Slot],
    leaves: Mapping[str, Tensor],
) -> Tensor | None:
    """A point's gradient is its output's, which is in memory: it is copied, or read once for statistics."""
    if dy is None or name not in leaves:
        return None
    kept = Kept(op.name, slots[name], leaves[name])
    launch(kernels.rope_points_kernel, dy.shape, dy.dtype, dy, value, kept)
    return kept.finish()


def _empty_like(x: Tensor | Unread) -> Tensor:
    return x.empty_like() if isinstance(x, Unread) else torch.empty_like(x)


def _turn(
    given: tuple[Tensor | None, ...],
    into: tuple[Tensor | None, ...],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    half_tables: bool,
    *,
    inverse: bool,
) -> None:
    """Launch the kernel on (of q, of k), either of which may be None."""
    written = [x for x in into if x is not None]
    if not any(x.numel() for x in written):
        return
    shape, rot = written[0].shape, cos.shape[-1] * (2 if half_tables else 1)
    tables = [_table(t, shape) for t in (cos, sin)]
    heads = [0 if x is None else x.shape[1] for x in into]
    cut = _cut(shape, rot, max(heads))
    runs = interleaved and all(x is None or x.stride(-1) == 1 for x in (*given, *into, *tables))
    is_wide = torch.float64 in {x.dtype for x in (*written, *tables)}
    launch_as_it_is(
        kernels.rope_kernel,
        cut.programs,
        written[0].device,
        *(_pairs(x, rot, interleaved, runs) for x in given),
        *(_pairs(t, rot, interleaved and not half_tables, runs and not half_tables) for t in tables),
        *(_pairs(x, rot, interleaved, runs) for x in into),
        *(*heads, shape[2], cut.groups, tl.float64 if is_wide else tl.float32),
        *(cut.block_m, rot // 2, cut.block_n, shape[3] - rot, cut.block_r, runs, half_tables, inverse),
        num_warps=cut.warps,
    )


class Cut(NamedTuple):
    """How a launch is cut: tokens, pairs and other elements of a tile, and how many programs share the heads."""

    block_m: int
    block_n: int
    block_r: int
    warps: int
    groups: int
    programs: int


def _cut(shape: torch.Size, rot: int, heads: int) -> Cut:
    batch, _, seq, dim = shape
    block_n, block_r = power_of_2(rot // 2), power_of_2(dim - rot)
    across = max(block_n, block_r // 2)
    block_m = min(max(TILE // across, 1), power_of_2(seq))
    warps = power_of_2(min(max(block_m * across // 256, 1), 8))
    programs = batch * -(-seq // block_m)
    groups = min(heads, -(-PROGRAMS // programs))
    return Cut(block_m, block_n, block_r, warps, groups, programs * groups)


def _pairs(x: Tensor | None, rot: int, interleaved: bool, runs: bool) -> Any:
    """A (batch, heads, seq, dim) tensor as the kernel takes it; what it does not read is the tensor itself."""
    if x is None:
        return kernels.Pairs(None, None, None, ())
    rest = x[..., rot:] if rot < x.shape[-1] else x
    *rows, step = x.stride()
    if runs:
        return kernels.Pairs(x[..., :rot], x, rest, (*rows, 2, 1))
    if interleaved:
        return kernels.Pairs(x[..., 0:rot:2], x[..., 1:rot:2], rest, (*rows, 2 * step, step))
    return kernels.Pairs(x[..., : rot // 2], x[..., rot // 2 : rot], rest, (*rows, step, step))


def _table(table: Tensor, shape: torch.Size) -> Tensor:
    """A table laid out as a tensor of this shape, with one head."""
    table = table.unsqueeze(1) if table.dim() == 3 else table
    return table.expand(shape[0], 1, shape[2], table.shape[-1])


def check(q: Any, k: Any, cos: Any, sin: Any, **flags: Any) -> None:
    """Inputs of rope.

    It holds in compiled code too: the definition, traced, would broadcast tables of other positions.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: a shape or device that does not go with q's.
    """
    tensors = {"q": q, "k": k, "cos": cos, "sin": sin}
    if any(is_stand_in(t) for t in tensors.values()):
        return
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"rope: {name} is {type(t).__name__}; expected a torch.Tensor")
        if not t.is_floating_point():
            raise TypeError(f"rope: {name} is {t.dtype}; expected a floating-point tensor")
        if t.device != q.device:
            raise RuntimeError(f"rope: {name} is on {t.device} and q on {q.device}; move one of them with .to(device)")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"rope: {name} is {type(flag).__name__}; expected True or False")
    _check_heads(q, k)
    _check_tables(q, cos, sin, 2 if flags["half_tables"] else 1)


def _check_heads(q: Tensor, k: Tensor) -> None:
    for name, t in {"q": q, "k": k}.items():
        if t.dim() != 4:
            raise RuntimeError(f"rope: {name} has shape {tuple(t.shape)}; expected (batch, heads, seq, dim)")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise RuntimeError(
            f"rope: k has shape {tuple(k.shape)} and q has {tuple(q.shape)}; expected (batch, heads, seq, dim) of "
            "both, which differ in heads alone"
        )


def _check_tables(q: Tensor, cos: Tensor, sin: Tensor, elements: int) -> None:
    """`elements`: of a head, for each column of a table."""
    batch, _, seq, dim = q.shape
    if cos.shape != sin.shape:
        raise RuntimeError(f"rope: cos has shape {tuple(cos.shape)} and sin has {tuple(sin.shape)}; expected one shape")
    columns = cos.shape[-1] if cos.dim() else 0
    ends = cos.dim() in (2, 3, 4) and cos.shape[-2] == seq
    if not ends or any(size not in may for size, may in zip(cos.shape[:-2], ((1, batch), (1,)), strict=False)):
        raise RuntimeError(
            f"rope: cos and sin have shape {tuple(cos.shape)}, and q has {tuple(q.shape)}; expected ({seq}, rot), "
            f"({batch}, {seq}, rot) or ({batch}, 1, {seq}, rot): the rows of q's positions, as cos[positions]"
        )
    rot = columns * elements
    if not 2 <= rot <= dim or rot % 2:
        raise RuntimeError(
            f"rope: cos and sin have {columns} columns{' of half_tables' if elements == 2 else ''}, so {rot} of the "
            f"{dim} elements of a head are turned; expected an even number from 2 to {dim}"
        )
