"""What `ro.fuse` does to modules, whatever is done to the model before or after."""

from __future__ import annotations

import copy
import pickle
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
from retainops.fusing.registry import RULES
from tests.fusing.blocks import OPS, POINTS, Block, TinyRMSNorm, assert_same, run
from tests.fusing.families import make, step


def test_one_of_everything(block: Block, x: torch.Tensor) -> None:
    theirs = run(block, x)
    before = {name: dict(vars(m)) for name, m in block.named_modules()}
    table = ro.fuse(block)
    assert {row.op for row in table} == OPS
    assert set(POINTS) <= set(ro.points(block))
    assert_same(run(block, x), theirs)
    assert isinstance(block, Block)
    assert isinstance(block.norm2, nn.LayerNorm)
    assert type(block).__name__ == "Block"
    assert "LayerNorm (fused)((8,), eps=1e-05" in repr(block)
    ro.unfuse(block)
    assert {name: dict(vars(m)) for name, m in block.named_modules()} == before
    assert all(torch.equal(a, b) for a, b in zip(run(block, x), theirs, strict=True))


def test_the_table(block: Block) -> None:
    table = ro.fuse(nn.Sequential(block, Block()))
    assert len(table) == 2 * len(OPS)
    assert table.replaced == tuple(table)
    assert table[0].name == "0"
    assert "  *.norm1    TinyRMSNorm  rms_norm            2 times" in repr(table).splitlines()
    assert repr(ro.fuse(nn.Linear(2, 2))) == "Linear: nothing fused; no rule knows what it computes"
    assert repr(ro.unfuse(nn.Linear(2, 2))) == "Linear: nothing unfused; nothing in it was fused"


def test_fusing_twice_changes_nothing_and_says_so(block: Block, x: torch.Tensor) -> None:
    ro.fuse(block)
    kinds, ours = [type(m) for m in block.modules()], run(block, x)
    table = ro.fuse(block)
    assert not table.replaced
    assert {row.why for row in table} == {"already fused"}
    assert [type(m) for m in block.modules()] == kinds
    assert all(torch.equal(a, b) for a, b in zip(run(block, x), ours, strict=True))


def test_a_part_first_and_the_rest_later(block: Block, x: torch.Tensor) -> None:
    theirs = run(block, x)
    ro.fuse(block.norm2)
    table = ro.fuse(block)
    assert "add_norm(norm2)" in {row.op for row in table}
    assert "norm2.summed" in ro.points(block)
    assert_same(run(block, x), theirs)
    ro.unfuse(block.norm2)  # and its parent still adds
    assert_same(run(block, x), theirs)
    ro.fuse(block.norm2)
    assert_same(run(block, x), theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_can_be_unfused(copied: Callable, block: Block, x: torch.Tensor) -> None:
    theirs = run(block, x)
    ro.fuse(block)
    ours = run(block, x)
    with ro.retain(block):
        other = copied(block)
    assert not other._requests
    assert all(torch.equal(a, b) for a, b in zip(run(other, x), ours, strict=True))
    with ro.retain(other, POINTS) as kept:
        run(other, x)
    assert list(kept) == [name for name in ro.points(other) if name in POINTS]
    ro.unfuse(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in Block().modules()]
    assert all(torch.equal(a, b) for a, b in zip(run(other, x), theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(block, x), ours, strict=True))


def test_parameters_are_shared_and_move(block: Block, x: torch.Tensor) -> None:
    parameters, keys = list(block.parameters()), list(block.state_dict())
    ro.fuse(block)
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    assert list(block.state_dict()) == keys
    other = Block()
    other.load_state_dict(block.state_dict())
    wide = run(other.double(), x.double())
    assert_same(run(block.double(), x.double()), wide)
    half, theirs = block.bfloat16()(x.bfloat16()), other.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, theirs, rtol=0.05, atol=0.01)
    assert block.norm1.weight is parameters[0]


def test_tied_weights_and_shared_modules(x: torch.Tensor) -> None:
    model = nn.Sequential(Block(), Block())
    model[1].fc.weight = model[0].fc.weight
    model[1].norm2 = model[0].norm2
    theirs = run(model, x)
    table = ro.fuse(model)
    assert [row.name for row in table if row.op == "add_norm(norm2)"] == ["0", "1"]
    assert model[1].fc.weight is model[0].fc.weight
    assert_same(run(model, x), theirs)


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


def test_arguments_by_name_and_errors_as_before() -> None:
    model, x = nn.ModuleList([nn.LayerNorm(8, elementwise_affine=False), TinyRMSNorm(8)]), torch.randn(2, 8)
    expected = [model[0](x), model[1](x)]
    ro.fuse(model)
    torch.testing.assert_close(model[0](input=x), expected[0])
    torch.testing.assert_close(model[1](x=x), expected[1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        model[0](y=x)
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[8\]"):
        model[0](torch.randn(2, 9))


def test_on_meta_it_is_fused_and_nothing_is_made(x: torch.Tensor) -> None:
    torch.manual_seed(2)
    theirs = Block()
    with torch.device("meta"):
        model = Block()
        assert {row.op for row in ro.fuse(model)} == OPS
    assert all(p.is_meta for p in model.parameters())
    assert model(x.to("meta")).shape == x.shape
    model.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same(run(model, x), run(theirs, x))


def test_random_numbers_and_modes_are_left_alone(block: Block) -> None:
    block.act = nn.RReLU()  # trying it out draws some
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ro.fuse(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training
    assert all(p.grad is None and not p.is_inference() for p in block.parameters())


def test_autocast(block: Block, x: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(block, x)
        ro.fuse(block)
        ours = run(block, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


def test_without_gradients(block: Block, x: torch.Tensor) -> None:
    ro.fuse(block)
    expected = block(x)
    said = pytest.warns(RuntimeWarning, match="retain: every call of .* was without grad")
    with said, ro.retain(block) as kept:
        for without in (torch.no_grad, torch.inference_mode):
            with without():
                assert torch.equal(block(x), expected)
    assert all(slot.grad is None for slot in kept.values())


def test_unfuse_under_requests_is_an_error(block: Block) -> None:
    ro.fuse(block)
    with ro.retain(block), pytest.raises(RuntimeError, match="unfuse: ro.retain.* unfuse it after that `with`"):
        ro.unfuse(block)
    ro.unfuse(block)


def test_wrapped_by_something_else_since(block: Block) -> None:
    """As fully_shard does it: a class made of the module's."""
    ro.fuse(block)
    block.norm2.__class__ = type("Sharded", (type(block.norm2),), {})
    table = ro.unfuse(block)
    assert [(row.name, row.why) for row in table.left] == [
        ("norm2", "something made another class of its class since; undo that first")
    ]


def test_another_one_of_the_same_type(block: Block, x: torch.Tensor) -> None:
    theirs = run(block, x)
    ro.fuse(block)
    other = type(block)(n=8)
    other.load_state_dict(block.state_dict())
    assert_same(run(other, x), theirs)
    norm = type(block.norm2)(8, eps=0.1)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), eps=0.1))
    ro.unfuse(norm)
    assert type(norm) is nn.LayerNorm


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


def test_wholly_or_not_at_all(block: Block) -> None:
    def breaks(module: nn.Module) -> None:
        if isinstance(module, nn.Softmax):
            raise ZeroDivisionError

    before = {name: (type(m), dict(vars(m))) for name, m in block.named_modules()}
    rule = ro.fuse_rule(breaks)
    try:
        with pytest.raises(ZeroDivisionError):
            ro.fuse(block)
    finally:
        RULES.pop(rule.name)
    assert {name: (type(m), dict(vars(m))) for name, m in block.named_modules()} == before


@pytest.mark.parametrize("function", [ro.fuse, ro.unfuse])
def test_only_modules(function: Callable) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: model is Tensor; expected a torch.nn.Module"):
        function(torch.ones(3))


def test_timms_own_norms_and_a_flag() -> None:
    model, inputs = make("timm convnext")
    before = step(model, inputs)
    for module in model.modules():
        if hasattr(module, "_fast_norm"):
            module._fast_norm = True
    table = ro.fuse(model)
    assert all(row.op.startswith("bias_act") for row in table.replaced)
    assert {row.why for row in table.left} == {"it overrides the forward of torch.nn.LayerNorm"}
    assert torch.equal(step(model, inputs)["stem.1.weight"].isnan(), before["stem.1.weight"].isnan())


def test_timms_own_norms_without_an_eps() -> None:
    model, _ = make("timm convnext")
    for module in model.modules():
        if hasattr(module, "_fast_norm"):
            module.eps = 0.0
    assert {row.why for row in ro.fuse(model).left} == {"its eps is 0.0; the op takes one above 0"}
