"""A fused function to autograd, torch.func, torch.compile and the rest of Python; and without Triton."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path as File

import pytest
import torch

import retainops as ro
from tests.conftest import Path, random_leaves
from tests.elementwise import functions
from tests.elementwise.functions import eager_gate, gate
from tests.oracle import assert_near

ROOT = File(__file__).parent.parent.parent


def test_semantics_of_autograd(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b, bias = rand(8, 5), rand(5), rand(8, 1)
    kept = ro.Retained("c")
    y = gate(a, b, bias, retain=kept)
    y.sum().backward(retain_graph=True)
    once, first = a.grad.clone(), kept.c.grad.clone()
    y.sum().backward()
    assert torch.equal(a.grad, 2 * once)
    assert torch.equal(kept.c.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = gate(a, b, bias)
    with torch.no_grad():
        a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward(path: Path) -> None:
    inputs = [random_leaves(path.device)(*shape, dtype=torch.float64) for shape in ((2, 3), (3,), (2, 1))]
    assert torch.autograd.gradcheck(gate, inputs)
    assert torch.autograd.gradgradcheck(gate, inputs)
    kept = ro.Retained("c")
    y = gate(*inputs, retain=kept)
    (dc,) = torch.autograd.grad(y.sum(), kept.c.tensor, create_graph=True)
    want, interiors = eager_gate(*inputs)
    (want_dc,) = torch.autograd.grad(want.sum(), interiors["c"], create_graph=True)
    ours, theirs = (torch.autograd.grad(x.square().sum(), inputs, allow_unused=True) for x in (dc, want_dc))
    for x, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, other)


def test_torch_func_and_forward_mode(path: Path) -> None:
    rand = random_leaves(path.device)
    x, b = rand(4, requires_grad=False), rand(4, requires_grad=False)

    def theirs(x):
        return eager_gate(x, b, x)[0]

    def ours(x):
        return gate(x, b, x)

    torch.testing.assert_close(
        torch.func.hessian(lambda x: ours(x).sum())(x), torch.func.hessian(lambda x: theirs(x).sum())(x)
    )
    torch.testing.assert_close(torch.func.vmap(ours)(torch.stack([x, b])), torch.stack([theirs(x), theirs(b)]))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (b,)), torch.func.jvp(theirs, (x,), (b,)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph(path: Path, dynamic: bool) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(a, b, bias, kept):
        return gate(a * 2, b, bias=bias, retain=kept) + 1

    rand = random_leaves(path.device)
    for n in (5, 9):
        a, b, bias = rand(3, n), rand(n), rand(3, 1)
        kept = ro.Retained("c", "t", h=ro.Stats("l2"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Dynamo does to a Function it traces is not ours
            step(a, b, bias, kept).sum().backward()
        leaves = [x.detach().clone().requires_grad_() for x in (a, b, bias)]
        want, interiors = eager_gate(leaves[0] * 2, *leaves[1:])
        for x in interiors.values():
            x.retain_grad()
        want.sum().backward()
        assert_near(kept.c.grad, interiors["c"].grad, 4)
        assert_near(kept.t.grad, interiors["t"].grad, 4)
        torch.testing.assert_close(kept.h.l2, interiors["h"].grad.norm())
        for x, other in zip((a, b, bias), leaves, strict=True):
            assert_near(x.grad, other.grad, 4)


def test_autocast_is_that_of_the_expression(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b, bias = rand(4, 5), rand(5), rand(4, 1)
    with torch.autocast(path.device, torch.bfloat16):
        assert gate(a, b, bias).dtype == eager_gate(a, b, bias)[0].dtype


def test_a_fused_function_inside_another(path: Path) -> None:
    @ro.fuse_pointwise
    def outer(x, b):
        inner = gate(x, b, 0.25 * x)
        return inner * ro.mul_sin(x, b)

    rand = random_leaves(path.device)
    x, b = rand(4, 5), rand(5)
    kept = ro.Retained("inner")
    assert list(outer.points) == ["inner"]
    outer(x, b, retain=kept).sum().backward()
    assert_near(kept.inner.grad, torch.sin(x * b).detach(), 4)


def test_one_inside_another_where_the_kernels_are_asked_for(kernels: Path) -> None:
    outer, x = ro.fuse_pointwise(lambda x: gate(x, x, x) * 2), torch.ones(3, device=kernels.device)
    torch.testing.assert_close(outer(x), 2 * eager_gate(x, x, x)[0])


def test_it_is_a_function_to_the_rest_of_python() -> None:
    assert (gate.__name__, gate.__doc__, gate.__module__) == ("gate", "A gate.", functions.__name__)
    assert gate.__wrapped__ is not gate
    assert copy.copy(gate) is gate
    assert copy.deepcopy({"f": gate})["f"] is gate
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(ro.fuse_pointwise(lambda x: x * 2))
    assert gate.__reduce__() == "gate"


def test_methods_are_refused_and_modules_are_not(path: Path) -> None:
    class Layer(torch.nn.Module):
        method = gate
        static = staticmethod(gate)

        def __init__(self):
            super().__init__()
            self.act = gate

        def forward(self, x):
            return self.act(x, x, x) + self.static(x, x, x)

    layer, x = Layer(), torch.ones(3, device=path.device)
    torch.testing.assert_close(layer(x), 2 * gate(x, x, x))
    assert copy.deepcopy(layer).act is gate
    with pytest.raises(TypeError, match="gate was called as a method of Layer; .* make it a staticmethod"):
        layer.method(x, x, x)
    assert Layer.method is gate


def test_points_and_explain(path: Path) -> None:
    x = torch.ones(3, device=path.device)
    assert (
        repr(ro.points(gate))
        == repr(gate.points)
        == (
            "gate: h * sigmoid(c) + t\n"
            "  c = a * b   (broadcast of a and b)\n"
            "  h = tanh(c + bias)   (broadcast of a, b and bias)\n"
            "  t = sigmoid(bias) * scale   (broadcast of bias and scale)"
        )
    )
    assert path.expects("gate") in ro.explain(gate, x, x, x, 0.5)
    with pytest.raises(KeyError):
        ro.points("gate")  # a fused function is in no registry


def test_without_triton() -> None:
    code = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(f) for f in sys.meta_path]
import torch, retainops as ro

@ro.fuse_pointwise
def f(x, w):
    c = x * w
    return torch.tanh(c)

x, kept = torch.ones(3, requires_grad=True), ro.Retained("c")
f(x, 0.0, retain=kept).sum().backward()
print(kept.c.grad.tolist(), "def f_bwd_kernel(" in f.source, ro.explain(f, x, 0.0))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[1.0, 1.0, 1.0] True f takes the reference path: triton is not installed.", (
        done.stderr
    )


def test_its_record_is_as_complete_as_an_ops(kernels: Path) -> None:
    inputs = gate.op.sample(torch.Size((4, 5)), torch.float32, kernels.device, torch.Generator())
    assert inputs[3] == 0.5
    y = gate(*inputs)
    assert y.shape == (4, 5)
    size = 4 * 5 * 4
    assert gate.op.traffic(*inputs) == (4 * size, 7 * size, size)
