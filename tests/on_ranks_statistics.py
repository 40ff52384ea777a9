"""Cases of tests/run_on_ranks.py: statistics put together, what is refused, and a watcher of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import retainops as ro
from tests.on_ranks import (
    batch,
    error_of,
    loss_of,
    mesh,
    model_of,
)
from tests.on_ranks_parallel import ddp
from tests.small_model import Model
from tests.test_integrations import Chain


def gradient(kept: ro.Retained, grad: torch.Tensor) -> None:
    for name in kept:
        ro.point(torch.ones_like(grad, requires_grad=True) * 1, name, retain=kept).backward(grad)


def case_nan_wins_on_whatever_rank() -> Any:
    """By all_reduce and in a DTensor: in a maximum of floating-point numbers over ranks it need not."""
    from torch.distributed.tensor import Shard, distribute_tensor

    rank, world = dist.get_rank(), dist.get_world_size()
    found = []
    for bad in range(world):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            kept, sharded = (ro.Retained(c=ro.Stats("amax", "nonfinite")) for _ in range(2))
            gradient(kept, torch.tensor([2.0, float("nan") if rank == bad else 3.0 + rank], dtype=dtype))
            kept.all_reduce()
            grad = torch.ones(world, dtype=dtype)
            grad[bad] = float("nan")
            x = distribute_tensor(torch.ones(world, dtype=dtype), mesh(), [Shard(0)]).requires_grad_()
            ro.point(x * 1, "c", retain=sharded).backward(distribute_tensor(grad, mesh(), [Shard(0)]))
            whole = ro.Retained("c")
            ro.point(x * 1, "c", retain=whole).backward(distribute_tensor(grad, mesh(), [Shard(0)]))
            found.append((float("nan" if whole.first_nonfinite() == "c" else 0), 1))
            found += [(k.c.amax.item(), k.c.nonfinite.item()) for k in (kept, sharded)]
    return found


def case_points_that_some_ranks_have_no_gradient_for() -> Any:
    kept = ro.Retained(
        nowhere=ro.Stats("l2"),
        somewhere=ro.Stats("sum", "amax", "mean", "hist"),
        channels=ro.Stats("sum", over="channels"),
        everywhere=ro.Stats("sum", "nonfinite"),
        gradient=ro.Stats("sum", grad=True),
        in_float64=ro.Stats("l2", "amax"),
    )
    of = lambda name: ro.Retained.of({name: kept[name]})  # noqa: E731
    rank = dist.get_rank()
    if rank == 1:
        gradient(of("somewhere"), torch.tensor([1.0, -4.0]))
        gradient(of("in_float64"), torch.tensor([1e300, 1e100], dtype=torch.float64).sqrt())
        gradient(of("channels"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    gradient(of("gradient"), torch.tensor([float(rank)]))
    gradient(of("everywhere"), torch.tensor([1.0, float("inf") if rank == 1 else 0.0], dtype=torch.float32))
    kept_rest = ro.Retained.of({name: kept[name] for name in kept})
    kept_rest.all_reduce()
    read = kept.to_dict()
    only = ro.Retained.of({"everywhere": kept["everywhere"]})
    return {"read": read, "first": only.first_nonfinite(), "gradient": kept["gradient"].grad}


def case_what_is_refused() -> Any:
    from torch.distributed.tensor import DTensor, Shard

    rank, g = dist.get_rank(), torch.ones(2, 2 + dist.get_rank())
    found = {"no statistics": error_of(lambda: ro.Retained("c").all_reduce())}
    found["rows"] = error_of(lambda: ro.Retained(c=ro.Stats("l2", over="rows")).all_reduce())
    found["others"] = error_of(lambda: ro.Retained(c=ro.Stats("l2" if rank else "sum")).all_reduce())
    found["rows on one"] = error_of(
        lambda: ro.Retained(c=ro.Stats("l2", over="rows" if rank else "tensor")).all_reduce()
    )
    found["nothing on one"] = error_of(
        lambda: (ro.Retained(c=ro.Stats("l2")) if rank else ro.Retained("c")).all_reduce()
    )
    channels = ro.Retained(c=ro.Stats("l2", over="channels"))
    gradient(channels, g)
    found["channels"] = error_of(channels.all_reduce)
    twice = ro.Retained(c=ro.Stats("l2"))
    gradient(twice, g)
    twice.all_reduce()
    found["twice"] = error_of(twice.all_reduce)
    if rank:
        twice.reset()
    found["reset on one"] = error_of(twice.all_reduce)
    twice.reset()
    gradient(twice, g)
    found["after reset"] = error_of(twice.all_reduce)
    of_mesh, some = ro.Retained(c=ro.Stats("l2")), dist.new_group([0, 1])
    if rank != 1:  # which alone cannot know that the group cuts through the mesh
        x = DTensor.from_local(torch.ones(2), mesh(), [Shard(0)], run_check=False).requires_grad_()
        ro.point(x * 1, "c", retain=of_mesh).sum().backward()
    if rank < 2 and dist.get_world_size() > 2:
        found["some of a mesh"] = error_of(lambda: of_mesh.all_reduce(some))
    alone = dist.new_group([0])
    found["not in the group"] = error_of(lambda: ro.watch(Chain(1.0), group=alone).close())
    return found


def case_watch() -> Any:
    """The sinks of one rank alone; and a nan on one rank stops them all, at one point and step."""
    rank, world, steps = dist.get_rank(), dist.get_world_size(), []
    model, mine = ddp(model_of(Model)), batch().chunk(world)[rank]
    with ro.watch(model, every=2, group="world", to=lambda *read: steps.append(read)) as watcher:
        for _ in range(3):
            loss_of(model(mine)).backward()
            watcher.step()
    latest = watcher.latest
    chain, x = Chain(float("nan") if rank == world - 1 else 1.0, 2), torch.ones(2, 3, requires_grad=True)
    with ro.watch(chain, group="world") as watcher:
        chain(x).sum().backward()
        try:
            watcher.step()
            stopped = "not at all"
        except ro.NonFiniteGradient as error:
            stopped = str(error)
    twice, order = nn.ModuleDict({"early": ro.nn.Point(), "late": ro.nn.Point()}), ""
    with ro.watch(twice, group="world") as watcher:
        y = twice["early"](x) * 2
        (twice["late"](y) if rank == 0 else y).sum().mul(float("nan")).backward()
        try:
            watcher.step()
        except ro.NonFiniteGradient as error:
            order = error.point
    return {"steps": steps, "latest": latest, "stopped": stopped, "order": order}
