"""Statistics of all ranks of a process group, put together.

Three small collectives, whatever the number of points: do the ranks ask for the same things; sums; maxima. What a rank
sends has the same layout whether or not a gradient came to its points, since on another rank one may have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from retainops.shards import from_order, in_order, is_dtensor
from retainops.slots import Slot
from retainops.stats import HIST_BINS, Stats, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Field = tuple[Slot, str, torch.Size]
"""A part of a slot's statistics, and its shape."""

WHOLE = ("count", "nonfinite", "hist")
"""Parts that are whole numbers."""


def all_reduce(slots: Mapping[str, Slot], group: ProcessGroup | None, why_none: str = "") -> None:
    """Merge the slots' statistics over the ranks of a group; see `Retained.all_reduce`. `why_none`: no slots."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("all_reduce: torch.distributed is not set up; call init_process_group()")
    asked = {name: slot for name, slot in slots.items() if isinstance(slot.want, Stats)}
    ranks = tuple(dist.get_process_group_ranks(group))
    device = _device(group)
    sizes = _agree(asked, ranks, device, group)
    # From here on all ranks find the same, so that none of them waits for one that has raised an error.
    if not asked:
        raise ValueError(
            f'all_reduce: there are no statistics{why_none}; ask for some, such as Stats("l2"). Gradients stay local'
        )
    for name, slot in asked.items():
        over = slot.want.over  # type: ignore[union-attr]
        if over not in ("tensor", "channels"):
            raise ValueError(
                f"all_reduce: '{name}' has statistics over {over}, and each rank's {over} are its own; gather them "
                "with torch.distributed.all_gather, or name other points in patterns"
            )
        if _again(slot, ranks):
            raise RuntimeError(
                f"all_reduce: '{name}' was reduced over this group already, or over several of its ranks, which would "
                "count again; call reset() in between, or reduce once over all of them"
            )
    fields = list(_fields(asked, sizes))
    sums = [field for field in fields if field[1] != "amax"]
    maxima = [field for field in fields if field[1] == "amax"]
    counted = {id(slot): _counted(slot, ranks) for slot in asked.values()}
    came = torch.tensor([_came(slot) for slot in asked.values()], dtype=torch.float64, device=device)
    added = torch.cat([came.T.reshape(-1), *(_sent(field, counted, device).double() for field in sums)])
    dist.all_reduce(added, dist.ReduceOp.SUM, group)
    on_ranks, in_float64 = added[: came.numel()].view(2, -1).tolist()
    largest = torch.cat([_zeros(0, torch.int64, device), *(_bits(field, device) for field in maxima)])
    if maxima:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    _put(asked, _cut(added[came.numel() :], sums) | _cut(largest, maxima), on_ranks, in_float64)
    for slot in asked.values():
        slot._reduced_over.add(ranks)


def _again(slot: Slot, ranks: tuple[int, ...]) -> bool:
    """Whether ranks of the group have the same statistics by an earlier `all_reduce`."""
    return any(ranks == over or len({*ranks} & {*over}) > 1 for over in slot._reduced_over)


def _device(group: ProcessGroup | None) -> torch.device:
    """Where tensors are sent from: by the group alone, since a rank that no gradient came to has no other sign."""
    # Not get_backend(), which of init_process_group() without a backend is "undefined".
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu") if "cpu" in kinds else torch.device(kinds[0], torch.accelerator.current_device_index())


def _came(slot: Slot) -> tuple[float, float]:
    """Whether a gradient came to a slot on this rank, and whether its statistics are in float64."""
    return float(bool(slot._parts)), float(any(_local(part).dtype == torch.float64 for part in slot._parts.values()))


def _local(part: Any) -> torch.Tensor:
    return part.shares if hasattr(part, "shares") else part


def _agree(
    asked: Mapping[str, Slot], ranks: tuple[int, ...], device: torch.device, group: ProcessGroup | None
) -> list[int]:
    """The number of channels of each slot over channels, in order; -1 where no gradient came on any rank.

    Raises:
        RuntimeError: on every rank, if they ask for different things, or have different numbers of channels.
        ValueError: on every rank, if the group cuts through the mesh of a DTensor that some rank has.
    """
    text = repr([(name, slot.want, slot.parts, _again(slot, ranks)) for name, slot in asked.items()])
    layout = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    cuts = any(_cuts(slot, ranks) for slot in asked.values())
    (_, cut), same = _same([layout, 1 if cuts else -1], device, group, missing=-1)
    if not same:
        raise RuntimeError(
            "all_reduce: the ranks ask for different statistics; ask for the same points and the same Stats on each, "
            "reduce over the same groups before, and call reset() on each"
        )
    if cut == 1:
        raise ValueError(
            f"all_reduce: the group, of the ranks {list(ranks)}, has some of those along a dim of a DTensor's mesh and "
            "not the others; take all or one"
        )
    over_channels = {name: slot for name, slot in asked.items() if slot.want.over == "channels"}  # type: ignore[union-attr]
    own = [next((p.shape[0] for p in slot._parts.values() if len(p.shape)), -1) for slot in over_channels.values()]
    if not own:
        return []
    sizes, same = _same(own, device, group, missing=-1)
    if not same:
        raise RuntimeError(
            f"all_reduce: the ranks' gradients differ in their channels at some of {', '.join(over_channels)}; "
            "reduce over ranks that hold the same channels"
        )
    return sizes


def _same(
    values: list[int], device: torch.device, group: ProcessGroup | None, missing: int | None = None
) -> tuple[list[int], bool]:
    """The largest of each value over the ranks, and whether those that are not missing are the same on all."""
    lowest = [-(2**62) if x == missing else -x for x in values]
    both = torch.tensor([*values, *lowest], dtype=torch.int64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    most, least = both.tolist()[: len(values)], both.tolist()[len(values) :]
    return most, all(x in (-low, missing) for x, low in zip(most, least, strict=True))


def _fields(asked: Mapping[str, Slot], sizes: list[int]) -> Iterator[Field]:
    rest = iter(sizes)
    for slot in asked.values():
        assert isinstance(slot.want, Stats)
        shape = torch.Size((max(next(rest), 0),)) if slot.want.over == "channels" else torch.Size(())
        for name in slot.want.parts:
            own = torch.Size(()) if name == "count" else torch.Size((*shape, HIST_BINS)) if name == "hist" else shape
            yield slot, name, own


def _along(slot: Slot) -> list[tuple[list[int], int]]:
    """Of the mesh of a slot's DTensors, if it has any: the ranks along each dim, and this one's place among them.

    Once they were reduced they are no DTensors any more, and still of the whole mesh.
    """
    mesh = next((part.device_mesh for part in slot._parts.values() if is_dtensor(part)), None)  # type: ignore[union-attr]
    if mesh is None:
        return slot._along
    dims = range(mesh.ndim)
    return [(dist.get_process_group_ranks(mesh.get_group(dim)), mesh.get_local_rank(dim)) for dim in dims]


def _cuts(slot: Slot, ranks: tuple[int, ...]) -> bool:
    """Whether the group has several of the ranks along a dim of the mesh, and not all."""
    return any(1 < sum(rank in ranks for rank in along) < len(along) for along, _ in _along(slot))


def _counted(slot: Slot, ranks: tuple[int, ...]) -> bool:
    """Whether this rank's statistics count: of ranks that hold the same ones, the first does.

    Those of a DTensor are of its whole mesh, on every rank of it.
    """
    return not any(place and sum(rank in ranks for rank in along) > 1 for along, place in _along(slot))


def _sent(field: Field, counted: Mapping[int, bool], device: torch.device) -> torch.Tensor:
    slot, name, shape = field
    if name not in slot._parts:
        return _zeros(shape.numel(), torch.float64, device)
    own = total(slot._parts[name]).reshape(-1).to(device)  # of a DTensor: all of its mesh's ranks come here
    return own if counted[id(slot)] else torch.zeros_like(own)


def _bits(field: Field, device: torch.device) -> torch.Tensor:
    slot, name, shape = field
    if name not in slot._parts:
        return _zeros(shape.numel(), torch.int64, device)
    return in_order(total(slot._parts[name]).double()).reshape(-1).to(device)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _cut(flat: torch.Tensor, fields: list[Field]) -> dict[tuple[int, str], torch.Tensor]:
    pieces = flat.split([shape.numel() for _, _, shape in fields]) if fields else ()
    return {(id(slot), name): p.view(shape) for (slot, name, shape), p in zip(fields, pieces, strict=True)}


def _put(
    asked: Mapping[str, Slot],
    found: Mapping[tuple[int, str], torch.Tensor],
    came: Sequence[float],
    in_float64: Sequence[float],
) -> None:
    for slot, on_ranks, wide in zip(asked.values(), came, in_float64, strict=True):
        if not on_ranks:
            continue
        assert isinstance(slot.want, Stats)
        dtype = torch.float64 if wide else torch.float32
        own = next((_local(part).device for part in slot._parts.values()), None)
        slot.note_arrival()  # here none may have come: it then counts as the last in backward
        parts: dict[str, Any] = {}
        for name in slot.want.parts:
            value = found[id(slot), name]
            value = from_order(value, torch.float64) if name == "amax" else value
            parts[name] = value.to(own, torch.int64 if name in WHOLE else dtype)
        slot._along, slot._parts = _along(slot), parts
