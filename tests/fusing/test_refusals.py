"""Modules that look like what a rule is for and are not, or are by now another thing."""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import retainops as ro
from tests.fusing.blocks import TinyRMSNorm, assert_same, run
from tests.fusing.families import SIZES


class Acts(nn.Module):
    """A linear layer and an activation."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 8) * 30


def gelu_10() -> nn.Module:
    from transformers.activations import ACT2FN

    return ACT2FN["gelu_10"]


class Unhashable:
    """An activation that no dict can have as a key."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


NOT_KNOWN: dict[str, Callable[[], Any]] = {
    "cut off at 6": nn.ReLU6,
    "cut off at 20": lambda: nn.Hardtanh(0, 20.0),
    "cut off at 10": gelu_10,
    "a slope": lambda: nn.LeakyReLU(0.0),
    "a threshold": lambda: nn.Threshold(0, 0),
    "no hash": Unhashable,
}


@pytest.mark.parametrize("act", NOT_KNOWN)
def test_activations_that_are_others_far_out_or_later(act: str, x: torch.Tensor) -> None:
    model = Acts(NOT_KNOWN[act]())
    theirs = run(model, x)
    assert not ro.fuse(model)
    assert_same(run(model, x), theirs)


def doubled(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    return wrapper


@pytest.mark.parametrize("cls", [Acts, nn.LayerNorm, nn.Softmax, TinyRMSNorm], ids=lambda cls: cls.__name__)
def test_a_forward_that_was_wrapped_on_its_class(cls: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cls, "forward", doubled(cls.forward))
    model = nn.Sequential(cls({Acts: nn.GELU(), nn.Softmax: -1}.get(cls, 8)))
    theirs = run(model, x)
    table = ro.fuse(model)
    assert not table.replaced
    assert len(table.left) == 1
    assert_same(run(model, x), theirs)


class Gated(nn.Module):
    """The gate is used once more after its activation."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.fc = act, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g, y = self.fc(x), x
        return self.act(g) * y + g


class Packed(nn.Module):
    """The same of a packed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        up = up * self.act(gate)
        return up + gate


class Private(nn.Module):
    """Python spells its attribute as _Private__scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(8, 8), nn.GELU()
        self.__scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x)) * self.__scale


def test_a_gate_that_is_used_later(x: torch.Tensor) -> None:
    model = Gated(nn.ReLU(inplace=True))
    theirs = run(model, x)
    assert [row.why for row in ro.fuse(model)] == ["gated(act): it works in place, on a gate that may be used later"]
    assert_same(run(model, x), theirs)
    model = Gated(nn.ReLU())
    assert len(ro.fuse(model).replaced) == 1
    model.act.inplace = True
    theirs = run(model, x)
    ro.unfuse(model)
    assert_same(theirs, run(model, x))
    model, theirs = Packed(), run(Packed(), x)
    ro.fuse(model)
    assert_same(run(model, x), theirs)


def test_private_names(x: torch.Tensor) -> None:
    model = Private()
    theirs = run(model, x)
    assert all("its method forward has the private name __scale" in row.why for row in ro.fuse(model))
    assert_same(run(model, x), theirs)


def _in_training(self: Any, x: torch.Tensor) -> torch.Tensor:
    wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * wide * (1.5 if self.training else 1.0)


def _of_channels(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.transpose(1, -1)
    wide = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight * wide).transpose(1, -1)


@pytest.mark.parametrize("forward", [_in_training, _of_channels])
@pytest.mark.parametrize("training", [True, False])
def test_norms_that_are_others_at_times(forward: Callable, training: bool) -> None:
    cls = type("OtherRMSNorm", (nn.Module,), {"forward": forward, "variance_epsilon": 1e-6})
    module = cls()
    module.weight = nn.Parameter(torch.ones(8))
    assert [row.why for row in ro.fuse(module.train(training))] == ["no norm of retainops computes what it does"]


class Sum(nn.Module):
    """A sum and its norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + x.flip(0))


class Called(nn.LayerNorm):
    """It does more when it is called."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x) * 2


def test_a_call_of_its_own_and_names_that_are_ours(x: torch.Tensor) -> None:
    model = Sum(Called(8))
    theirs = run(model, x)
    ro.fuse(model)
    assert_same(run(model, x), theirs)

    model = Sum(TinyRMSNorm(8))
    model.norm.offset = 3.0
    theirs = run(model, x)
    assert {row.why for row in ro.fuse(model)} == {"it has a 'offset' of its own, and so has what it would be given"}
    del model.norm.offset
    ro.fuse(model)
    model.norm.offset, model.norm.round_first = 3.0, False  # later
    assert_same(run(model, x), theirs)

    model = Sum(nn.LayerNorm(8))
    model.norm.alone = nn.Identity()  # a name of the norm of a sum
    theirs = run(model, x)
    ro.fuse(model)
    assert_same(run(model, x), theirs)
    assert isinstance(model.norm.alone, nn.Identity)


@pytest.mark.parametrize("name", ["point", "call", "_requests", "fused_gated"])
def test_children_and_methods_that_are_called_as_ours(name: str, x: torch.Tensor) -> None:
    model = Gated(nn.SiLU())
    model.add_module(name, nn.Tanh())
    (row,) = ro.fuse(model)
    assert row.why == f"gated(act): it has a '{name}' of its own, and so has what it would be given"
    cls = type("Gated", (Gated,), {name: lambda self, x: x})
    assert not ro.fuse(cls(nn.SiLU())).replaced


class Frozen(Acts):
    """It lets nothing be set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "frozen" in self.__dict__:
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_a_module_that_lets_nothing_be_set(x: torch.Tensor) -> None:
    model = Frozen(nn.GELU())
    model.__dict__["frozen"] = True
    theirs = run(model, x)
    assert len(ro.fuse(model).replaced) == 1
    with ro.retain(model, "c") as kept:
        assert_same(run(model, x), theirs)
    assert kept["c"].grad is not None
    ro.unfuse(model)
    assert type(model) is Frozen


def test_asking_is_of_all_modules_or_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(ro.nn.Point(), ro.nn.Point())

    def ask(request: Any) -> None:
        raise RuntimeError("not now")

    model[1].ask = ask
    with pytest.raises(RuntimeError, match="not now"), ro.retain(model):
        pass
    assert not model[0]._requests


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout) -> None:
    parts = [torch.randn(n, 8) for n in (2, 3)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    model = nn.Sequential(nn.LayerNorm(8))
    ro.fuse(model)
    for ours, part in zip(model(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(ours, nn.LayerNorm(8)(part))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("dim", [1, -1])
def test_softmax_of_nested_tensors(dim: int) -> None:
    """Along the dim in which its parts differ it goes to PyTorch's."""
    nested = torch.nested.nested_tensor([torch.randn(n, 8) for n in (2, 3)], layout=torch.jagged, requires_grad=True)
    model = nn.Sequential(nn.Softmax(dim))
    expected = model(nested).values()
    ro.fuse(model)
    torch.testing.assert_close(model(nested).values(), expected)
    why = "no op stands for its call of softmax: its input is nested" if dim == 1 else "is a nested tensor"
    with ro.retain(model, "0.p"), pytest.raises(RuntimeError, match=why):
        model(nested)


def test_what_a_norm_computes_is_found_out_under_fake_tensors_too() -> None:
    """And what is found out is remembered, so it must be right."""

    class RMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + self.eps)).to(x.dtype)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate, self.up, self.act = RMSNorm(), nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.act(self.gate(x)) * self.up(x))

    with FakeTensorMode():
        model = Gated()
        assert [row.op for row in ro.fuse(model)] == ["gated(act)", "rms_norm"]
        assert model(torch.randn(2, 8)).shape == (2, 8)


def test_a_function_of_rope_that_is_exchanged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    from tests.fusing.families import make, step

    model, inputs = make("llama")
    ro.fuse(model, rules=["rope"])
    theirs, copied = step(model, inputs), copy.deepcopy(model)
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, *others: original(q * 2, *others))
    ours = step(copied, inputs)
    with ro.retain(copied, "*.q_rot") as kept:
        step(copied, inputs)
    ro.unfuse(copied)
    assert torch.equal(step(copied, inputs)["loss"], ours["loss"])
    assert not torch.equal(ours["loss"], theirs["loss"])
    assert all(slot.grad is not None for slot in kept.values())


def test_models_of_one_configuration() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**SIZES)
    one, other = LlamaModel(config), LlamaModel(config)
    ro.fuse(one)
    assert one.config._attn_implementation == "retainops"
    assert all(m.config is one.config for m in one.modules() if "config" in vars(m))
    assert other.config is config
    assert config._attn_implementation == "sdpa"
    assert "attention" in {row.op for row in ro.fuse(other)}
    ro.unfuse(one)
    assert all(m.config is config for m in one.modules() if "config" in vars(m)) or one.config is not other.config
    assert other.config._attn_implementation == "retainops"
    ro.unfuse(other)
    assert all(m.config is config for m in (*one.modules(), *other.modules()) if "config" in vars(m))
    ro.fuse(one)
    one.config.use_cache = False
    one.set_attn_implementation("eager")  # somebody's choice
    ro.unfuse(one)
    assert (one.config._attn_implementation, one.config.use_cache) == ("eager", False)
    assert (config._attn_implementation, config.use_cache) == ("sdpa", True)
    assert "eager attention treats" in str(ro.fuse(one))
    assert one.config._attn_implementation == "eager"


def test_the_loss_of_a_model_says_nothing_about_its_attention() -> None:
    from tests.fusing.families import make

    model, _ = make("vit")
    table = ro.fuse(model)
    assert [row.op for row in table if not row.name] == [None, "attention"]
    assert model.config is model.vit.config


def test_nothing_is_fused_or_unfused_while_it_is_asked(x: torch.Tensor) -> None:
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(**SIZES))
    ro.fuse(model, rules=["attention"])
    why = r"fuse: ro.retain\(model, ...\) or ro.watch\(model, ...\) holds requests"
    with ro.retain(model, "*.p"):
        for function in (ro.fuse, ro.unfuse):
            with pytest.raises(RuntimeError, match=why):
                function(model)
    ro.unfuse(model)

    block = Acts(nn.GELU())
    ro.fuse(block)
    watcher = ro.watch(block, every=2)
    with pytest.raises(RuntimeError, match="un" + why):
        ro.unfuse(block)
    run(block, x)
    watcher.step()
    ro.unfuse(block)
    with pytest.raises(RuntimeError, match="watch: a Acts holds no points any more; ask anew"):
        watcher.step()
    watcher.close()


def test_threads_that_ask_at_once() -> None:
    """Without a lock, requests get lost between reading and writing."""
    point = ro.nn.Point()

    def ask() -> None:
        for _ in range(300):
            with ro.retain(point):
                pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert point._requests == ()
