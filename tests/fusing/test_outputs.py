"""`ro.fuse(model, outputs=...)`: what a module returns, as a point."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import retainops as ro
from retainops.fusing.parts import has_plain_product
from retainops.points import COMPILED_VIEWS
from tests.fusing.blocks import OPS, POINTS, Block, assert_same, run
from tests.fusing.families import make, step

CHILDREN = ["norm1", "norm2", "norm3", "gate", "up", "down", "act", "gelu", "fc", "softmax"]


def retained_by_hooks(model: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of what these modules return, by `retain_grad()`."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output if isinstance(output, torch.Tensor) else output[0]
            seen[name].retain_grad()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    run(model, x)
    for handle in handles:
        handle.remove()
    return {name: value.grad for name, value in seen.items()}


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


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


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


class InPlace(nn.Module):
    """What a module returned is changed in place, and what it was given is used again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.fc, self.module = nn.Linear(8, 8), module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        y = self.module(h)
        y.mul_(3)
        return y.sum() + (h if y.shape == h.shape else 0 * h).sum()


HELD = {
    "identity": nn.Identity,
    "dropout in eval": lambda: nn.Dropout().eval(),
    "flatten": lambda: nn.Flatten(0),
    "point": ro.nn.Point,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*HELD, "linear"])
def test_what_others_have_too_is_not_changed_in_place(name: str, compiled: bool, x: torch.Tensor) -> None:
    """PyTorch refuses: else the gradients of the others would be wrong. In compiled code nobody knows who has it."""
    if compiled and not COMPILED_VIEWS:
        pytest.skip("no point is a view in what this torch compiles")
    torch._dynamo.reset()
    model = InPlace(HELD.get(name, lambda: nn.Linear(8, 8))())
    run_it = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    expected = run(run_it, x)
    ro.fuse(model, rules=[], outputs="module")
    assert_same(run(run_it, x), expected)
    if name == "linear" and not compiled:  # and what it was before the change is the point
        with ro.retain(model) as kept:
            assert_same(run(model, x), expected)
        torch.testing.assert_close(kept["module.out"].grad, torch.full((4, 8), -3.0))
        return
    with ro.retain(model), pytest.raises(Exception, match="is a view and is being modified inplace"):
        run_it(x)


def test_what_a_point_is_made_of_is_not_changed_in_place(x: torch.Tensor) -> None:
    """If the point is used after it."""
    point, h = nn.Sequential(ro.nn.Point()), x * 2
    with ro.retain(point):
        c = point(h)
        h.mul_(3)
        with pytest.raises(RuntimeError, match="is a view and its base .* has been modified inplace"):
            c.sin().sum().backward()


class Doubled(ro.nn.HoldsPoints):
    """A point in a module of somebody's own."""

    op = ro.nn.SquaredReLU.op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        c = self.point(self.op.points[0].name, h)
        c.relu_()
        return h + c


def test_a_point_in_a_module_of_ones_own_is_not_changed_in_place(x: torch.Tensor) -> None:
    model = nn.Sequential(Doubled())
    model(x)
    with ro.retain(model), pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(x)


def test_a_point_in_code_is_not_changed_in_place_there(x: torch.Tensor) -> None:
    def f(x: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        c = ro.point(x * 2, "c", retain=kept)
        c.mul_(3)
        return c.sum()

    torch._dynamo.reset()
    compiled = [torch.compile(f, fullgraph=True, backend=name) for name in ("aot_eager", "inductor")]
    for call in (f, *(compiled if COMPILED_VIEWS else ())):
        with pytest.raises(Exception, match="is a view and is being modified inplace"):
            call(x, ro.Retained("c"))


@pytest.mark.parametrize("rules", [None, []], ids=["fused", "not fused"])
@pytest.mark.parametrize("asked", ["*.out", "*"])
def test_attention_of_torch(asked: str, rules: list | None) -> None:
    """Whose module has points of its own beside this one."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)
    names = ["self_attn", "linear2", "norm1"]
    theirs, before = retained_by_hooks(model, names, x), run(model, x)
    ro.fuse(model, rules=rules, outputs=names)
    with ro.retain(model, asked) as kept:
        assert_same(run(model, x), before)
    assert ("self_attn.p" in kept) == (asked == "*" and rules is None)
    for name in names:
        torch.testing.assert_close(kept[f"{name}.out"].grad, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    with ro.retain(model, "*.out") as outer, ro.retain(model, asked) as inner:
        run(model, x)
    for name in names:
        torch.testing.assert_close(outer[f"{name}.out"].grad, inner[f"{name}.out"].grad)


class First(nn.Module):
    def forward(self, values: Any) -> torch.Tensor:
        return values[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_recurrent_layers(copied: Callable) -> None:
    """They keep a list of their weights, and copy themselves without it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(8, 5), First()), torch.randn(3, 2, 8)
    theirs, before = retained_by_hooks(model, ["0"], x), run(model, x)
    assert [row.op for row in ro.fuse(model, outputs="0")] == ["output"]
    for each in (model, copied(model)):
        with ro.retain(each) as kept:
            assert all(torch.equal(a, b) for a, b in zip(run(each, x), before, strict=True))
        torch.testing.assert_close(kept["0.out"].grad, theirs["0"])
        ro.unfuse(each)
        assert type(each[0]) is nn.LSTM


class CompiledForward(nn.Linear):
    @torch.compile(backend="eager")
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_forward_that_is_compiled_itself(x: torch.Tensor) -> None:
    """Dynamo marks such a function, and is not to take the one around it for marked."""
    torch._dynamo.reset()
    model = nn.Sequential(CompiledForward(8, 8))
    ro.fuse(model, rules=[], outputs="0")
    for call in (model, torch.compile(model, backend="eager")):
        with ro.retain(model) as kept:
            call(x).sum().backward()
        assert torch.equal(kept["0.out"].grad, torch.ones(4, 8))


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        torch._dynamo.graph_break()
        return h * 2


def test_classes_do_not_use_up_each_others_recompilations(x: torch.Tensor) -> None:
    """torch.compile counts by code, and gives up: each class has code of its own."""
    torch._dynamo.reset()
    many = torch._dynamo.config.recompile_limit + 3
    model = nn.Sequential(*(type(f"Breaks{i}", (Breaks,), {"forward": copied(Breaks.forward)})() for i in range(many)))
    ro.fuse(model, rules=[], outputs=lambda path: "." not in path)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.compile(model, backend="eager")(x)


def copied(function: Any) -> Any:
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


class Returns(nn.Module):
    def __init__(self, made: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: torch.Tensor) -> Any:
        return self.made(x * 2)


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "made",
    [lambda y: (y, None), lambda y: [y, y], lambda y: Pair(y, 1), lambda y: y.max(dim=0)],
    ids=["tuple", "list", "named tuple", "torch.return_types"],
)
def test_the_first_of_several(made: Callable, x: torch.Tensor) -> None:
    model = nn.Sequential(Returns(made))
    theirs = model(x)
    ro.fuse(model, rules=[], outputs="0")
    with ro.retain(model) as kept:
        ours = model(x)
        ours[0].square().sum().backward()
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(kept["0.out"].grad, 2 * theirs[0].detach())


def test_a_tensor_that_is_returned_twice(x: torch.Tensor) -> None:
    model = nn.Sequential(Returns(lambda y: (y, y, y * 2)))
    ro.fuse(model, rules=[], outputs="0")
    with ro.retain(model) as kept:
        a, b, c = model(x)
        (a + 3 * b + c).sum().backward()
    assert torch.equal(kept["0.out"].grad, torch.full((4, 8), 4.0))


class Output(OrderedDict):
    """As a ModelOutput of transformers is one."""


@pytest.mark.parametrize("kind", [dict, Output])
def test_the_first_of_a_dict(kind: type, x: torch.Tensor) -> None:
    model, made = nn.Sequential(Returns(lambda y: made[-1])), []
    ro.fuse(model, rules=[], outputs="0")
    y = x * 2
    made.append(kind(y=y, n=3))
    with ro.retain(model) as kept:
        output = model(x)
        output["y"].square().sum().backward()
    assert type(output) is kind
    assert list(output) == ["y", "n"]
    assert kind is Output or made[0]["y"] is y  # a module may keep what it returns
    torch.testing.assert_close(kept["0.out"].grad, 4 * x.detach())


def test_of_a_model_of_transformers_what_it_returns() -> None:
    model, tokens = tiny_llama(), torch.randint(50, (2, 6))
    ro.fuse(model, rules=[], outputs=["model", "model.norm"])
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with ro.retain(model) as kept:
            call(tokens, labels=tokens).loss.backward()
        assert torch.equal(kept["model.out"].grad, kept["model.norm.out"].grad)


class Own(tuple):
    def __new__(cls, a: Any, b: Any) -> Any:
        return super().__new__(cls, (a, b))


@pytest.mark.parametrize(
    "made", [lambda y: None, lambda y: {}, lambda y: (3, y), lambda y: Own(y, y)], ids=["None", "dict", "tuple", "own"]
)
def test_what_is_no_tensor_is_an_error_where_it_is_asked(made: Callable, x: torch.Tensor) -> None:
    model = nn.Sequential(Returns(made))
    ro.fuse(model, rules=[], outputs="0")
    assert type(model(x)) is type(made(x))
    expected = rf"point '0.out': Returns returned a {type(made(x)).__name__}; expected a torch.Tensor, or a tuple"
    with ro.retain(model), pytest.raises(TypeError, match=expected):
        model(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.act(self.gate(x)) * self.up(x)}


def test_and_no_error_where_other_points_of_the_module_are_asked(x: torch.Tensor) -> None:
    model = nn.Sequential(Gated())
    ro.fuse(model, outputs="0")
    with ro.retain(model, "0.act") as kept:
        model(x)["y"].sum().backward()
    assert kept["0.act"].grad is not None


class Named(nn.Linear):
    point = 3


def test_left_and_said(x: torch.Tensor) -> None:
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Linear(8, 8)]), "named": Named(8, 8), "set": nn.Linear(8, 8)})
    model["set"].forward = torch.cos
    model["taken"] = nn.Sequential(OrderedDict(out=ro.nn.Point()))
    model["lazy"] = nn.LazyLinear(8)
    table = ro.fuse(model, rules=[], outputs=lambda path: True)
    assert [(row.name, row.op, row.why) for row in table] == [
        ("list", None, "it has no forward"),
        ("list.0", "output", ""),
        ("named", None, "it has a 'point' of its own, and so has what it would be given"),
        ("set", None, "its forward is set on the module itself"),
        ("taken", None, "it has a point called out"),
        ("taken.out", None, "it is a point itself"),
        ("lazy", None, "its parameters are made in its first call; call it once before"),
    ]


def test_a_pattern_of_nothing(block: Block) -> None:
    with pytest.raises(KeyError, match="fuse: 'layers.*' matches no module; there are: norm1, norm2"):
        ro.fuse(block, outputs="layers.*")
    assert type(block) is Block
    with pytest.raises(TypeError, match="fuse: a pattern is int; expected a string"):
        ro.fuse(block, outputs=[3])
    for wrong in (3, {"norm1": None}):
        with pytest.raises(TypeError, match=f"fuse: outputs is {type(wrong).__name__}; expected a pattern"):
            ro.fuse(block, outputs=wrong)


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
