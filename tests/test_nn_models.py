"""Modules of the pointwise family beside those that they stand in for, in models, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.nn_cases import CASES, D, build, eager, grads_of, step
from tests.oracle import assert_near

# Beside PyTorch's and Hugging Face's modules


@pytest.mark.parametrize("dim", [-1, 0, 1, 2, -3])
def test_glu_is_pytorchs(path: Path, dim: int) -> None:
    x = random_leaves(path.device)(2, 4, D)
    ours, theirs = ro.nn.GLU(dim), nn.GLU(dim)
    ours.load_state_dict(theirs.state_dict())
    y = step(ours, [x])
    (grad,) = grads_of(ours, [x])
    expected = step(theirs, [x])
    assert_near(y, expected)
    assert y.stride() == expected.stride()
    assert_near(grad, *grads_of(theirs, [x]))
    assert repr(ours) == repr(theirs)


def test_mish_is_pytorchs(path: Path) -> None:
    x = random_leaves(path.device)(4, D)
    ours, theirs = ro.nn.Mish(), nn.Mish()
    ours.load_state_dict(theirs.state_dict())
    assert_near(step(ours, [x]), step(theirs, [x]), 2)


class LlamaMLP(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Phi3MLP(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.activation_fn = nn.SiLU()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up_states = self.gate_up_proj(hidden_states)
        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)
        return self.down_proj(up_states)


@pytest.mark.parametrize("model", [LlamaMLP, Phi3MLP])
def test_gated_mlp_takes_the_weights_of(model: type, path: Path) -> None:
    theirs = model(D, 10).to(path.device)
    ours = ro.nn.GatedMLP(D, 10, packed=model is Phi3MLP).to(path.device)
    ours.load_state_dict(theirs.state_dict())
    x = random_leaves(path.device)(2, 3, D)
    assert_near(step(ours, [x]), step(theirs, [x]), 4)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_gated_mlp_makes_its_layers_as_asked() -> None:
    module = ro.nn.GatedMLP(4, 8, "relu", bias=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert [name for name, _ in module.named_parameters() if "bias" in name] == [
        "gate_proj.bias",
        "up_proj.bias",
        "down_proj.bias",
    ]


# In a model


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [ro.nn.GatedMLP(D, 8), ro.nn.GatedMLP(D, 8, packed=True)]
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": mlp, "join": ro.nn.BiasDropoutAdd(0.2)}) for mlp in layers)
        self.cap = ro.nn.SoftCap(5.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["join"](layer["mlp"](x), x)
        return self.cap(x)


def test_the_points_of_a_model() -> None:
    assert repr(ro.points(Decoder())).splitlines()[1:7] == [
        "  layers.0.mlp.gate      gate             (of gate)                   GatedMLP in ModuleDict",
        "  layers.0.mlp.up        up               (of up)                     GatedMLP in ModuleDict",
        "  layers.0.mlp.act       silu(gate)       (of gate)                   GatedMLP in ModuleDict",
        "  layers.0.join.biased   x + bias         (of x and bias, broadcast)  BiasDropoutAdd in ModuleDict",
        "  layers.0.join.dropped  dropout(biased)  (of x and bias, broadcast)  BiasDropoutAdd in ModuleDict",
        "  layers.1.mlp.gate      gate             (of gate)                   GatedMLP in ModuleDict",
    ]


def test_nested_requests_for_different_points_of_one_module(path: Path) -> None:
    """Each request holds some points of the op, some that the module answers itself, or none that this call has."""
    for packed in (False, True):
        case = CASES["GatedMLP packed" if packed else "GatedMLP"]
        module, inputs = build(case, path.device)
        _, points = eager(case, module, inputs)
        with (
            ro.retain(module, ["gate", "act"]) as first,
            ro.retain(module, ["up", "act"], ro.Stats("sum", over="rows")) as second,
            ro.retain(module, "gate") as third,
        ):
            step(module, inputs)
        for kept, name in ((first, "gate"), (first, "act"), (third, "gate")):
            assert_near(kept[name].grad, points[name], 4)
        for name in ("up", "act"):
            assert_near(second[name].sum, points[name].sum(-1), 8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_nested_requests_of_dropout(compiled: bool, training: bool) -> None:
    """Statistics over different things take the reference together: it draws the same mask."""
    case = CASES["BiasDropoutAdd"]
    module, inputs = build(case)
    module.train(training)
    _, points = eager(case, module, inputs)
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    with (
        ro.retain(module, "*") as first,
        ro.retain(module, "biased", ro.Stats("sum", over="rows")) as second,
        ro.retain(module, "biased", ro.Stats("sum")) as third,
    ):
        step(call, inputs)
    assert_near(first["biased"].grad, points["biased"], 2)
    assert_near(first["dropped"].grad, points["dropped"], 2)
    assert_near(second["biased"].sum, points["biased"].sum(-1), 8)
    assert_near(third["biased"].sum, points["biased"].sum(), 16)


@pytest.mark.parametrize("name", ["SwiGLU packed", "GLU packed", "GatedMLP packed"])
def test_the_halves_of_a_packed_tensor_come_from_the_kernel(name: str, kernels: Path) -> None:
    """No copy of them is made, and no second pass over their gradients."""
    module, inputs = build(CASES[name], kernels.device)
    seen = []
    with ro.retain(module):
        y = module(*inputs)
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.append(type(node).__name__)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert "FusedBackward" in seen
    assert not {"TapBackward", "SplitBackward0"} & set(seen)


def test_what_needs_no_grad_is_left_alone(path: Path) -> None:
    """Asked for everything: an input that needs no gradient has none, as with `ro.nn.Point`."""
    module = ro.nn.SwiGLU()
    gate, up = random_leaves(path.device)(4, D), torch.ones(4, D, device=path.device)
    with ro.retain(module) as kept:
        step(module, [gate, up])
        with torch.no_grad():
            module(gate, up)
    assert {name: slot.grad is None for name, slot in kept.items()} == {"gate": False, "up": True, "act": False}
    with ro.retain(module) as kept:
        module(up, up)
    assert all(slot.shape is None for slot in kept.values())


def test_a_module_may_be_called_in_both_forms(path: Path) -> None:
    module = ro.nn.SwiGLU()
    rand = random_leaves(path.device)
    gate, up = rand(4, D), rand(4, D)
    with ro.retain(module) as kept:
        (module(gate, up) + module(torch.cat([gate, up], -1))).sum().backward()
    assert_near(kept["act"].grad, 2 * up.detach())
    assert_near(kept["up"].grad, 2 * F.silu(gate).detach(), 2)
    assert_near(kept["gate"].grad, gate.grad, 2)


# Dropout


def test_bias_dropout_add_drops_as_pytorch_does(path: Path) -> None:
    """What is kept is multiplied by 1 / (1 - p); about p of all is dropped."""
    n, p = 20000, 0.3
    module = ro.nn.BiasDropoutAdd(p, features=4).to(path.device)
    nn.init.normal_(module.bias)
    x, residual = (random_leaves(path.device)(n // 4, 4, requires_grad=False) for _ in range(2))
    torch.manual_seed(0)
    y = module(x, residual)
    dropped = y == residual
    whole = residual + (x + module.bias) / (1 - p)
    assert_near(y[~dropped], whole[~dropped], 2)
    assert abs(dropped.double().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert not torch.equal(module(x, residual), y)
    torch.manual_seed(0)
    assert torch.equal(module(x, residual), y)
    module.eval()
    assert_near(module(x, residual), residual + (x + module.bias), 2)
    assert torch.equal(ro.nn.BiasDropoutAdd(1.0)(x, residual), residual)


def test_eval_and_p_zero_draw_no_random_numbers(path: Path) -> None:
    x = random_leaves(path.device)(4, D)
    state = torch.cuda.get_rng_state if path.device == "cuda" else torch.get_rng_state
    before = state()
    ro.nn.BiasDropoutAdd(0.0)(x, x)
    ro.nn.BiasDropoutAdd(0.5).eval()(x, x)
    assert torch.equal(state(), before)
    ro.nn.BiasDropoutAdd(0.5)(x, x)
    assert not torch.equal(state(), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_drops_the_same(path: Path, use_reentrant: bool) -> None:
    module = ro.nn.BiasDropoutAdd(0.5, features=D).to(path.device)
    x, residual = (random_leaves(path.device)(8, D) for _ in range(2))
    with ro.retain(module, "biased") as kept:
        torch.manual_seed(0)
        y = checkpoint(module, x, residual, use_reentrant=use_reentrant)
        y.backward(torch.ones_like(y))
    assert_near(x.grad, torch.where(y == residual, 0.0, 2.0))
    assert_near(kept["biased"].grad, x.grad)


# What is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ro.nn.GEGLU("erf"), ValueError, 'GEGLU: approximate is \'erf\'; expected "none" or "tanh"'),
        (lambda: ro.nn.GatedMLP(4, 8, "swish"), ValueError, "GatedMLP: act is 'swish'; expected one of silu, gelu, "),
        (lambda: ro.nn.SoftCap(0), ValueError, "SoftCap: cap is 0; expected a number above 0"),
        (lambda: ro.nn.SoftCap(-1.5), ValueError, "SoftCap: cap is -1.5; expected a number above 0"),
        (lambda: ro.nn.SoftCap(float("nan")), ValueError, "SoftCap: cap is nan; expected a number above 0"),
        (lambda: ro.nn.SoftCap("30"), TypeError, "SoftCap: cap is str; expected a number or a torch.Tensor"),
        (lambda: ro.nn.Siren(None), TypeError, "Siren: w0 is NoneType; expected a number or a torch.Tensor"),
        (lambda: ro.nn.BiasDropoutAdd(1.1), ValueError, "BiasDropoutAdd: p is 1.1; expected a probability"),
        (lambda: ro.nn.BiasDropoutAdd(-0.1), ValueError, "BiasDropoutAdd: p is -0.1; expected a probability"),
        (lambda: ro.nn.BiasDropoutAdd("0.1"), ValueError, "BiasDropoutAdd: p is '0.1'; expected a probability"),
        (
            lambda: ro.nn.SwiGLU()(torch.ones(4, 5)),
            ValueError,
            r"swiglu: .*its shape is \(4, 5\); expected an even",
        ),
        (lambda: ro.nn.GLU(1)(torch.ones(2, 3, 4)), ValueError, r"GLU: .*shape is \(2, 3, 4\); expected an even size"),
        (lambda: ro.nn.GLU(3)(torch.ones(2, 4)), IndexError, r"GLU: dim is 3, and the input's shape is \(2, 4\)"),
        (lambda: ro.nn.Mish()([1.0]), TypeError, "mish: x is list; expected a torch.Tensor"),
        (lambda: ro.nn.GLU(0)([1.0]), TypeError, "glu: gate is list; expected a torch.Tensor"),
        (
            lambda: ro.nn.SwiGLU()(torch.ones(4), torch.ones(5)),
            RuntimeError,
            "swiglu: gate of .* do not broadcast",
        ),
    ],
)
def test_bad_arguments(make: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_an_unknown_point() -> None:
    with (
        pytest.raises(KeyError, match="'c' matches no point; there are: gate, up, act"),
        ro.retain(ro.nn.SwiGLU(), "c"),
    ):
        pass
