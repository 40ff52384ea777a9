"""Arguments of modules as attributes that are set later, as PyTorch's modules have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near

D = 6
TARGET = torch.tensor([0, 5, 2, 1])


def drawn(device: str = "cpu") -> torch.Tensor:
    return random_leaves(device)(4, D)


LATER = {
    "reduction": "sum",
    "label_smoothing": 0.3,
    "ignore_index": 5,
    "weight": torch.linspace(0.5, 2, D),
}


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("name", LATER)
def test_an_option_of_a_loss_set_later(name: str, linear: bool, path: Path) -> None:
    """And what is kept of it is that of the new options."""
    torch.manual_seed(5)
    module = (ro.nn.LinearCrossEntropyLoss(D, D) if linear else ro.nn.CrossEntropyLoss()).to(path.device)
    x, target, options = drawn(path.device), TARGET.to(path.device), {name: LATER[name]}
    if name == "weight":
        options["weight"] = options["weight"].to(path.device)
    assert name == "weight" or getattr(module, name) == {"reduction": "mean", "ignore_index": -100}.get(name, 0.0)
    setattr(module, name, options[name])
    assert name == "weight" or f"{name}={options[name]!r}" in repr(module)
    z = module.linear(x) if linear else x * 1
    z.retain_grad()
    expected = F.cross_entropy(z, target, **options)
    expected.backward()
    with ro.retain(module, "logits") as kept:
        y = module(x, target)
        y.backward()
    assert_near(y, expected, 8)
    assert_near(kept["logits"].grad, z.grad, 8)


def test_options_of_a_linear_loss_that_are_no_pytorchs() -> None:
    module, x = ro.nn.LinearCrossEntropyLoss(D, D, ignore_index=None), drawn()
    assert (module.ignore_index, module.num_classes, repr(module).count("ignore")) == (None, D, 0)
    plain = module(x, TARGET)
    assert torch.equal(plain, ro.linear_cross_entropy(x, module.linear.weight, TARGET))
    module.chunk, module.softcap, module.z_loss = 2, 3.0, 0.1
    expected = ro.linear_cross_entropy(x, module.linear.weight, TARGET, softcap=3.0, z_loss=0.1, chunk=2)
    assert torch.equal(module(x, TARGET), expected)
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_an_option_set_later_compiled(linear: bool, whole_graphs: None) -> None:
    """A schedule has no more graphs than numbers, as with PyTorch's module."""
    module = ro.nn.LinearCrossEntropyLoss(D, D, ignore_index=None) if linear else ro.nn.CrossEntropyLoss()
    compiled, x = torch.compile(module, fullgraph=True, backend="aot_eager"), drawn()
    for smoothing in 2 * (0.1, 0.2, 0.3, 0.4):
        compiled.label_smoothing = smoothing
        expected = F.cross_entropy(module.linear(x) if linear else x, TARGET, label_smoothing=smoothing)
        assert_near(compiled(x, TARGET), expected, 8)
    assert counters["stats"]["unique_graphs"] <= 4


def test_an_activation_set_later(path: Path) -> None:
    gate, up = drawn(path.device), drawn(path.device)
    module = ro.nn.GEGLU()
    module.approximate = "tanh"
    with ro.retain(module, "act") as kept:
        y = module(gate, up)
        y.sum().backward()
    assert_near(y, F.gelu(gate, approximate="tanh") * up, 8)
    assert torch.equal(kept["act"].grad, up)
    mlp = ro.nn.GatedMLP(D, 8).to(path.device)
    mlp.act = "relu"
    assert ro.points(mlp)["act"].formula == "relu(gate)"
    assert_near(mlp(gate), mlp.down_proj(F.relu(mlp.gate_proj(gate)) * mlp.up_proj(gate)), 8)


SET_LATER = {
    "RMSNorm.eps": (lambda: ro.nn.RMSNorm(D), "eps", 0.5, lambda x: F.rms_norm(x, (D,), eps=0.5)),
    "RMSNorm.eps=None": (lambda: ro.nn.RMSNorm(D), "eps", None, lambda x: F.rms_norm(x * 1, (D,))),
    "LayerNorm.eps": (lambda: ro.nn.LayerNorm(D), "eps", 0.5, lambda x: F.layer_norm(x, (D,), eps=0.5)),
    "GroupNorm.eps": (lambda: ro.nn.GroupNorm(2, D), "eps", 0.5, lambda x: F.group_norm(x, 2, eps=0.5)),
    "GroupNorm.num_groups": (lambda: ro.nn.GroupNorm(2, D), "num_groups", 3, lambda x: F.group_norm(x, 3)),
    "Softmax.dim": (ro.nn.Softmax, "dim", 0, lambda x: torch.softmax(x, 0)),
    "LogSoftmax.dim": (ro.nn.LogSoftmax, "dim", 0, lambda x: torch.log_softmax(x, 0)),
    "GLU.dim": (ro.nn.GLU, "dim", 0, lambda x: F.glu(x, 0)),
    "MulSin.scale": (lambda: ro.nn.MulSin(1.0), "scale", 3.0, lambda x: torch.sin(3 * x)),
}


@pytest.mark.parametrize(("make", "name", "value", "expected"), SET_LATER.values(), ids=SET_LATER)
def test_what_else_is_set_later(make: Callable, name: str, value: Any, expected: Callable) -> None:
    module, x = make(), drawn()
    assert getattr(module, name) != value
    setattr(module, name, value)
    assert_near(module(x), expected(x), 8)


def test_p_set_later() -> None:
    module, x = ro.nn.BiasDropoutAdd(0.5), drawn()
    module.p = 1
    assert torch.equal(module(x, x), x)


REFUSED_LATER = {
    "reduction": (
        ro.nn.CrossEntropyLoss,
        {"reduction": "avg"},
        "cross_entropy: reduction is 'avg'; expected one of",
    ),
    "smoothing": (
        ro.nn.CrossEntropyLoss,
        {"label_smoothing": 2.0},
        "cross_entropy: label_smoothing is 2.0; expected",
    ),
    "approximate": (ro.nn.GEGLU, {"approximate": "erf"}, "GEGLU: approximate is 'erf'; expected \"none\" or"),
    "act": (lambda: ro.nn.GatedMLP(D, 8), {"act": "tanh"}, "GatedMLP: act is 'tanh'; expected one of silu"),
    "p": (ro.nn.BiasDropoutAdd, {"p": 2.0}, "bias_dropout_add: p is 2.0; expected a probability"),
}


@pytest.mark.parametrize(("make", "set_to", "words"), REFUSED_LATER.values(), ids=REFUSED_LATER)
def test_a_value_set_later_is_refused_in_forward(make: Callable, set_to: dict[str, Any], words: str) -> None:
    module, x = make(), drawn()
    for name, value in set_to.items():
        setattr(module, name, value)
    inputs = {"CrossEntropyLoss": (x, TARGET), "GEGLU": (x, x), "BiasDropoutAdd": (x, x)}
    with pytest.raises(ValueError, match=words):
        module(*inputs.get(type(module).__name__, (x,)))
