"""`ro.fuse(model, outputs=...)`: what a module returns, as a point."""

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
from torch.utils.checkpoint import checkpoint

import retainops as ro
from retainops.fusing.parts import has_plain_product
from tests.fusing.blocks import OPS, POINTS, Block, assert_same, run
from tests.fusing.families import make, step
from tests.fusing.returned import CHILDREN, retained_by_hooks, tiny_llama


@pytest.mark.parametrize("rules", [None, []], ids=["fused", "not fused"])
@pytest.mark.parametrize("names", [CHILDREN, *([name] for name in CHILDREN)], ids="-".join)
def test_the_gradient_is_that_of_retain_grad(
    names: list[str], rules: list | None, block: Block, x: torch.Tensor
) -> None:
    """Also where a fused call stands for the module: it is called by itself while it is asked for."""
    theirs, before = retained_by_hooks(block, names, x), run(block, x)
    table = ro.fuse(block, rules=rules, outputs=names)
    assert [row.name for row in table if row.op == "output"] == [n for n, _ in block.named_children() if n in names]
    assert {row.op for row in table} == {"output", *(OPS if rules is None else ())}
    assert_same(run(block, x), before)
    with ro.retain(block, "*.out") as kept:
        ours = run(block, x)
    assert_same(ours, before)
    assert set(kept) == {f"{name}.out" for name in names}
    for name in names:
        torch.testing.assert_close(kept[f"{name}.out"].grad, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_else_changes(block: Block, x: torch.Tensor) -> None:
    """Fused with points at outputs, a model computes the bits that it computes without, by the same ops."""
    plain = copy.deepcopy(block)
    ro.fuse(plain)
    ro.fuse(block, outputs="*")
    assert all(torch.equal(a, b) for a, b in zip(run(block, x), run(plain, x), strict=True))
    with ro.retain(plain, POINTS) as theirs:
        expected = run(plain, x)
    with ro.retain(block, POINTS) as ours:
        assert all(torch.equal(a, b) for a, b in zip(run(block, x), expected, strict=True))
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in POINTS)
    assert has_plain_product(block.fc)  # so the op is called, whose reference computes the same bits


def test_everything_at_once(block: Block, x: torch.Tensor) -> None:
    ro.fuse(block, outputs="*")
    with ro.retain(block, POINTS) as alone:
        run(block, x)
    with ro.retain(block, "*") as kept:
        run(block, x)
    assert [name for name, slot in kept.items() if slot.grad is None] == []
    for name in POINTS:
        torch.testing.assert_close(kept[name].grad, alone[name].grad, rtol=1e-5, atol=1e-6, msg=name)


def test_inside_a_torch_func_transform() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    ro.fuse(net, outputs="0")
    with pytest.raises(RuntimeError, match="retain= inside a torch.func transform"), ro.retain(net):
        torch.func.grad(lambda x: net(x).sum())(torch.ones(2, 3))


@pytest.mark.parametrize("order", ["outputs first", "ops first", "in turn"])
def test_in_any_order(order: str, block: Block, x: torch.Tensor) -> None:
    kinds = {name: type(m) for name, m in block.named_modules()}
    if order == "outputs first":
        ro.fuse(block, rules=[], outputs="*")
        assert {row.op for row in ro.fuse(block)} == OPS
    elif order == "ops first":
        ro.fuse(block)
        table = ro.fuse(block, outputs="*")
        assert {row.op for row in table.replaced} == {"output"}
    else:
        ro.fuse(block, rules=["norm"], outputs="norm2")
        ro.fuse(block, outputs=lambda path: path != "norm2")
    names = {*POINTS, *(f"{name}.out" for name in CHILDREN)}
    assert names <= set(ro.points(block))
    fused = {name: type(m) for name, m in block.named_modules()}
    assert {row.why for row in ro.fuse(block, outputs="*").left} == {"already fused", "its output is a point already"}
    assert {name: type(m) for name, m in block.named_modules()} == fused
    with ro.retain(block, list(names)) as kept:
        run(block, x)
    assert all(slot.grad is not None for slot in kept.values())
    ro.unfuse(block)
    assert {name: type(m) for name, m in block.named_modules()} == kinds
    assert not any("_requests" in vars(m) for m in block.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_them_too(copied: Callable, block: Block, x: torch.Tensor) -> None:
    ro.fuse(block, outputs="*")
    other = copied(block)
    with ro.retain(other, "fc.out") as kept, ro.retain(block, "fc.out") as of_first:
        run(other, x)
        run(block, x)
    assert torch.equal(kept["fc.out"].grad, of_first["fc.out"].grad)
    ro.unfuse(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in Block().modules()]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "vit", "timm vit"])
def test_models(family: str) -> None:
    """Of every module that returns a tensor, or several: the gradient is that of `retain_grad()`."""
    model, inputs = make(family)
    tried: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if type(output) in (tuple, list, torch.Tensor) and isinstance(first, torch.Tensor) and first.requires_grad:
                first.retain_grad()
                tried.setdefault(name, []).append(first)

        return keep

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    torch.manual_seed(0)
    before = step(model, inputs)
    for handle in handles:
        handle.remove()
    ro.fuse(model, rules=[], outputs=list(tried))
    with ro.retain(model, "*.out") as kept:
        torch.manual_seed(0)
        after = step(model, inputs)
    assert len(kept) == len(tried) > 10
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for name, values in tried.items():
        grads = [value.grad for value in values if value.grad is not None]  # of several calls their sum
        if grads:
            assert torch.equal(kept[f"{name}.out"].grad, sum(grads)), name
        else:
            assert kept[f"{name}.out"].grad is None, name


@pytest.mark.parametrize("fused", [False, True], ids=["not fused", "fused"])
def test_compiled_and_the_residual_stream(fused: bool) -> None:
    model, tokens = tiny_llama(), torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(1))
    ro.fuse(model, rules=None if fused else [], outputs=["model.layers.?", "*.self_attn"])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with ro.retain(model, "*.out") as theirs:
        model(tokens, labels=tokens).loss.backward()
    compiled(tokens, labels=tokens).loss.backward()
    with ro.retain(compiled, "*.out") as kept:
        compiled(tokens, labels=tokens).loss.backward()
    names = [f"model.layers.{i}{m}.out" for i in range(2) for m in ("", ".self_attn")]
    assert sorted(kept) == sorted(names)
    for name in names:
        torch.testing.assert_close(kept[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    with ro.retain(compiled, "model.layers.?.out", ro.Stats("l2", over="rows")) as statistics:
        compiled(tokens, labels=tokens).loss.backward()
    per_sample = ro.per_sample_norms(statistics["model.layers.0.out"])
    torch.testing.assert_close(per_sample, kept["model.layers.0.out"].grad.flatten(1).norm(dim=1))


def test_under_a_checkpoint_and_in_watch(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    ro.fuse(model, rules=[], outputs="0")
    with ro.retain(model, "0.out") as expected:
        model(x).sum().backward()
    with ro.retain(model, "0.out") as kept:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(kept["0.out"].grad, expected["0.out"].grad)
    read: list[Any] = []
    with ro.watch(model, "0.out", ro.Stats("l2"), every=1, to=lambda n, readings: read.append(readings)) as watcher:
        model(x).sum().backward()
        watcher.step()
    assert read[0]["0.out"]["l2"] == pytest.approx(expected["0.out"].grad.norm().item())


def test_sharded(block: Block, x: torch.Tensor) -> None:
    names = ["fc", "norm2"]
    theirs = retained_by_hooks(block, names, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(block.fc, mesh=mesh)
        ro.fuse(block, outputs=names)
        fully_shard(block.norm2, mesh=mesh)  # whose class is another one then
        assert [row.why for row in ro.fuse(block, rules=[], outputs="norm2").left if row.name == "norm2"] == [
            "already fused",
            "something made another class of its class since",
        ]
        with ro.retain(block, "*.out") as kept:
            run(block, x)
        for name in names:
            torch.testing.assert_close(kept[f"{name}.out"].grad, theirs[name], rtol=1e-5, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_modules_of_ours(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 8), ro.nn.SwiGLU(), ro.nn.Point())
    table = ro.fuse(model, rules=[], outputs="*")
    assert [(row.name, row.op, row.why) for row in table] == [
        ("0", "output", ""),
        ("1", "output", ""),
        ("2", None, "it is a point itself"),
    ]
    with ro.retain(model, "*") as kept:
        model(x).square().sum().backward()
    assert list(kept) == ["0.out", "1.gate", "1.up", "1.act", "1.out", "2"]
    torch.testing.assert_close(kept["0.out"].grad, torch.cat([kept["1.gate"].grad, kept["1.up"].grad], -1))
    assert torch.equal(kept["1.out"].grad, kept["2"].grad)
    ro.unfuse(model)
    assert type(model[1]) is ro.nn.SwiGLU
    with ro.retain(model, "1.act") as again:
        model(x).square().sum().backward()
    assert torch.equal(again["1.act"].grad, kept["1.act"].grad)


def test_wholly_or_not_at_all(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    ro.fuse(block, rules=["norm"], outputs="norm2")
    before = {name: (type(m), dict(vars(m))) for name, m in block.named_modules()}
    monkeypatch.setattr("retainops.fusing.model.without", lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ro.fuse(block, outputs="*")
    assert {name: (type(m), dict(vars(m))) for name, m in block.named_modules()} == before


def test_paths_are_those_of_points(x: torch.Tensor) -> None:
    """Compiled in place or by a wrapper, a module has the name that it has to `ro.retain`."""
    inner = nn.Sequential(nn.Linear(8, 8))
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Tanh())
    ro.fuse(model, rules=[], outputs="0.0")
    assert list(ro.points(model)) == ["0.0.out"]
    with ro.retain(model) as kept:
        model(x).sum().backward()
    assert kept["0.0.out"].grad is not None
