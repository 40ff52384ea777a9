"""A fused function as it is called: layouts, dtypes, arguments, requests, every path."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.testing import check_op, simulated_gpu
from tests.conftest import Path, random_leaves
from tests.elementwise.functions import eager_gate, gate
from tests.oracle import assert_near

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


def test_integers_are_not_computed_in_floating_point(kernels: Path) -> None:
    f, x = ro.fuse_pointwise(lambda x, n: torch.where(x > 0.5, n, 2 * n)), torch.ones(3, device=kernels.device)
    assert "the result is made of integers" in ro.explain(f, x, 3)
    assert "Triton kernels" in ro.explain(f, x, 3.0)
    with ro.backend("auto"):
        assert f(x, 2**24 + 1).tolist() == [2**24 + 1] * 3


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
        assert "a condition is int" in ro.explain(masked, x, 1, fill)
    assert torch.equal(masked(x, False, fill), fill.expand(50, 70))
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
