"""What tests/test_distributed.py runs under torchrun: each case on every rank, its results saved to be judged there."""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import retainops as ro
from retainops.testing import simulated_gpu
from tests.small_model import Model
from tests.test_integrations import Chain

EVERY = ro.Stats("l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad", "hist")
EVERY_AND_GRAD = ro.Stats(*EVERY.names, grad=True)
CHANNELS = ro.Stats("l2", "amax", "mean", "nonfinite", over="channels")
BATCH, D = 8, 6
WIDTH = 12


class MLP(nn.Module):
    """What tensor parallelism splits: a column-wise layer, a point, a row-wise layer, a point."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, WIDTH), ro.nn.MulSin(1.5), nn.Linear(WIDTH, D)
        self.hidden, self.out = ro.nn.Point(), ro.nn.Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.hidden(self.act(self.up(x)))))


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def batch() -> torch.Tensor:
    return torch.randn(BATCH, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def step(
    call: Callable, model: nn.Module, x: torch.Tensor, want: Any = EVERY, what: str = "*"
) -> tuple[ro.Retained, torch.Tensor]:
    """One forward and backward; what was retained, and the loss."""
    with ro.retain(model, what, want) as kept:
        loss = loss_of(call(x))
        loss.backward()
    return kept, loss.detach()


def single(kind: type[nn.Module], want: Any = EVERY) -> dict[str, Any]:
    """The same by one process, on the whole batch."""
    model, x = model_of(kind), batch()
    kept, loss = step(model, model, x, want)
    return {"stats": kept.to_dict(), "loss": loss, "grads": [p.grad for p in model.parameters()]}


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


@functools.cache
def mesh() -> Any:
    """One for all cases: torch.compile fails on DTensors, ours or not, where a process made two alike (torch 2.13)."""
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


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
    return {"stats": kept.to_dict(), "over_dp": over_dp.to_dict()}


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


def uneven() -> torch.Tensor:
    return torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(2))


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
    return {"buffer": buffer.full_tensor(), "same": kept.c.grad is buffer, "plain": error_of(y.sum().backward)}


def error_of(f: Callable[[], object]) -> str:
    try:
        f()
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "no error"


def case_dtensor_compiled() -> Any:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(uneven(), mesh(), [Shard(2)]).requires_grad_()
    kept = ro.Retained(c=ro.Stats("l2", "amax", "nonfinite", "hist"))
    f = torch.compile(lambda x, kept: ro.mul_sin(x, 2.0, retain=kept), backend="aot_eager", fullgraph=True)
    f(x, kept).sum().backward()
    return kept.to_dict()["c"]


def losses(place: Callable[[torch.Tensor, Any], torch.Tensor], target: torch.Tensor) -> dict[Any, list[torch.Tensor]]:
    """Cross entropies, and their gradients, of logits and weights that `place` puts somewhere by a dim of theirs."""
    from torch.distributed.tensor.parallel import loss_parallel

    drawn = torch.Generator().manual_seed(4)
    logits, weight = torch.randn(4, 8, generator=drawn), torch.rand(8, generator=drawn)
    found = {}
    for dim, weighted, parallel in itertools.product((None, 0, 1), (False, True), (False, True)):
        kept, linear = ro.Retained("logits", "p"), ro.Retained("logits")
        x, z = (place(logits, dim).requires_grad_() for _ in "xz")
        of_classes = weight if weighted else None
        with loss_parallel() if parallel else contextlib.nullcontext():
            loss = ro.cross_entropy(x, target, of_classes, label_smoothing=0.1, z_loss=0.01, retain=kept)
            eye = place(torch.eye(8), None if dim != 1 else 0)
            other = ro.linear_cross_entropy(z, eye, target, class_weight=of_classes, retain=linear)
            (loss + other).backward()
        slots = [*kept.values(), *linear.values()]
        found[dim, weighted, parallel] = [whole(t.detach()) for t in (loss, other, x.grad, z.grad)]
        found[dim, weighted, parallel] += [whole(slot.grad) for slot in slots]
    return found


TARGET = torch.tensor([1, 3, -100, 7])


def case_cross_entropy() -> Any:
    """Whichever dim is split, the classes among them; of targets that are the same on every rank, plain or not."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(t: torch.Tensor, dim: int | None) -> torch.Tensor:
        return distribute_tensor(t, mesh(), [Replicate() if dim is None else Shard(dim)])

    return [losses(place, TARGET), losses(place, place(TARGET, None)), losses(place, place(TARGET, 0))]


def attended(place: Callable[[torch.Tensor], torch.Tensor], want: Any, point: str, causal: bool) -> list[Any]:
    """What is retained of two calls of attention, and the gradient of q."""
    drawn = torch.Generator().manual_seed(5)
    kept = ro.Retained(**{point: want})
    q, k, v = (place(torch.randn(4, 4, 5, 8, generator=drawn)).requires_grad_() for _ in "qkv")
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's own of a CPU takes no DTensor
        for scale in (1.0, -2.0):
            (whole(ro.attention(q, k, v, is_causal=causal, retain=kept).square().sum()) * scale).backward()
    return [*(whole(t) for t in kept.to_dict()[point].values() if t is not None), whole(q.grad)]


ATTENDED = {
    "s": ro.Stats("l2", "sum", over="heads"),
    "p": ro.Relevance("chefer", "legrad", "attn_grad"),
    "o": ro.Stats("l2", grad=True),
}


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


def main(out: Path) -> None:
    """Run the cases, those that compile on two ranks alone; save what each gives, or the traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    cases = [name.removeprefix("case_") for name in globals() if name.startswith("case_")]
    for name in cases:
        if name.endswith("compiled") and dist.get_world_size() > 2:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = globals()[f"case_{name}"]()
        except Exception:
            found[name] = traceback.format_exc()
            print(name, found[name], file=sys.stderr, flush=True)
            break  # the other ranks may wait for this one
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
