"""Cases of tests/run_on_ranks.py: DTensors, however they are placed, as what is retained and as inputs of ops."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist

import retainops as ro
from tests.on_ranks import (
    ATTENDED,
    EVERY,
    TARGET,
    attended,
    error_of,
    losses,
    mesh,
    uneven,
    whole,
)


def case_dtensor_placements() -> Any:
    """Statistics of a DTensor's gradient, however it is placed, over everything, of uneven shards, twice."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = {}
    for over in ("tensor", "rows", "channels"):
        want = EVERY if over == "tensor" else ro.Stats(*EVERY.names[:-1], over=over)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            x = distribute_tensor(uneven(), mesh(), [placement]).requires_grad_()
            kept = ro.Retained(c=want)
            for scale in (1.0, -3.0):
                (ro.mul_sin(x, 2.0, retain=kept) * scale).sum().backward()
            found[over, str(placement)] = kept.to_dict()["c"]
    return found


def case_dtensor_partial() -> Any:
    """A gradient whose shards are still to be added up."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    x = DTensor.from_local(torch.ones(2, 3), mesh(), [Replicate()], run_check=False).requires_grad_()
    kept = ro.Retained(c=ro.Stats("l2", "amax", grad=True))
    local = torch.full((2, 3), float(dist.get_rank() + 1))
    ro.point(x * 1, "c", retain=kept).backward(DTensor.from_local(local, mesh(), [Partial()], run_check=False))
    return {"l2": kept.c.l2, "amax": kept.c.amax, "grad": kept.c.grad.full_tensor()}


def case_dtensor_into() -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    x, buffer = (distribute_tensor(t, mesh(), [Shard(2)]) for t in (uneven(), torch.full((5, 3, 7), 9.0)))
    kept = ro.Retained(c=ro.Into(buffer))
    ro.mul_sin(x.requires_grad_(), 2.0, retain=kept).sum().backward()
    plain = ro.Retained(c=ro.Into(torch.zeros(5, 3, 7)))
    y = ro.mul_sin(x, 2.0, retain=plain)
    other = error_of(lambda: ro.mul_sin(uneven().requires_grad_(), 2.0, retain=kept))
    return {
        "buffer": buffer.full_tensor(),
        "same": kept.c.grad is buffer,
        "plain": error_of(y.sum().backward),
        "other": other,
    }


def case_dtensor_compiled() -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(uneven(), mesh(), [Shard(2)]).requires_grad_()
    kept = ro.Retained(c=ro.Stats("l2", "amax", "nonfinite", "hist"))
    f = torch.compile(lambda x, kept: ro.mul_sin(x, 2.0, retain=kept), backend="aot_eager", fullgraph=True)
    f(x, kept).sum().backward()
    return kept.to_dict()["c"]


def case_cross_entropy() -> Any:
    """Whichever dim is split, the classes among them; of targets that are the same on every rank, plain or not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(t: torch.Tensor, dim: int | None) -> torch.Tensor:
        return distribute_tensor(t, mesh(), [Replicate() if dim is None else Shard(dim)])

    return [losses(place, TARGET), losses(place, place(TARGET, None)), losses(place, place(TARGET, 0))]


def case_attention() -> Any:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found: dict[tuple[str, str, bool], list[Any]] = {}
    for p in (Shard(0), Shard(1), Replicate()):
        place = functools.partial(distribute_tensor, device_mesh=mesh(), placements=[p])
        some = place(torch.ones(4, 4, 5, 8))
        refused = error_of(lambda t=some: t @ t.mT)
        for (point, want), causal in itertools.product(ATTENDED.items(), (False, True)):
            call = functools.partial(attended, place, want, point, causal)
            if refused != "no error":  # torch 2.11 multiplies no matrices sharded over heads: nor does the definition
                assert error_of(call) == refused
            found[str(p), point, causal] = call() if refused == "no error" else []
    return found


def case_softmax_causal() -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    found = []
    for f, dim in itertools.product((ro.softmax, ro.log_softmax), range(3)):
        x = distribute_tensor(torch.arange(50.0).view(2, 5, 5).sin(), mesh(), [Shard(dim)])
        found.append(whole(f(x, causal=True)))
    return found
