"""A sum and its norm, in the shapes in which blocks are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import retainops as ro
from tests.fusing.blocks import assert_same, run

Tensor = torch.Tensor


class Parts(nn.Module):
    """What blocks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.dropout, self.scale = nn.LayerNorm(8), nn.Identity(), nn.Identity()


class Assigned(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.mlp(self.norm(x))
        return x * 2


class Returned(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


class ReturnedWithDropout(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.dropout(self.mlp(self.norm(x)))


class ReturnedWithMore(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.dropout(self.scale(self.mlp(self.norm(x))))


class AssignedWithDropout(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.dropout(self.mlp(self.norm(x)))
        return x * 2


class OfAnotherName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        h = self.norm(x)
        return x + self.mlp(h) * h


class OfTheSameName(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(x) + x
        h = self.norm(h)
        return self.mlp(h) * h


class NormLast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x + self.mlp(x)
        return self.norm(h)


class NormOfAll(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


class Crossing(Parts):
    """A decoder's: where there is something to attend to, another sum is normed."""

    def forward(self, x: Tensor) -> Tensor:
        memory = None if self.training else 2 * x
        h = x + self.attention(x)
        if memory is not None:
            r = self.scale(h)
            h = self.attention(memory)
            h = r + h
        r = h
        h = self.norm(h)
        return r + self.mlp(h)


class FoundInTheSum(Parts):
    """What is asked for after the sum is known by it alone."""

    def forward(self, x: Tensor) -> Tensor:
        memory = None if self.training else x
        h = x + (memory := self.attention(x) if memory is None else self.mlp(x))
        if memory is not None:
            r = self.scale(h)
            h = r + 10 * memory
        r = h
        h = self.norm(h)
        return r + self.mlp(h)


class TwoSums(Parts):
    """The same in two branches: a norm is of its module, and may have several places."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            h = x + self.mlp(x)
            return self.norm(h)
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


SHAPES = [
    Assigned,
    Returned,
    ReturnedWithDropout,
    ReturnedWithMore,
    AssignedWithDropout,
    OfAnotherName,
    OfTheSameName,
    NormLast,
    NormOfAll,
    Crossing,
    FoundInTheSum,
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", SHAPES, ids=lambda cls: cls.__name__)
def test_shapes(cls: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model, x = cls().double().train(training), torch.randn(4, 8, dtype=torch.float64)
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    def grads(model: nn.Module) -> list[Tensor]:
        y = model(x)
        y.pow(3).sum().backward()  # that of the squares of a norm is nothing but rounding
        found = [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        return found

    handle = model.norm.register_forward_pre_hook(keep)
    theirs = grads(model)
    handle.remove()
    table = ro.fuse(model)
    assert [row.op for row in table] == ["add_norm(norm)", "layer_norm"]
    with ro.retain(model, "norm.summed") as kept:
        assert_same(grads(model), theirs)
    torch.testing.assert_close(kept["norm.summed"].grad, seen[0].grad)
    ro.unfuse(model)
    assert all(torch.equal(a, b) for a, b in zip(grads(model), theirs, strict=True))


def test_two_places_of_one_norm() -> None:
    torch.manual_seed(0)
    model, x = TwoSums(), torch.randn(4, 8)
    theirs = [model.train(training)(x) for training in (True, False)]
    assert [row.op for row in ro.fuse(model)] == ["add_norm(norm)", "layer_norm"]
    assert_same([model.train(training)(x) for training in (True, False)], theirs)


class InPlace(Parts):
    """`x += y` writes into a tensor of the caller's, which no sum of an op's does."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        x += self.mlp(x.detach())
        return x + self.mlp(self.norm(x))


def test_sums_in_place_stay() -> None:
    model = InPlace()
    assert [row.op for row in ro.fuse(model)] == ["layer_norm"]


def test_hooks_and_a_norm_by_hand() -> None:
    torch.manual_seed(0)
    model, x = Returned(), torch.randn(4, 8)
    model.norm.register_forward_hook(lambda module, args, out: out * 2)
    theirs = run(model, x)
    ro.fuse(model)
    assert_same(run(model, x), theirs)
