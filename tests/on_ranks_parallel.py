"""Cases of tests/run_on_ranks.py: models that are data, fully sharded, pipeline and tensor parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import retainops as ro
from retainops.testing import simulated_gpu
from tests.on_ranks import (
    CHANNELS,
    EVERY,
    EVERY_AND_GRAD,
    MLP,
    D,
    batch,
    error_of,
    mesh,
    model_of,
    step,
    whole,
)
from tests.small_model import Model


def data_parallel(wrap: Callable, want: Any = EVERY) -> dict[str, Any]:
    model = model_of(Model)
    call = wrap(model)
    mine = batch().chunk(dist.get_world_size())[dist.get_rank()]
    kept, loss = step(call, call, mine, want)
    local = {name: {"act_grad": slot.act_grad} for name, slot in kept.items()} if want is EVERY else {}
    if want is not None:
        kept.all_reduce()
    dist.all_reduce(loss)
    grads = [whole(p.grad) for p in model.parameters()]
    return {"stats": kept.to_dict(), "local": local, "loss": loss / dist.get_world_size(), "grads": grads}


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def compiled_ddp(model: nn.Module) -> nn.Module:
    return torch.compile(ddp(model), backend="aot_eager")


def case_ddp() -> Any:
    return data_parallel(ddp)


def case_ddp_channels() -> Any:
    return data_parallel(ddp, CHANNELS)


def case_ddp_gradients() -> Any:
    return data_parallel(ddp, None)


def case_ddp_compiled() -> Any:
    return data_parallel(compiled_ddp)


def case_fsdp() -> Any:
    return data_parallel(fsdp)


def case_fsdp_of_wrappers() -> Any:
    """By the older way, whose wrappers are modules."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = model_of(Model)
    for i, layer in enumerate(model.layers):
        model.layers[i] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    kept, _ = step(wrapped, wrapped, batch().chunk(dist.get_world_size())[dist.get_rank()])
    kept.all_reduce()
    return {"stats": kept.to_dict(), "points": str(ro.points(wrapped)["layers.0.sine.c"].where)}


def case_pipeline() -> Any:
    """A stage a rank; and one of those schedules that make the gradients of weights apart."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleavedZeroBubble

    rank, world, found = dist.get_rank(), dist.get_world_size(), []
    for schedule, many in ((Schedule1F1B, 1), (ScheduleInterleavedZeroBubble, 2)):
        torch.manual_seed(3)
        layers = Model(world * many).double().layers
        mine = {i: layers[i] for i in range(rank, len(layers), world)}
        stages = [PipelineStage(part, i, len(layers), torch.device("cpu")) for i, part in mine.items()]
        run = schedule(stages if many > 1 else stages[0], 4, loss_fn=lambda y, _: y.square().sum(), scale_grads=False)
        given, target = (batch(),) if rank == 0 else (), {"target": batch()} if rank == world - 1 else {}
        run.step(*given, **target)  # the first one runs the stages on made-up values, too
        with ro.retain(nn.ModuleDict({str(i): part for i, part in mine.items()}), "*", EVERY_AND_GRAD) as kept:
            run.step(*given, **target)
        found.append({f"layers.{name}": of for name, of in kept.to_dict().items()})
    return found


def case_fsdp_compiled() -> Any:
    def wrap(model: nn.Module) -> nn.Module:
        wrapped = fsdp(model)
        for layer in model.layers:
            layer.compile(backend="aot_eager")
        return wrapped

    return data_parallel(wrap)


def tensor_parallel(local: bool, over: Any = None, x: torch.Tensor | None = None, want: Any = EVERY) -> Any:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = model_of(MLP)
    plan = {
        "up": ColwiseParallel(use_local_output=local),
        "down": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate(), use_local_output=local),
    }
    parallelize_module(model, over or mesh(), plan)
    kept, loss = step(model, model, batch() if x is None else x, want)
    return kept, whole(loss), [whole(p.grad) for p in model.parameters()]


def case_tensor_parallel_local() -> Any:
    """Between the layers are plain tensors: shards of the width, which the slots know nothing of."""
    kept, loss, grads = tensor_parallel(local=True)
    shape = kept["hidden"].shape
    kept.all_reduce(patterns=["act.*", "hidden"])  # `out` is the same on every rank
    return {"stats": kept.to_dict(), "loss": loss, "grads": grads, "shape": shape}


def case_kernels_after_a_row_wise_layer() -> Any:
    """Its output is a collective's, that nobody has waited for."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    found = []
    for parallel in (False, True):
        model = model_of(MLP).float()
        if parallel:
            parallelize_module(model, mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
        x, kept = batch().float().requires_grad_(), ro.Retained("xhat", "summed")
        h, weight = model(x), torch.ones(D, requires_grad=True)
        with simulated_gpu(), ro.backend("triton"):
            y, _ = ro.add_rms_norm(h, x, weight, retain=kept)
            y.sin().sum().backward()
        grads = [x.grad, weight.grad, whole(model.up.weight.grad), *(slot.grad for slot in kept.values())]
        found.append([type(h).__name__, y.detach(), *grads])
    return found


def case_tensor_parallel_dtensor() -> Any:
    kept, loss, grads = tensor_parallel(local=False)
    before = kept.to_dict()
    kept.all_reduce()
    return {"stats": before, "after": kept.to_dict(), "loss": loss, "grads": grads}


def case_tensor_parallel_gradients() -> Any:
    kept, loss, grads = tensor_parallel(local=False, want=None)
    placements = {name: str(slot.grad.placements) for name, slot in kept.items()}
    stats = {name: {"grad": whole(slot.grad)} for name, slot in kept.items()}
    return {"stats": stats, "loss": loss, "grads": grads, "placements": placements}


def case_two_dims() -> Any:
    """Data parallel over one dim of the mesh, tensor parallel over the other."""
    from torch.distributed.tensor import init_device_mesh

    both = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    mine = batch().chunk(2)[both.get_local_rank("dp")]
    kept, _, _ = tensor_parallel(False, both["tp"], mine)
    kept.all_reduce()
    over_dp, _, _ = tensor_parallel(False, both["tp"], mine)
    over_dp.all_reduce(both.get_group("dp"))
    found = {"stats": kept.to_dict(), "over_dp": over_dp.to_dict()}
    over_dp.all_reduce(both.get_group("tp"))  # whose ranks have the same by now
    return {**found, "over_both": over_dp.to_dict(), "again": error_of(over_dp.all_reduce)}
