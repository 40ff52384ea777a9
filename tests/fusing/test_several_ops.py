"""Modules in which several ops are found: each is called as itself, and has its own points."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro

Tensor = torch.Tensor


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], -1)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Attention(nn.Module):
    """As Falcon has it, and much that is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        turns = torch.arange(x.shape[1]).outer(torch.tensor([1.0, 0.1, 1.0, 0.1])).expand(len(x), -1, -1)
        q, k = apply_rotary_pos_emb(q, k, turns.cos(), turns.sin())
        self.seen |= {"q_rot": q, "k_rot": k}
        self.seen["o"] = F.scaled_dot_product_attention(q, k, v)
        return self.seen["o"].transpose(1, 2).flatten(2)


@pytest.mark.parametrize("rules", [None, ["rope", "sdpa"], ["sdpa", "rope"]], ids=str)
def test_rope_and_attention_in_one_module(rules: list[str] | None) -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    expected = model(x)
    for value in model.seen.values():
        value.retain_grad()
    expected.square().sum().backward()
    eager = {name: value.grad for name, value in model.seen.items()}
    ro.fuse(model, rules=rules)
    assert set(ro.points(model)) == {"q_rot", "k_rot", "s", "p", "o"}
    torch.testing.assert_close(model(x), expected)
    with ro.retain(model) as kept:
        model(x).square().sum().backward()
    for name, grad in eager.items():
        torch.testing.assert_close(kept[name].grad, grad)


def test_what_is_for_attention_alone_knows_whose_a_point_is() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    ro.fuse(model)
    with ro.retain(model, "p", ro.Relevance("chefer")) as kept:
        model(x).square().sum().backward()
    assert kept["p"].chefer.shape == (2, 5, 5)
    why = r"point 'q_rot' was asked for .* which is for points of attention, and it is one of rope"
    with pytest.raises(ValueError, match=why), ro.retain(model, "q_rot", ro.Relevance("chefer")):
        pass


class Squared(ro.nn.HoldsPoints):
    op = ro.nn.SquaredReLU.op

    def fused_squared(self, x: Tensor) -> Tensor:
        return self.call(x)


class Mished(ro.nn.HoldsPoints):
    op = ro.nn.Mish.op

    def fused_mish(self, x: Tensor) -> Tensor:
        return self.call(x)


class Both(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.mish(torch.relu(F.scaled_dot_product_attention(q, k, v)).square())


@pytest.mark.usefixtures("registry")
def test_rules_of_the_users() -> None:
    """One op of theirs goes with those of retainops; a second would be called in the place of the first."""

    @ro.fuse_rule(before="torch.relu(X).square()", after="self.fused_squared(X)")
    def squared(module: nn.Module) -> type:
        return Squared

    torch.manual_seed(0)
    model, x = Both(), torch.randn(2, 5, 8)
    expected = model(x)
    ro.fuse(model, rules=["sdpa", squared])
    torch.testing.assert_close(model(x), expected)
    assert set(ro.points(model)) == {"s", "p", "o", *(info.name for info in Squared.op.points)}
    ro.unfuse(model)

    @ro.fuse_rule(before="F.mish(X)", after="self.fused_mish(X)")
    def mished(module: nn.Module) -> type:
        return Mished

    table = ro.fuse(model)
    assert [row.op for row in table.replaced] == ["mished"]
    assert sorted(row.why for row in table.left) == [
        "sdpa(F.scaled_dot_product_attention): it would have two points called 's'",
        "squared: Mished and Squared have an `op` each, and self.call(x) calls one alone; say in them which, by "
        "self.call(x, op=...) in the place of `op`, and by point_infos() what its points are",
    ]
    torch.testing.assert_close(model(x), expected)
