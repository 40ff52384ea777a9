"""`ro.fuse` of models that are hooked, changed, wrapped, sharded or compiled, before or after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import retainops as ro
from tests.fusing.blocks import OPS, POINTS, Block, assert_same, run


@pytest.mark.parametrize("name", ["norm1", "norm2", "gate", "up", "down", "act", "gelu", "fc"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["pre", "forward", "backward pre", "backward"])
def test_hooks_see_what_they_saw(name: str, when: str, kind: str, block: Block, x: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []

    def watch(model: nn.Module) -> None:
        module = model.get_submodule(name)
        if kind == "pre":
            module.register_forward_pre_hook(lambda m, args: seen.append(args[0]) or (args[0] * 1.5,))
        elif kind == "forward":
            module.register_forward_hook(lambda m, args, out: seen.append(out) or out * 1.5)
        elif kind == "backward":
            module.register_full_backward_hook(lambda m, into, out: seen.append(out[0]) or (into[0] * 1.5,))
        else:
            module.register_full_backward_pre_hook(lambda m, out: seen.append(out[0]) or (out[0] * 1.5,))

    theirs = copy.deepcopy(block)
    watch(theirs)
    expected = run(theirs, x)
    expected += seen
    seen.clear()
    if when == "before":
        watch(block)
    ro.fuse(block)
    if when == "after":
        watch(block)
    with ro.retain(block, POINTS) as kept:
        ours = run(block, x)
    assert len(seen) == 1
    assert_same(ours + seen, expected)
    for point in POINTS:
        assert kept[point].grad is not None, point


def test_points_where_a_hook_has_a_part_called_by_itself(block: Block, x: torch.Tensor) -> None:
    ro.fuse(block)
    with ro.retain(block, "*") as kept:
        run(block, x)
    for name in ("norm2", "act", "gelu"):
        block.get_submodule(name).register_forward_hook(lambda m, args, out: None)
    with ro.retain(block, "*") as again:
        run(block, x)
    for point in kept:
        torch.testing.assert_close(again[point].grad, kept[point].grad, rtol=1e-5, atol=1e-6, msg=point)


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.a, self.b = linear, nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.a @ self.b


def swap(name: str, new: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model, name, new(getattr(model, name)))


class CountingSiLU(nn.Module):
    """An activation that does more than to return a value."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.silu(x)


def test_an_activation_of_somebodys_own_is_called(block: Block, x: torch.Tensor) -> None:
    block.act = block.gelu = CountingSiLU()
    expected = run(block, x)
    ro.fuse(block)
    assert block.act.calls == 2
    assert_same(run(block, x), expected)
    assert block.act.calls == 4


CHANGES: dict[str, Callable[[Any], None]] = {
    "an adapted fc": swap("fc", Adapted),
    "an adapted gate": swap("gate", Adapted),
    "another activation": swap("act", lambda _: nn.Tanh()),
    "an activation of mine": swap("gelu", lambda _: nn.Sequential(nn.GELU(), nn.Tanh())),
    "another norm": swap("norm2", lambda old: nn.Identity()),
    "a layer without a bias": lambda m: m.fc.register_parameter("bias", None),
    "frozen": lambda m: [p.requires_grad_(False) for p in m.fc.parameters()],
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m.fc),
    "a setting of an activation": lambda m: setattr(m.gelu, "approximate", "tanh"),
    "forwards set on modules": lambda m: [
        setattr(m.get_submodule(n), "forward", torch.cos) for n in ("act", "norm2", "fc")
    ],
    "another eps": lambda m: setattr(m.norm1, "variance_epsilon", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_before_and_after(change: str, when: str, block: Block, x: torch.Tensor) -> None:
    torch.manual_seed(4)
    theirs = copy.deepcopy(block)
    CHANGES[change](theirs)
    torch.manual_seed(4)
    if when == "before":
        CHANGES[change](block)
    ro.fuse(block)
    if when == "after":
        CHANGES[change](block)
    y, expected = block(x), theirs(x)
    assert_same([y], [expected])
    slope = torch.randn_like(y)
    y.backward(slope)
    expected.backward(slope)
    for a, b in zip(block.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_wrapped_by_something_else_since(block: Block) -> None:
    """As fully_shard does it: a class made of the module's."""
    ro.fuse(block)
    block.norm2.__class__ = type("Sharded", (type(block.norm2),), {})
    table = ro.unfuse(block)
    assert [(row.name, row.why) for row in table.left] == [
        ("norm2", "something made another class of its class since; undo that first")
    ]


def test_a_forward_set_since_that_holds_the_fused_one(block: Block, x: torch.Tensor) -> None:
    """As accelerate places its hooks."""
    theirs = run(block, x)
    ro.fuse(block)
    inner = block.forward
    block.forward = lambda x: inner(x)
    assert [(row.name, row.why) for row in ro.unfuse(block).left] == [
        ("", "a forward was set on the module itself since; undo that first")
    ]
    assert_same(run(block, x), theirs)
    del block.forward
    ro.unfuse(block)
    assert type(block) is Block


@pytest.mark.parametrize("order", ["fused, then sharded", "sharded, then fused"])
def test_sharded(order: str, block: Block, x: torch.Tensor) -> None:
    """By one process alone, with the classes, hooks and tensors that several have."""
    theirs = run(block, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        if order.startswith("fused"):
            ro.fuse(block)
            fully_shard(block.fc, mesh=mesh)  # a layer of another class, which is called as it is
        fully_shard(block.norm2, mesh=mesh)
        fully_shard(block, mesh=mesh)
        if order.startswith("sharded"):
            assert "gated(act)" in {row.op for row in ro.fuse(block)}
        with ro.retain(block, POINTS) as kept:
            ours = run(block, x)
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in ours]
        assert_same(whole, theirs)
        assert all(slot.grad is not None for slot in kept.values())
        ro.unfuse(block)
        assert_same([t.full_tensor() if isinstance(t, DTensor) else t for t in run(block, x)], theirs)
    finally:
        dist.destroy_process_group()


class SizedRMSNorm(nn.Module):
    """Of a size that there is no default for, as those of transformers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


def test_a_norm_that_is_sharded_by_itself(x: torch.Tensor) -> None:
    """The class that fully_shard makes gives another class's object by its `__new__`."""
    norm = SizedRMSNorm(8)
    theirs = norm(x).detach()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(norm, mesh=dist.init_device_mesh("cpu", (1,)))
        assert [row.op for row in ro.fuse(norm)] == ["rms_norm"]
        with ro.retain(norm, "xhat") as kept:
            ours = norm(x.requires_grad_())
            ours.sum().backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(kept.xhat.grad, torch.ones_like(x))
    finally:
        dist.destroy_process_group()


def test_compiled_models(block: Block, x: torch.Tensor) -> None:
    """Compiled before or after: what runs is what the modules are."""
    theirs = run(block, x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, x), theirs)
    assert {row.op for row in ro.fuse(compiled)} == OPS
    assert_same(run(compiled, x), theirs)
    with ro.retain(compiled, "norm2.*") as kept:
        run(compiled, x)
    assert kept["norm2.xhat"].grad is not None
    ro.unfuse(compiled)
    assert type(block) is Block
    assert_same(run(compiled, x), theirs)
