"""What `ro.fuse` does to modules, whatever they are, and under any mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
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
