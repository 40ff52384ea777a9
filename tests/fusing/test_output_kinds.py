"""What modules return that is not one tensor, and what `ro.fuse(model, outputs=...)` leaves."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import retainops as ro
from tests.fusing.blocks import Block
from tests.fusing.returned import Returns, tiny_llama

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
