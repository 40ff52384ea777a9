"""Attention that an object calls which is no module, as diffusers' processors: whatever that object is."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from tests.fusing.test_attention import assert_points_are_eagers

Tensor = torch.Tensor


class Processor:
    """Without weights, so that modules can share it."""

    factor = 1.0

    def __call__(self, attn: Any, x: Tensor, scale: float | None = None) -> Tensor:
        q, k, v = attn.proj(self.factor * x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Tensor:
        return 2 * function(*args, **named)

    return call


class Decorated(Processor):
    @doubled
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        q, k, v = attn.proj(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Branches(Processor):
    def __call__(self, module: Any, x: Tensor) -> Tensor:
        q, k, v = module.proj(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.factor > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            return F.scaled_dot_product_attention(q, k, v)


class Weighted(nn.Module):
    """A processor with weights is a module, though it is not called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(8, 8)

    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        q, k, v = attn.proj(self.more(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.proj, self.processor = nn.Linear(8, 24), processor

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return self.processor(self, x, *args, **named).transpose(1, 2).flatten(-2)


def made(*processors: Any) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*map(Attention, processors)), torch.randn(2, 5, 8)


@pytest.mark.parametrize("kind", [Processor, Decorated, Branches, Weighted], ids=lambda kind: kind.__name__)
def test_the_points_are_eagers(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = kind()
    model, x = made(shared, shared)
    assert_points_are_eagers(model, lambda: model(x).square().sum(), monkeypatch, calls=2)


def test_the_processor_is_not_touched() -> None:
    shared = Processor()
    model, x = made(shared, shared)
    before = model(x)
    table = ro.fuse(model)
    assert [(row.kind, row.op) for row in table] == [("Attention", "attention_processor(processor)")] * 2
    assert type(shared) is Processor
    assert all(vars(attention)["processor"] is shared for attention in model)
    other = Attention(shared)
    assert not isinstance(other, ro.nn.HoldsPoints)
    assert torch.equal(model(x), before)  # nothing is asked: PyTorch's function, to the bit
    shared.factor = 2.0
    assert torch.equal(model(x), made_again(model, x))


def made_again(model: nn.Sequential, x: Tensor) -> Tensor:
    """What the model computes without any fusion."""
    copied = copy.deepcopy(model)
    ro.unfuse(copied)
    return copied(x)


def test_copies_pickles_and_unfuse() -> None:
    model, x = made(Processor(), Processor())
    before, attributes = model(x), [sorted(vars(attention)) for attention in model]
    ro.fuse(model)
    with ro.retain(model, "*.p") as kept:
        model(x).square().sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with ro.retain(other, "*.p") as again:
            other(x).square().sum().backward()
        assert all(torch.equal(again[name].grad, kept[name].grad) for name in kept)
        ro.unfuse(other)
        assert torch.equal(other(x), before)
    ro.unfuse(model)
    assert [sorted(vars(attention)) for attention in model] == attributes
    assert not ro.points(model)


def test_compiled() -> None:
    torch._dynamo.reset()
    model, x = made(Processor(), Decorated(), Weighted())
    ro.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with ro.retain(compiled, "*.s") as kept:
        compiled(x).square().sum().backward()
    with ro.retain(model, "*.s") as eager:
        model(x).square().sum().backward()
    assert len(kept) == 3
    for name, slot in kept.items():
        torch.testing.assert_close(slot.grad, eager[name].grad)


def test_a_processor_that_is_exchanged() -> None:
    model, x = made(Processor())
    ro.fuse(model)
    model[0].processor = same = Processor()
    same.factor = 3.0
    with ro.retain(model, "0.p") as kept:
        model(x).square().sum().backward()
    assert kept["0.p"].grad is not None
    model[0].processor = Decorated()
    torch.testing.assert_close(model(x), made_again(model, x))
    said = "Attention: points of its attention are asked for, but its processor, Decorated, is another one than"
    with ro.retain(model, "0.p"), pytest.raises(RuntimeError, match=said):
        model(x)
    ro.unfuse(model)
    ro.fuse(model)
    with ro.retain(model, "0.p") as kept:
        model(x).square().sum().backward()
    assert kept["0.p"].grad is not None


def test_a_call_that_is_set_on_its_class_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(Processor())
    ro.fuse(model)
    monkeypatch.setattr(Processor, "__call__", lambda self, attn, x: attn.proj(x)[..., None, :8])
    assert torch.equal(model(x), made_again(model, x))


class Wrapped(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)[:, None]


Wrapped.__call__ = doubled(Wrapped.__call__)  # type: ignore[method-assign]


class Starred(Processor):
    def __call__(self, *args: Any, attn: Any = None) -> Tensor:  # type: ignore[override]
        return F.scaled_dot_product_attention(args[1], args[1], args[1])[:, None]


class Rebound(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        attn = x
        return F.scaled_dot_product_attention(attn, attn, attn)[:, None]


class Whole(nn.Module):
    """A module in its own right, which is called by `__call__` too; its points are its own."""

    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return x


class Looped(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.scaled_dot_product_attention(x, x, x)
        return x[:, None]


class Scores(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return attn.get_attention_scores(x, x)[:, None]


class Above(Processor):
    def __call__(self, attn: Any, x: Tensor, scale: float | None = None) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        return super().__call__(attn, x, scale)


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not PyTorch's."""
    return q + k + v


class Own(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x)[:, None]


LEFT = {
    Wrapped: "of Wrapped: its __call__ was wrapped since its class was made",
    Starred: "of Starred: its __call__ has no parameter that stays the module",
    Rebound: "of Rebound: its __call__ has no parameter that stays the module",
    Looped: "of Looped: its attention is in a loop, and its points would be of several calls",
    Scores: "Scores makes the probabilities itself; diffusers' AttnProcessor2_0 calls attention",
    Above: "of Above: its method __call__ calls super()",
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_and_said(kind: Any) -> None:
    model, x = made(kind())
    expected = model(x) if kind not in (Scores, Above) else None
    (row,) = ro.fuse(model)
    assert (row.op, row.why) == (None, f"attention_processor(processor): {LEFT[kind]}")
    assert expected is None or torch.equal(model(x), expected)


def test_a_processor_that_is_a_whole_module() -> None:
    model, x = made(Whole())
    expected = model(x)
    assert [row.name for row in ro.fuse(model).replaced] == ["0.processor"]
    with ro.retain(model) as kept:
        torch.testing.assert_close(model(x.requires_grad_()), expected)
    assert set(kept) == {"0.processor.s", "0.processor.p", "0.processor.o"}


class Both(Attention):
    """Its own call of attention, beside its processor's."""

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        return self.processor(self, x) + F.scaled_dot_product_attention(x, x, x)[:, None, :, :4]


@pytest.mark.parametrize("rules", [None, ["attention_processor", "sdpa"]], ids=str)
def test_a_module_that_calls_attention_itself_too(rules: Any) -> None:
    model, x = Both(Processor()), torch.randn(2, 5, 8)
    expected = model(x)
    table = ro.fuse(model, rules=rules)
    assert [row.op is None for row in table] == [False, True] or [row.op is None for row in table] == [True, False]
    assert "a second of its kind" in str(table)
    with ro.retain(model):
        torch.testing.assert_close(model(x), expected)


def test_a_forward_that_is_set_on_the_module_keeps_it_fused() -> None:
    model, x = made(Processor())
    ro.fuse(model)
    model[0].forward = model[0].forward
    assert "a forward was set on the module itself" in str(ro.unfuse(model))
    with ro.retain(model, "0.p") as kept:
        model(x).square().sum().backward()
    assert kept["0.p"].grad is not None


@pytest.mark.parametrize("processor", [Own(), len, lambda attn, x: x, None, functools.partial(len)])
def test_what_is_not_known_at_all(processor: Any) -> None:
    assert not ro.fuse(made(processor)[0])
