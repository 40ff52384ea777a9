"""Backward calls that few make: under torch.vmap, of what hooks bring, into the gradient itself, after a fake pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import retainops as ro
from retainops.registry import find
from tests.conftest import Path
from tests.oracle import OPS, all_points, assert_near, leaves, sample, several

EVERY = [name for name in OPS if name != "bias_dropout_add"]  # whose mask vmap would draw anew
OTHERS = [
    "rms_norm",
    "layer_norm",
    "group_norm",
    "softmax",
    "cross_entropy",
    "linear_cross_entropy",
    "rope",
    "attention",
]
NAMES = list(dict.fromkeys([*EVERY, *OTHERS]))


def called(name: str, inputs: list, **options: Any) -> list[torch.Tensor]:
    return [y for y in several(find(name).call(*inputs, **options)) if y.requires_grad]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's, of its attention under vmap
@pytest.mark.parametrize("asked", [False, True], ids=["", "asked"])
@pytest.mark.parametrize("name", ["mul_sin", "swiglu_packed", "scale_shift", *OTHERS])
def test_vmap_over_a_backward(path: Path, name: str, asked: bool) -> None:
    """The Jacobian as PyTorch's page on vmap takes it; the forward was outside, and so is all that it saved."""
    inputs = sample(name, path.device, torch.float64)
    outputs = called(name, inputs, **({"retain": all_points(find(name))} if asked else {}))
    dys = [torch.randn(2, *y.shape, dtype=y.dtype, device=y.device) for y in outputs]

    def grads(*dys: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.autograd.grad(outputs, leaves(inputs), dys, retain_graph=True, allow_unused=True)
        return tuple(x for x in found if x is not None)

    for together, *each in zip(torch.vmap(grads)(*dys), *(grads(*(dy[i] for dy in dys)) for i in (0, 1)), strict=True):
        torch.testing.assert_close(together, torch.stack(each))


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-x) if x.is_floating_point() else x


def of_two(x: torch.Tensor) -> torch.Tensor:
    return TwoTensor(x, x) if x.is_floating_point() else x


@pytest.mark.parametrize("unpack", [negated, of_two])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_may_bring_what_no_kernel_reads(path: Path, name: str, unpack: Callable) -> None:
    if unpack is of_two and name in ("attention", "linear_cross_entropy"):
        pytest.skip("run operations of PyTorch's that a TwoTensor does not take")
    inputs = sample(name, path.device, torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), unpack):
        outputs = called(name, inputs)
    plain = called(name, inputs)
    found, expected = (
        torch.autograd.grad(ys, leaves(inputs), [torch.ones_like(y) for y in ys], allow_unused=True)
        for ys in (outputs, plain)
    )
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours.a if isinstance(ours, TwoTensor) else ours, theirs)


@pytest.mark.parametrize("name", ["mul_sin", "softmax", "rms_norm", "cross_entropy"])
def test_hooks_may_not_bring_another_shape(kernels: Path, name: str) -> None:
    inputs = sample(name, kernels.device)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x.flatten()[:1]):
        outputs = called(name, inputs)
    with pytest.raises(RuntimeError, match=rf"{name}: a tensor of shape \(.*\) was saved.*, and \(1,\) came back"):
        torch.autograd.grad(outputs, leaves(inputs), [torch.ones_like(y) for y in outputs])


def test_into_the_gradient_itself(path: Path) -> None:
    """The buffer changes while the gradient is on its way; what goes on is the gradient as it came."""
    x = torch.randn(3, 4, device=path.device, requires_grad=True)
    w = torch.ones(4, device=path.device)
    for into in ("point", "summed"):
        total = torch.ones(3, 4, device=path.device)
        kept = ro.Retained(**{"summed" if into == "summed" else "c": ro.Into(total, accumulate=True)})
        x.grad = None
        if into == "point":
            y, slope = ro.point(x * 2, "c", retain=kept), 2
        else:
            y, slope = ro.add_rms_norm(x, x.detach() * 0, w, retain=kept)[1], 1
        y.backward(total)
        assert torch.equal(x.grad, torch.full_like(x, slope)), into
        assert torch.equal(total, torch.full_like(x, 2)), into


def test_into_the_gradient_itself_of_two_requests(path: Path) -> None:
    norm, x = ro.nn.AddRMSNorm(4).to(path.device), torch.randn(3, 4, device=path.device, requires_grad=True)
    for into_first in (True, False):
        total = torch.ones(3, 4, device=path.device)
        asked = [{"summed": ro.Into(total, accumulate=True)}, "summed"]
        outer, inner = asked if into_first else asked[::-1]
        with ro.retain(norm, outer) as one, ro.retain(norm, inner) as other:
            summed = norm(x, torch.zeros_like(x))[1]
        x.grad = None
        summed.backward(total)
        kept = other if into_first else one
        assert torch.equal(kept["summed"].grad, torch.ones_like(x))
        assert torch.equal(x.grad, torch.ones_like(x))
        assert torch.equal(total, torch.full_like(x, 2))


def test_a_fake_pass_and_a_real_one(path: Path) -> None:
    """An estimate of memory, and then the step: a slot that has a fake gradient says so."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ro.nn.MulSin(2.0)).to(path.device)
    x = torch.randn(3, 4, device=path.device)
    with ro.retain(model, "*") as kept:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.randn(3, 4, device=path.device)).sum().backward()
        model.zero_grad()
        with pytest.raises(RuntimeError, match=r"'1.c' is outside of a FakeTensorMode here.*inside one; call reset"):
            model(x)
        kept.reset()
        model(x).sum().backward()
        assert_near(kept["1.c"].grad, (2 * torch.cos(2 * model[0](x))).detach() / 2)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            pytest.raises(RuntimeError, match=r"is of a FakeTensorMode here, and its slot was used outside of it"),
        ):
            model(torch.randn(3, 4, device=path.device))


def in_graph(how: Callable) -> Callable:
    def run(kept: ro.Retained, x: torch.Tensor) -> torch.Tensor:
        @how
        def g(x: torch.Tensor) -> torch.Tensor:
            return ro.mul_sin(x, 2.0, retain=kept)

        return torch.compile(lambda x: g(x) * 2, backend="aot_eager")(x)

    return run


def by_aot_function(kept: ro.Retained, x: torch.Tensor) -> torch.Tensor:
    from functorch.compile import aot_function, nop

    return aot_function(lambda x: ro.mul_sin(x, 2.0, retain=kept), fw_compiler=nop)(x)


@pytest.mark.parametrize("run", [in_graph(torch.compiler.allow_in_graph), by_aot_function], ids=["in_graph", "aot"])
def test_what_aotautograd_records_without_dynamo(run: Callable, fresh_compiler: None) -> None:
    """It would answer nothing: the graph has neither the slot nor its leaf."""
    x = torch.randn(3, 4, requires_grad=True)
    for want in (ro.Retained("c"), ro.Retained(c=ro.Stats("l2"))):
        with pytest.raises(Exception, match="while AOTAutograd.* records this call"):
            run(want, x)


def test_nonstrict_trace_answers_or_refuses(fresh_compiler: None) -> None:
    x, kept = torch.randn(3, 4, requires_grad=True), ro.Retained("c")
    try:
        in_graph(torch._dynamo.nonstrict_trace)(kept, x).sum().backward()
    except Exception as error:
        assert "records this call" in str(error)  # noqa: PT017
    else:
        assert_near(kept.c.grad, 2 * torch.cos(2 * x).detach())
