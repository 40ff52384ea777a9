"""Statistics of DTensors: of each shard where it is, put together when somebody looks.

A gradient under tensor parallelism may be a DTensor. Its statistics are those of the whole tensor: each rank takes the
parts of its own shard, and a part is a DTensor whose placement says how shards make the whole. So a backward waits for
no other rank; reading does, and all ranks of the mesh must read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Parts = Callable[[torch.Tensor, "torch.Tensor | None"], "list[torch.Tensor]"]


def is_dtensor(t: object) -> bool:
    """Whether it is one: without loading what defines them, since without that there is none."""
    return type(t) is not torch.Tensor and hasattr(t, "placements") and hasattr(t, "device_mesh")


def local(t: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]


def replicated(t: torch.Tensor, like: Any) -> torch.Tensor:
    """A plain tensor that is the same on every rank, as what goes with another one: with a DTensor, one of its mesh."""
    if is_dtensor(t) or not is_dtensor(like):
        return t
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


def parts_of_shards(
    names: Sequence[str], parts: Parts, g: Any, value: torch.Tensor | None, dims: Sequence[int], shape: torch.Size
) -> list[torch.Tensor]:
    """The parts of a DTensor's statistics, as DTensors.

    Args:
        names: of the parts; "count" comes as a number of the whole tensor.
        parts: takes them of a shard, and of its values.
        g: the gradient. If shards of it are still to be added up, they are: one all-reduce of its size.
        value: the interior's values, if a part needs them.
        dims: that the statistics are taken over.
        shape: of a statistic of the whole tensor.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    settled = [p if type(p) is Shard else Replicate() for p in g.placements]
    g = g.redistribute(placements=settled)
    if value is not None and is_dtensor(value):
        value = value.redistribute(placements=settled).to_local()  # type: ignore[attr-defined]
    found = parts(g.to_local(), value)
    over = [dim % g.dim() for dim in dims]

    def whole(name: str, part: torch.Tensor) -> torch.Tensor:
        if name == "count":
            return torch.full_like(part, g.numel() // max(shape.numel(), 1))
        of_part = torch.Size((*shape, *part.shape[len(shape) :]))  # a histogram has a dim of its own
        placements = [_placement(p, name, over) for p in settled]
        return DTensor.from_local(
            part, g.device_mesh, placements, run_check=False, shape=of_part, stride=_contiguous(of_part)
        )

    return [whole(name, part) for name, part in zip(names, found, strict=True)]


def _placement(p: Any, name: str, over: Sequence[int]) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if type(p) is not Shard:
        return Replicate()
    if p.dim in over:
        return Partial("max" if name == "amax" else "sum")
    return Shard(p.dim - sum(dim < p.dim for dim in over))


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[i + 1 :].numel() for i in range(len(shape)))


def together(part: torch.Tensor) -> torch.Tensor:
    """A part of the whole tensor, from those of its shards. It waits for all ranks of the mesh."""
    if not is_dtensor(part):
        return part
    if any(p.is_partial("max") for p in part.placements):  # type: ignore[attr-defined]
        return from_order(in_order(part).full_tensor(), part.dtype)  # type: ignore[attr-defined]
    return part.full_tensor()  # type: ignore[attr-defined]


def in_order(magnitudes: torch.Tensor) -> torch.Tensor:
    """Magnitudes as integers in the same order, nan the largest: what a maximum over ranks may be taken of.

    Of floating-point numbers it may not: whether nan wins there depends on which rank it is on.
    """
    if is_dtensor(magnitudes):
        return on_shards(in_order, magnitudes)
    return magnitudes.abs().view(torch.int64 if magnitudes.dtype == torch.float64 else torch.int32)


def from_order(integers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Back from `in_order`."""
    return integers.view(dtype)


def alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two DTensors are placed alike, so that their shards merge where they are."""
    if not (is_dtensor(x) and is_dtensor(y)):
        return False
    a, b = x, y
    return a.device_mesh == b.device_mesh and a.placements == b.placements  # type: ignore[attr-defined]


def on_shards(f: Callable[..., torch.Tensor], *tensors: Any) -> torch.Tensor:
    """An elementwise function of DTensors that are placed alike, shard by shard, whatever their placements mean."""
    from torch.distributed.tensor import DTensor

    first = tensors[0]
    return DTensor.from_local(
        f(*(t.to_local() for t in tensors)),
        first.device_mesh,
        first.placements,
        run_check=False,
        shape=first.shape,
        stride=_contiguous(first.shape),
    )
