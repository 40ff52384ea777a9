"""Points of modules on data that requires no grad: what no gradient reaches is left out, and the rest is answered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import retainops as ro
from retainops import registry
from retainops.points import unretained
from tests.conftest import Path

D = 8


class Case(NamedTuple):
    """A module, its inputs, which require no grad, and those of its points that a gradient reaches all the same."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Sequence[torch.Tensor]]
    reached: tuple[str, ...] = ()


def rows(*shapes: tuple[int, ...]) -> Callable[[], list[torch.Tensor]]:
    return lambda: [torch.randn(shape) for shape in shapes]


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.rand(D) + 1)


def logits() -> list[torch.Tensor]:
    return [torch.randn(3, D), torch.tensor([0, 5, 2])]


def heads() -> list[torch.Tensor]:
    return [torch.randn(2, heads, 5, 4) for heads in (4, 2)] + [torch.rand(5, 4) for _ in "cs"]


ONE, TWO = rows((3, D)), rows((3, D), (3, D))
ATTENTION = ("s", "p", "o")
CASES = {
    "RMSNorm": Case(lambda: ro.nn.RMSNorm(D), ONE),
    "LayerNorm": Case(lambda: ro.nn.LayerNorm(D), ONE),
    "AddRMSNorm": Case(lambda: ro.nn.AddRMSNorm(D), TWO),
    "AddLayerNorm": Case(lambda: ro.nn.AddLayerNorm(D), TWO),
    "GroupNorm": Case(lambda: ro.nn.GroupNorm(2, 4), rows((2, 4, 5))),
    "SwiGLU": Case(ro.nn.SwiGLU, TWO),
    "SwiGLU packed": Case(ro.nn.SwiGLU, ONE),
    "GEGLU": Case(ro.nn.GEGLU, TWO),
    "ReGLU": Case(ro.nn.ReGLU, TWO),
    "GLU": Case(ro.nn.GLU, ONE),
    "GatedMLP": Case(lambda: ro.nn.GatedMLP(D, 4), ONE, ("gate", "up", "act")),
    "MulSin": Case(lambda: ro.nn.MulSin(parameter()), ONE, ("c",)),
    "Siren": Case(ro.nn.Siren, ONE),
    "SoftCap": Case(lambda: ro.nn.SoftCap(parameter()), ONE, ("c",)),
    "ScaleShift": Case(ro.nn.ScaleShift, rows((3, D), (3, D), (3, D))),
    "SquaredReLU": Case(ro.nn.SquaredReLU, ONE),
    "Mish": Case(ro.nn.Mish, ONE),
    "BiasDropoutAdd": Case(lambda: ro.nn.BiasDropoutAdd(0.1, features=D), TWO, ("biased", "dropped")),
    "Softmax": Case(ro.nn.Softmax, ONE),
    "LogSoftmax": Case(ro.nn.LogSoftmax, ONE),
    "CrossEntropyLoss": Case(ro.nn.CrossEntropyLoss, logits),
    "LinearCrossEntropyLoss": Case(lambda: ro.nn.LinearCrossEntropyLoss(D, 7), logits, ("logits",)),
    "Rope": Case(ro.nn.Rope, heads),
    "MultiheadAttention": Case(
        lambda: Attention(ro.nn.MultiheadAttention(D, 2, batch_first=True)), rows((2, 5, D)), ATTENTION
    ),
    "Point": Case(ro.nn.Point, ONE),
}
over_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Attention(nn.Module):
    """Of one tensor, without weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class First(nn.Module):
    """A module as the first layer, and one more behind it, so that there is a gradient in any case."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.scale, self.last = module, nn.Parameter(torch.tensor(2.0)), ro.nn.Point()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        y = self.module(*inputs)
        total = sum(t.square().sum() for t in y) if isinstance(y, tuple) else y.square().sum()
        return self.last(total * self.scale)


def build(case: Case) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    torch.manual_seed(3)
    return First(case.make()), case.inputs()


def filled(kept: Any) -> list[str]:
    return sorted(name.rpartition(".")[2] for name, slot in kept.items() if name != "last" and slot.l2 is not None)


@over_cases
def test_eager(case: Case, path: Path) -> None:
    model, inputs = build(case)
    model, inputs = model.to(path.device), [x.to(path.device) for x in inputs]
    plain = model(*inputs) if "Dropout" not in type(model.module).__name__ else None
    with ro.retain(model, "*", ro.Stats("l2")) as kept:
        y = model(*inputs)
        y.backward()
    assert filled(kept) == sorted(case.reached)
    assert plain is None or torch.equal(y, plain)
    with ro.retain(model, "*", ro.Stats("l2")) as outer, ro.retain(model) as inner:  # two requests of one call
        model(*inputs).backward()
    assert filled(outer) == sorted(case.reached)
    assert [name for name, slot in inner.items() if slot.grad is not None] == [
        name for name, slot in outer.items() if slot.l2 is not None
    ]


@over_cases
def test_compiled(case: Case) -> None:
    model, inputs = build(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        with ro.retain(compiled, "*", ro.Stats("l2")) as kept:
            compiled(*inputs).backward()
    assert filled(kept) == sorted(case.reached)


@over_cases
def test_watched(case: Case) -> None:
    model, inputs = build(case)
    with ro.watch(model, every=1) as watcher:
        model(*inputs).backward()
        watcher.step()
    _, readings = watcher.latest
    assert sorted(name.rpartition(".")[2] for name, of in readings.items() if of) == sorted([*case.reached, "last"])


@pytest.mark.parametrize("op", list(registry.ops()), ids=lambda op: op.name)
def test_a_record_says_of_which_inputs_a_point_is_made(op: registry.Op) -> None:
    if op.kind == "attention":  # whose points are answered from the output, whichever of its inputs requires grad
        assert all(point.inputs is None for point in op.points)
        return
    generator = torch.Generator().manual_seed(0)
    for i, x in enumerate(op.sample(torch.Size((4, 6)), torch.float32, "cpu", generator)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        inputs = list(op.sample(torch.Size((4, 6)), torch.float32, "cpu", generator))
        inputs[i].requires_grad_()
        found = {}

        def point(name: str, value: torch.Tensor, found: dict[str, bool] = found) -> torch.Tensor:
            found[name] = value.requires_grad
            return unretained(name, value)

        op.reference(*inputs, point)
        assert found == {p.name: p.requires_grad(inputs) for p in op.points}


def test_of_an_op_it_is_an_error_that_says_what_the_point_is_made_of(path: Path) -> None:
    x, weight = torch.randn(3, D, device=path.device), torch.ones(D, device=path.device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"Nothing that xhat depends on \(x\) requires grad"):
        ro.rms_norm(x, weight, retain=ro.Retained("xhat"))
    with pytest.raises(RuntimeError, match=r"Nothing that summed depends on \(x, residual\) requires grad"):
        ro.add_layer_norm(x, x, weight, retain=ro.Retained("summed"))
