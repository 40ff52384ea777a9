"""Modules in the place of PyTorch's: the arguments, eps and sizes that they take, and what they refuse."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near

D = 6


def drawn(device: str = "cpu") -> torch.Tensor:
    return random_leaves(device)(4, D)


ON = ("cpu", torch.float64)
SAME_ARGUMENTS = {
    "LayerNorm": (D, 1e-3, True, False, *ON),
    "RMSNorm": (D, 1e-3, True, *ON),
    "GroupNorm": (2, D, 1e-3, True, *ON),
    "Mish": (False,),
}


@pytest.mark.parametrize("name", SAME_ARGUMENTS)
def test_arguments_in_pytorchs_order(name: str) -> None:
    ours, theirs = (getattr(module, name)(*SAME_ARGUMENTS[name]) for module in (ro.nn, nn))
    theirs.load_state_dict(ours.state_dict())
    assert [p.dtype for p in ours.parameters()] == [p.dtype for p in theirs.parameters()]
    x = drawn().double()
    torch.testing.assert_close(ours(x), theirs(x))
    for attribute in theirs.__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute)


def test_a_group_norm_without_a_bias(path: Path) -> None:
    """PyTorch has them from 2.13 on."""
    module, x = ro.nn.GroupNorm(2, D, bias=False).to(path.device), drawn(path.device)
    assert list(module.state_dict()) == ["weight"]
    assert repr(module) == "GroupNorm(2, 6, eps=1e-05, bias=False)"
    nn.init.normal_(module.weight)
    assert_near(module(x), F.group_norm(x, 2, module.weight), 8)
    assert not list(ro.nn.GroupNorm(2, D, affine=False, bias=True).parameters())


def test_sizes_of_numpy() -> None:
    two, n = np.int64(2), np.int32(D)
    norms = [ro.nn.LayerNorm(n), ro.nn.RMSNorm((n,), None), ro.nn.AddLayerNorm([n]), ro.nn.GroupNorm(two, n)]
    assert [type(size) for norm in norms[:3] for size in norm.normalized_shape] == [int] * 3
    torch._dynamo.reset()
    x = drawn()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        assert_near(torch.compile(norms[3], fullgraph=True, backend="aot_eager")(x), F.group_norm(x, 2), 8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ro.nn.Mish(inplace=True), ValueError, "Mish: inplace is True; expected False: no op of retainops"),
        (lambda: ro.nn.GroupNorm(2.0, D), TypeError, "GroupNorm: num_groups is float; expected an integer"),
        (lambda: ro.nn.GroupNorm(2, "6"), TypeError, "GroupNorm: num_channels is str; expected an integer"),
        (lambda: ro.nn.CrossEntropyLoss(ignore_index=None), TypeError, "CrossEntropyLoss: ignore_index is NoneType"),
        (lambda: ro.nn.Point("name"), TypeError, r"^Point\.__init__\(\) takes 1 positional argument"),
        (lambda: ro.nn.ScaleShift(2), TypeError, r"^ScaleShift\.__init__\(\) takes 1 positional argument"),
        (lambda: ro.nn.SquaredReLU(inplace=True), TypeError, r"^SquaredReLU\.__init__\(\) got an unexpected keyword"),
    ],
    ids=range(7),
)
def test_refused_arguments(make: Callable[[], nn.Module], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_every_module_with_parameters_of_its_own_can_reset_them() -> None:
    """As after `to_empty`, where a model was made on the meta device."""
    for make in (
        lambda: ro.nn.BiasDropoutAdd(0.1, D),
        lambda: ro.nn.LayerNorm(D),
        lambda: ro.nn.RMSNorm(D, offset=1.0),
        lambda: ro.nn.AddRMSNorm(D),
        lambda: ro.nn.GroupNorm(2, D),
    ):
        with torch.device("meta"):
            module = make()
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            nn.init.constant_(parameter, 7.0)
        module.reset_parameters()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), make().parameters(), strict=True))
    ro.nn.BiasDropoutAdd(0.1).reset_parameters()


X, SIZES = torch.randn(2, 8, 3), r"x has shape \(2, 8, 3\); expected \(\.\.\., 8\), since normalized_shape is 8"
LEFT_ALONE = {
    "RMSNorm": (ro.nn.RMSNorm(8, elementwise_affine=False), (X,), SIZES),
    "LayerNorm": (ro.nn.LayerNorm(8, elementwise_affine=False), (X,), SIZES),
    "AddRMSNorm": (
        ro.nn.AddRMSNorm(8, elementwise_affine=False),
        (X, X[..., :1]),
        r"x has shape \(2, 8, 3\) and residual has shape \(2, 8, 1\); expected \(\.\.\., 8\)",
    ),
    "AddLayerNorm": (ro.nn.AddLayerNorm(8, elementwise_affine=False), (X, X), r"x has shape \(2, 8, 3\) and residual"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("module", "inputs", "words"), LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_a_size_that_no_weight_holds(module: nn.Module, inputs: Any, words: str, compiled: bool, path: Path) -> None:
    torch._dynamo.reset()
    call = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    with pytest.raises(RuntimeError, match=f"{type(module).__name__}: {words}"):
        call(*(x.to(path.device) for x in inputs))


def test_a_size_that_nothing_says() -> None:
    """Group norm without a weight takes other channels, as PyTorch's; a module fused by a rule may have no size."""
    x = torch.randn(2, 12, 3)
    theirs = nn.GroupNorm(3, 6, affine=False)
    torch.testing.assert_close(ro.nn.GroupNorm(3, 6, affine=False)(x), theirs(x))
    norm = ro.nn.RMSNorm(8, elementwise_affine=False)
    del norm.normalized_shape
    torch.testing.assert_close(norm(x), ro.rms_norm(x))
    norm.normalized_shape = 3  # no tuple
    torch.testing.assert_close(norm(x), ro.rms_norm(x))


def test_a_sum_of_the_right_size() -> None:
    x, column = drawn(), drawn()[:, :1]
    for norm in (ro.nn.AddRMSNorm(D, elementwise_affine=False), ro.nn.AddLayerNorm(D, elementwise_affine=False)):
        for inputs in ((x, column), (column, x)):
            assert torch.equal(norm(*inputs)[1], x + column)
        with pytest.raises(TypeError, match="x is float; expected a torch.Tensor"):
            norm(1.0, x)
    with pytest.raises(RuntimeError, match=r"x has shape \(\); expected \(\.\.\., 6\)"):
        ro.nn.RMSNorm(D, elementwise_affine=False)(torch.ones(()))


def test_the_eps_of_rms_norms() -> None:
    """By default that of the op and of Hugging Face's models; None is PyTorch's."""
    x = drawn().detach() * 1e-3
    assert ro.nn.RMSNorm(D).eps == ro.nn.AddRMSNorm(D).eps == 1e-6
    assert torch.equal(ro.nn.RMSNorm(D)(x), ro.rms_norm(x))
    torch.testing.assert_close(ro.nn.RMSNorm(D, eps=None)(x), nn.RMSNorm(D)(x))
    torch.testing.assert_close(ro.nn.AddRMSNorm(D, None)(x, x)[0], nn.RMSNorm(D)(x + x))
