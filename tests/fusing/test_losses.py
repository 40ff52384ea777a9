"""Cross entropies that a model's own forward computes, and `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss
from torch.nn import functional as F

import retainops as ro
from tests.conftest import Path
from tests.fusing import losses
from tests.fusing.losses import Model, N, V

x, target = losses.x, losses.target


class Function(Model):
    """As nanoGPT has it."""

    def forward(self, x: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self.head(x)
        return F.cross_entropy(logits, target, **options)


class Made(Model):
    """As BERT has it."""

    def forward(self, x: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self.head(x)
        loss_fct = CrossEntropyLoss(**options)
        labels = target
        return loss_fct(logits, labels)


class MadeAndCalled(Model):
    def forward(self, x: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = self.head(x)
        return nn.CrossEntropyLoss(**options)(logits, target)


class Child(Model):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss(**options)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(x), target)


OPS = {
    Function: "loss(F.cross_entropy)",
    Made: "loss(CrossEntropyLoss)",
    MadeAndCalled: "loss(nn.CrossEntropyLoss)",
    Child: "cross_entropy",
}


KINDS = list(OPS)


class Way:
    """A model of a kind, called with options."""

    def __init__(self, kind: type[Model], options: dict[str, Any], fused: bool) -> None:
        self.model = kind(**options) if kind is Child else kind()
        self.options = {} if kind is Child else options
        self.points = [("loss." if kind is Child else "") + name for name in ("logits", "p")]
        if fused:
            assert [row.op for row in ro.fuse(self.model)] == [OPS[kind]]

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.model(x, target, **self.options)


def weights() -> torch.Tensor:
    return torch.linspace(0.5, 2, V)


def loss_of_probabilities(p: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """The log of p is logits too: their softmax is p where that sums to one, and its derivative goes along the rows."""
    smooth, ignored = options.pop("label_smoothing", 0.0), options.get("ignore_index", -100)
    reduction, weight = options.get("reduction", "mean"), options.get("weight", torch.ones(V))
    kept, at = target != ignored, target.clamp(min=0)
    each = -(1 - smooth) * weight[at] * p.log().gather(-1, at[:, None])[:, 0] - smooth / V * p.log() @ weight
    each = torch.where(kept, each, 0)
    return each if reduction == "none" else each.sum() / (weight[at][kept].sum() if reduction == "mean" else 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": weights()},
    "smoothed": {"label_smoothing": 0.1},
    "another index": {"ignore_index": 3},
    "all": {"weight": weights(), "ignore_index": 9, "reduction": "sum", "label_smoothing": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_points(
    kind: type[Model], options: dict[str, Any], x: torch.Tensor, target: torch.Tensor
) -> None:
    if "ignore_index" in options:
        target = target.abs() % 10
    fused = Way(kind, options, fused=True)
    theirs, ours = Way(kind, options, fused=False)(x, target), fused(x, target)
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    (expected,) = torch.autograd.grad(theirs, x, slope)
    (found,) = torch.autograd.grad(ours, x, slope)
    torch.testing.assert_close(found, expected)

    z = kind().head(x).detach().requires_grad_()
    F.cross_entropy(z, target, **options).backward(slope)
    with ro.retain(fused.model) as kept:
        fused(x, target).backward(slope)
    logits, p = fused.points
    assert list(kept) == [logits, p]
    torch.testing.assert_close(kept[logits].grad, z.grad)
    probabilities = torch.softmax(z.detach(), -1).requires_grad_()
    loss_of_probabilities(probabilities, target, **options).backward(slope)
    torch.testing.assert_close(kept[p].grad, probabilities.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_kernels(kind: type[Model], x: torch.Tensor, target: torch.Tensor, kernels: Path) -> None:
    model, (x, target) = kind().to(kernels.device), (t.to(kernels.device) for t in (x, target))
    theirs = model(x, target)
    ro.fuse(model)
    with ro.retain(model, "*logits") as kept:
        ours = model(x, target)
        ours.backward()
    torch.testing.assert_close(ours, theirs)
    (slot,) = kept.values()
    torch.testing.assert_close(slot.grad.sum(-1), torch.zeros(N, device=kernels.device), rtol=0, atol=1e-6)
    assert (slot.grad[2] == 0).all()


OTHERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "probabilities": lambda z: (z, torch.full((N, V), 1 / V), {}),
    "of one sample": lambda z: (z[0], torch.tensor(3), {}),
    "classes in dim 1": lambda z: (z.view(2, 3, V).mT, torch.ones(2, 3, dtype=torch.long), {}),
    "a smoothing that is a tensor": lambda z: (
        z,
        torch.ones(N, dtype=torch.long),
        {"label_smoothing": torch.tensor(0.1)},
    ),
    "a weight of another dtype": lambda z: (z, torch.ones(N, dtype=torch.long), {"weight": weights().double()}),
    "a weight that learns": lambda z: (z, torch.ones(N, dtype=torch.long), {"weight": weights().requires_grad_()}),
    "reduced as once": lambda z: (z, torch.ones(N, dtype=torch.long), {"size_average": False}),
    "bytes": lambda z: (z, torch.ones(N, dtype=torch.uint8), {}),
    "too few targets": lambda z: (z, torch.ones(2, dtype=torch.long), {}),
    "a target that is no class": lambda z: (z, torch.full((N,), V), {}),
    "a list": lambda z: (z, [1] * N, {}),
    "too smooth": lambda z: (z, torch.ones(N, dtype=torch.long), {"label_smoothing": 2.0}),
    "a wrong weight": lambda z: (z, torch.ones(N, dtype=torch.long), {"weight": torch.ones(3)}),
    "an unknown option": lambda z: (z, torch.ones(N, dtype=torch.long), {"softcap": 3.0}),
    "an unknown reduction": lambda z: (z, torch.ones(N, dtype=torch.long), {"reduction": "max"}),
    "no rows": lambda z: (z[:0], torch.ones(0, dtype=torch.long), {}),
    "bfloat16": lambda z: (z.bfloat16(), torch.ones(N, dtype=torch.long), {}),
}


TAKEN = ("of one sample", "no rows", "bfloat16", "classes in dim 1")
"""Those that the op takes."""


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("kind", [Function, Made])
def test_whatever_pytorch_takes_or_refuses(kind: type[Model], case: str, x: torch.Tensor) -> None:
    def outcome(model: Model) -> Any:
        z, target, options = OTHERS[case](kind().head(x))
        model.head = nn.Identity()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of size_average
                return model(z, target, **options)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return type(error)

    fused = kind()
    ro.fuse(fused)
    theirs, ours = outcome(kind()), outcome(fused)
    if not isinstance(theirs, torch.Tensor):
        assert ours is theirs
        return
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if ours.requires_grad:
        mine, other = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-2 if case == "bfloat16" else 1e-6, atol=1e-3)
    with ro.retain(fused, "logits") as kept:
        if case in TAKEN:
            outcome(fused).backward()
            assert kept["logits"].grad is not None
        else:
            assert outcome(fused) is RuntimeError


def test_what_is_said_where_the_op_does_not_do(x: torch.Tensor) -> None:
    model = nn.Sequential(nn.CrossEntropyLoss())
    ro.fuse(model)
    expected = "CrossEntropyLoss: 'logits' is asked for, and no op stands for its call of cross_entropy: its target is"
    with ro.retain(model, "0.logits"), pytest.raises(RuntimeError, match=expected):
        model[0](x, torch.softmax(x, -1))


@pytest.mark.parametrize("options", [{}, {"weight": weights()}], ids=["plain", "weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: type[Model], options: dict[str, Any], x: torch.Tensor, target: torch.Tensor) -> None:
    fused = Way(kind, options, fused=True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = Way(kind, options, fused=False)(x, target)
        with ro.retain(fused.model) as kept:
            ours = fused(x, target)
    assert ours.dtype is theirs.dtype is torch.float32
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    assert all(slot.grad is not None for slot in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: type[Model], x: torch.Tensor, target: torch.Tensor) -> None:
    fused = Way(kind, {}, fused=True)
    torch._dynamo.reset()
    compiled = torch.compile(fused.model, fullgraph=True, backend="aot_eager")
    with ro.retain(fused.model, "*logits") as theirs:
        expected = fused(x, target)
        expected.backward()
    with ro.retain(compiled, "*logits") as kept:
        found = compiled(x, target)
        found.backward()
    torch.testing.assert_close(found, expected)
    for name, slot in kept.items():
        torch.testing.assert_close(slot.grad, theirs[name].grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, V, 3), (2, V, 3, 4), (0, V, 3)], ids=str)
def test_classes_in_dim_1(shape: tuple[int, ...], reduction: str) -> None:
    """As a segmentation has them; in the points they are last."""
    model = nn.Sequential(nn.CrossEntropyLoss(reduction=reduction, weight=weights()))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
    target = torch.arange(z[:, 0].numel()).view_as(z[:, 0]) % V
    theirs = model[0](z, target)
    (expected,) = torch.autograd.grad(theirs.sum(), z)
    ro.fuse(model)
    with ro.retain(model) as kept:
        ours = model[0](input=z, target=target)
        (found,) = torch.autograd.grad(ours.sum(), z)
        model[0](z, target).sum().backward()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(kept["0.logits"].grad, expected.movedim(1, -1), equal_nan=True)


def test_a_function_that_was_exchanged_is_called(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> None:
    model = Function()
    ro.fuse(model)
    monkeypatch.setattr(F, "cross_entropy", lambda z, target: z.sum() * 0 + 7)
    assert model(x, torch.ones(N, dtype=torch.long)).item() == 7
    with ro.retain(model), pytest.raises(RuntimeError, match="it is another function than when the model was fused"):
        model(x, torch.ones(N, dtype=torch.long))
