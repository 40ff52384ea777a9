"""A fused function as it is called: layouts, dtypes, requests, every path, and what a function is besides."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
import warnings
from pathlib import Path as File

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.testing import check_op, simulated_gpu
from tests.conftest import Path, random_leaves
from tests.oracle import assert_near

ROOT = File(__file__).parent.parent.parent


@ro.fuse_pointwise
def gate(a, b, bias, scale: float = 0.5):
    """A gate."""
    c = a * b
    h = torch.tanh(c + bias)
    t = torch.sigmoid(bias) * scale
    return h * torch.sigmoid(c) + t


def eager_gate(a, b, bias, scale=0.5):
    c = a * b
    h = torch.tanh(c + bias)
    t = torch.sigmoid(bias) * scale
    return h * torch.sigmoid(c) + t, {"c": c, "h": h, "t": t}


LAYOUTS = {
    "dense": lambda rand: (rand(20, 60), rand(20, 60), rand(20, 60)),
    "a row and a column": lambda rand: (rand(70, 33), rand(33), rand(70, 1)),
    "scalars": lambda rand: (rand(9, 66), rand(), rand(1, 1)),
    "outer product": lambda rand: (rand(30, 1), rand(1, 17), rand(17)),
    "strided": lambda rand: (rand(30, 20).T, rand(20, 60)[:, ::2], rand(30)),
    "dims that do not merge": lambda rand: (rand(2, 3, 4, 5), rand(3, 1, 5), rand(2, 1, 4, 1)),
    "one element": lambda rand: (rand(1), rand(1, 1), rand()),
    "no elements": lambda rand: (rand(0, 5), rand(5), rand(0, 1)),
}


@pytest.mark.parametrize("exponent", [0.01, -0.01, -1.7, 4.9, -50.3, 1e10])
def test_powers_of_subnormal_numbers_in_compiled_code(exponent: float) -> None:
    """libdevice's flushes them, which the interpreter's does not."""

    @ro.fuse_pointwise
    def power(x):
        c = x**exponent
        return c * 1.0

    x = torch.tensor([1e-45, 1e-40, 1.1754942e-38, 1.1754944e-38, -1e-40, 0.0, -0.0, 0.5, 2.0], requires_grad=True)
    like = x.detach().clone().requires_grad_()
    with simulated_gpu(engine="ptx"), ro.backend("triton"):
        y = power(x)
        y.sum().backward()
    want = like**exponent
    want.sum().backward()
    for got, eager in ((y, want), (x.grad, like.grad)):
        torch.testing.assert_close(got, eager, rtol=2e-5, atol=2e-38, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(kernels: Path, layout, dtype: torch.dtype) -> None:
    draw = random_leaves(kernels.device)
    inputs = layout(lambda *shape: draw(*shape, dtype=dtype, requires_grad=False))
    report = check_op(gate, *inputs, 0.5)
    assert report.ok, report


@pytest.mark.parametrize("name", ["c", "h", "t"])
def test_statistics_and_buffers_at_points_of_every_shape(path: Path, name: str) -> None:
    rand = random_leaves(path.device)
    a, b, bias = rand(70, 66), rand(70, 66), rand(66)
    want = torch.autograd.grad(eager_gate(a, b, bias)[0].sum(), [a, b, bias])
    y, interiors = eager_gate(a, b, bias)
    interiors[name].retain_grad()
    y.sum().backward()
    grad, value = interiors[name].grad, interiors[name].detach()
    buffer = torch.ones_like(grad)
    for asked in (ro.Stats("l2", "amax", "act_grad", grad=True), ro.Into(buffer, accumulate=True)):
        a.grad = b.grad = bias.grad = None
        kept = ro.Retained(**{name: asked})
        gate(a, b, bias, retain=kept).sum().backward()
        slot = kept[name]
        for x, other in zip((a, b, bias), want, strict=True):
            assert_near(x.grad, other, 4)
        if isinstance(asked, ro.Into):
            assert_near(buffer, grad + 1, 4)
            continue
        assert_near(slot.grad, grad, 4)
        torch.testing.assert_close(slot.l2, grad.norm())
        torch.testing.assert_close(slot.amax, grad.abs().max())
        torch.testing.assert_close(slot.act_grad, (grad * value).sum(), rtol=1e-4, atol=1e-4)


def test_statistics_over_channels(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b, bias = rand(70, 66), rand(66), rand(70, 1)
    kept, whole = ro.Retained(c=ro.Stats("sum", over="channels")), ro.Retained("c")
    gate(a, b, bias, retain=kept).sum().backward()
    gate(a, b, bias, retain=whole).sum().backward()
    torch.testing.assert_close(kept.c.sum, whole.c.grad.sum(0))


def test_mixed_dtypes_promote_as_in_eager(path: Path) -> None:
    rand = random_leaves(path.device)
    for dtypes in itertools.permutations([torch.bfloat16, torch.float32, torch.float64], 2):
        a, b, bias = rand(6, 5, dtype=dtypes[0]), rand(5, dtype=dtypes[1]), rand(6, 1, dtype=dtypes[0])
        kept = ro.Retained("c", "t")
        y, (want, interiors) = gate(a, b, bias, retain=kept), eager_gate(a, b, bias)
        y.sum().backward()
        assert y.dtype == want.dtype
        assert (kept.c.dtype, kept.t.dtype) == (interiors["c"].dtype, interiors["t"].dtype)
        assert [x.grad.dtype for x in (a, b, bias)] == [x.dtype for x in (a, b, bias)]


def test_what_is_not_of_the_results_dtype_takes_the_reference(kernels: Path) -> None:
    x, wide = torch.ones(3, device=kernels.device), torch.ones(3, device=kernels.device, dtype=torch.float64)

    @ro.fuse_pointwise
    def chosen(x, w):
        return torch.where(w > 1, x, 2 * x)

    assert "interiors in one dtype" in ro.explain(chosen, x, wide)
    assert "Triton kernels" in ro.explain(chosen, wide, wide)
    with ro.backend("auto"):
        assert chosen(x, wide).dtype == torch.float32


def test_boolean_tensors_are_read_by_the_kernels(path: Path) -> None:
    @ro.fuse_pointwise
    def masked(x, mask, fill):
        c = x * 2
        return torch.where(mask & ~torch.isnan(x), c, fill) + x * mask

    rand = random_leaves(path.device)
    x, fill = rand(50, 70), rand(70)
    mask = rand(50, 1, requires_grad=False) > 0
    assert path.expects("masked") in ro.explain(masked, x, mask, fill)
    kept = ro.Retained("c")
    masked(x, mask, fill, retain=kept).sum().backward()
    wide = mask.expand(50, 70)
    assert torch.equal(kept.c.grad, wide.float())
    assert torch.equal(x.grad, 3.0 * wide)
    assert torch.equal(fill.grad, (~wide).float().sum(0))
    if path.name != "reference":
        assert "a condition is torch.float32" in ro.explain(masked, x, x, fill)
        assert "a condition is bool" in ro.explain(masked, x, True, fill)
    with pytest.raises(RuntimeError, match="not implemented for 'Float'"), ro.backend("auto"):
        masked(x, fill, fill)  # eager's own error


def test_arguments_are_bound_as_pythons(path: Path) -> None:
    @ro.fuse_pointwise
    def f(x, /, y, scale=2.0, *, shift=1):
        return x * y * scale + shift

    x = torch.ones(2, device=path.device)
    for args, kwargs, want in [
        ((x, x), {}, 3.0),
        ((x,), {"y": x}, 3.0),
        ((x, x, 3), {}, 4.0),
        ((x, 2.0), {"shift": x * 5, "scale": 0.5}, 6.0),
    ]:
        assert torch.equal(f(*args, **kwargs), torch.full_like(x, want))
    for args, kwargs, says in [
        ((x,), {}, "missing a required argument: 'y'"),
        ((x, x, 1, 2), {}, "too many positional arguments"),
        ((x, x), {"scal": 3}, "unexpected keyword argument 'scal'"),
        ((x, x), {"y": x}, "multiple values for argument 'y'"),
        ((), {"x": x, "y": x}, "('x'.* )?positional.only"),  # where it stands depends on Python
    ]:
        with pytest.raises(TypeError, match=rf"f\(x, /, y, scale=2.0, \*, shift=1\): .*{says}"):
            f(*args, **kwargs)
    assert str(inspect.signature(f)) == "(x, /, y, scale=2.0, *, shift=1, retain: 'Retained | None' = None)"


def test_bad_arguments(path: Path) -> None:
    x = torch.ones(3, device=path.device, requires_grad=True)
    with pytest.raises(TypeError, match="gate: b is str; expected a torch.Tensor or a Python number"):
        gate(x, "b", x)
    with pytest.raises(TypeError, match="gate: a and b and bias and scale are all numbers"):
        gate(1.0, 2.0, 3.0)
    with pytest.raises(RuntimeError, match=r"gate: a of shape \(3,\) and b of shape \(2,\).* do not broadcast"):
        gate(x, x[:2], x)
    with pytest.raises(TypeError, match="gate: retain is str; expected retainops.Retained"):
        gate(x, x, x, retain="c")
    with pytest.raises(KeyError, match="gate: unknown point 'd'; its points are: c, h, t"):
        gate(x, x, x, retain=ro.Retained("d"))
    with pytest.raises(KeyError, match="lambda.* has no points: no local name"):
        ro.fuse_pointwise(lambda x: x * 2)(x, retain=ro.Retained("c"))


def test_a_point_that_no_gradient_can_reach_in_this_call(path: Path) -> None:
    x, bias = torch.ones(3, device=path.device), torch.ones(3, device=path.device, requires_grad=True)
    kept = ro.Retained("h", "t")
    gate(x, x, bias, retain=kept).sum().backward()
    assert kept.t.grad is not None
    with pytest.raises(RuntimeError, match="gate: can't retain_grad on point 'c'.*requires_grad=False"):
        gate(x, x, bias, retain=ro.Retained("c"))

    @ro.fuse_pointwise
    def scaled(x, s):
        k = s * 3
        return x * k

    with pytest.raises(RuntimeError, match="can't retain_grad on point 'k'"):
        scaled(bias, 2.0, retain=ro.Retained("k"))
    assert torch.equal(scaled(bias, 2.0), 6 * bias)


def test_numbers_that_are_interiors_are_no_points_of_the_call(path: Path) -> None:
    @ro.fuse_pointwise
    def scaled(x, s):
        k = s * 3
        c = x * k
        return c + k

    x = torch.ones(3, device=path.device, requires_grad=True)
    kept = ro.Retained("c")
    scaled(x, 2, retain=kept).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6))
    assert torch.equal(kept.c.grad, torch.ones_like(x))


def test_inputs_without_a_gradient(path: Path) -> None:
    @ro.fuse_pointwise
    def f(x, threshold, unused):
        return torch.where(x > threshold, x, 0.0)

    x = torch.tensor([0.5, 2.0], device=path.device)
    threshold = torch.ones(2, device=path.device, requires_grad=True)
    assert not f(x, threshold, threshold).requires_grad
    x.requires_grad_()
    f(x, threshold, torch.ones(7, device=path.device, requires_grad=True)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0], device=path.device))
    assert threshold.grad is None


def test_what_backward_does_not_read_is_not_kept(kernels: Path) -> None:
    @ro.fuse_pointwise
    def f(x, w, bias):
        c = x * w
        return c + bias * 3

    x, w, bias = (random_leaves(kernels.device)(64) for _ in range(3))
    y = f(x, w, bias)
    kept = [id(t) for t in y.grad_fn.saved_tensors if t is not None]
    assert len(kept) == 2
    with torch.no_grad():
        bias.zero_()  # no error: nobody looks at it again
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 3))
    kept = ro.Retained(c=ro.Stats("act_grad"))
    f(x, w, bias, retain=kept).sum().backward()
    torch.testing.assert_close(kept.c.act_grad, (x * w).sum().detach())


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


def test_it_is_a_function_to_the_rest_of_python() -> None:
    assert (gate.__name__, gate.__doc__, gate.__module__) == ("gate", "A gate.", __name__)
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


def test_one_of_each_form_on_the_compiled_code_itself() -> None:
    """The PTX that a GPU would be given, executed."""
    pytest.importorskip("triton")
    from retainops.testing import simulated_gpu

    @ro.fuse_pointwise
    def f(x, mask, w):
        c = torch.where(mask & ~(x > 1), x / 3, torch.clamp(x, -1.0, 0.5)) * w
        return F.gelu(c) + torch.sqrt(c * c + 1) - torch.expm1(-c.abs()) + torch.maximum(c, w) ** 3

    rand = random_leaves("cpu")
    x, w = rand(5, 67), rand(67)
    mask = rand(5, 67, requires_grad=False) > 0
    found = []
    for engine in ("ptx", "interpreter"):
        x.grad = w.grad = None
        kept = ro.Retained("c")
        with simulated_gpu(engine=engine):
            y = f(x, mask, w, retain=kept)
            y.sum().backward()
        found.append((y.detach(), kept.c.grad, x.grad, w.grad))
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
