"""Which path a call takes, and that every path is right: compile, torch.func, forward AD, meta, fake, and the rest."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import retainops as ro
from retainops.points import unretained
from retainops.registry import find
from tests.conftest import GPU, Path, random_leaves
from tests.oracle import OPS, assert_near, eager

over_ops = pytest.mark.parametrize("name", OPS)


def explained(name: str, *inputs) -> str:
    return ro.explain(name, *inputs)


@over_ops
def test_kernels_where_they_can(kernels: Path, name: str) -> None:
    inputs = find(name).sample(torch.Size((3, 4)), torch.float32, kernels.device, torch.Generator())
    with ro.backend("auto"):
        assert explained(name, *inputs).startswith(f"{name} takes the Triton kernels")
        y = find(name).call(*(x.requires_grad_() for x in inputs))
    assert y.grad_fn.name() != eager(find(name), inputs)[0].grad_fn.name()


@pytest.mark.skipif(GPU, reason="says what happens without a GPU")
@over_ops
def test_reference_on_the_cpu(name: str) -> None:
    inputs = find(name).sample(torch.Size((3, 4)), torch.float32, "cpu", torch.Generator())
    assert explained(name, *inputs) == (
        f"{name} takes the reference path: an input is on cpu, and the kernels run on cuda."
    )
    with (
        pytest.raises(RuntimeError, match='"triton" was asked for and there is no GPU.*simulated_gpu'),
        ro.backend("triton"),
    ):
        pass


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda a: (a.long(), a), "torch.int64"),
        (lambda a: (a.to(torch.complex64), a), "complex64"),
        (lambda a: (a, 1j), "a complex number"),
        (lambda a: (torch.conj(torch.view_as_complex(torch.stack([a, a], -1))).imag, a), "lazily negated"),
        (lambda a: (a.to_sparse(), a), "sparse"),
    ],
    ids=["int", "complex", "complex number", "negated", "sparse"],
)
def test_what_the_kernels_cannot_take(kernels: Path, make, why: str) -> None:
    a = random_leaves(kernels.device)(3, 4, requires_grad=False)
    inputs = make(a)
    assert why in explained("mul_sin", *inputs)
    with pytest.raises(RuntimeError, match=rf'mul_sin: the backend is "triton".*{why}.*backend\("auto"\)'):
        ro.mul_sin(*inputs)
    with ro.backend("auto"):
        y = ro.mul_sin(*inputs)
    want = torch.sin(inputs[0] * inputs[1])
    torch.testing.assert_close(y.to_dense() if y.is_sparse else y, want.to_dense() if want.is_sparse else want)
    assert y.dtype == want.dtype


def test_subclasses_take_the_reference(kernels: Path) -> None:
    class Named(torch.Tensor):
        pass

    a = torch.ones(3, device=kernels.device).as_subclass(Named)
    with ro.backend("auto"):
        assert "a Named, a subclass of Tensor" in explained("mul_sin", a, a)
        assert type(ro.mul_sin(a, a)) is Named
    with ro.backend("auto"):
        assert "Triton kernels" in explained("mul_sin", torch.nn.Parameter(torch.ones(3, device=kernels.device)), 2)


@over_ops
def test_torch_func(path: Path, name: str) -> None:
    op, rand = find(name), random_leaves(path.device)
    x, *rest = (rand(4, requires_grad=False) for _ in range(2))

    def ours(x: torch.Tensor) -> torch.Tensor:
        return op.call(x, *rest)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return op.reference(x, *rest, unretained)

    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: lambda x: torch.func.vjp(f, x)[1](x)[0],
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


@over_ops
def test_forward_mode(path: Path, name: str) -> None:
    op, rand = find(name), random_leaves(path.device)
    x, other, t = (rand(4, requires_grad=False) for _ in range(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        ours = forward_ad.unpack_dual(op.call(dual, other)).tangent
        theirs = forward_ad.unpack_dual(op.reference(dual, other, unretained)).tangent
    torch.testing.assert_close(ours, theirs)


@over_ops
def test_vectorised_jacobian(path: Path, name: str) -> None:
    op, rand = find(name), random_leaves(path.device)
    x, other = (rand(4, requires_grad=False) for _ in range(2))
    ours = torch.autograd.functional.jacobian(lambda x: op.call(x, other), x, vectorize=True)
    torch.testing.assert_close(ours, torch.func.jacrev(lambda x: op.reference(x, other, unretained))(x))


@over_ops
def test_meta_and_fake_tensors(path: Path, name: str) -> None:
    op = find(name)
    a, b = torch.empty(3, 1, device="meta", requires_grad=True), torch.empty(5, device="meta", dtype=torch.float64)
    y = op.call(a, b)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5), torch.float64)
    with FakeTensorMode():
        a, b = (torch.empty(3, 5, device=path.device, requires_grad=True) for _ in range(2))
        y = op.call(a, b)
        y.sum().backward()
        assert y.shape == a.grad.shape == (3, 5)
        assert y.device.type == path.device


@over_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph(path: Path, name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    op, rand = find(name), random_leaves(path.device)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return op.call(a * 2, b) + 1

    for n in (5, 9):
        a, b = rand(3, n), rand(n)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Inductor says of the compiler it finds is not ours
            y = step(a, b)
            y.sum().backward()
        a2, b2 = (x.detach().clone().requires_grad_() for x in (a, b))
        want = eager(op, (a2 * 2, b2))[0] + 1
        want.sum().backward()
        assert_near(y, want, 4)
        assert_near(a.grad, a2.grad, 4)
        assert_near(b.grad, b2.grad, 4)


def test_backend_is_a_scope_of_its_own_thread(path: Path) -> None:
    import threading

    found = []
    with ro.backend("reference"):
        t = threading.Thread(target=lambda: found.append(explained("mul_sin", torch.ones(1, dtype=torch.int32), 1)))
        t.start()
        t.join()
        assert 'the backend is "reference"' in explained("mul_sin", torch.ones(1), 1)
    assert "backend" not in found[0]


def test_unknown_backends() -> None:
    with pytest.raises(ValueError, match="backend: unknown backend 'cuda'; expected one of auto, triton, reference"):
        ro.backend("cuda").__enter__()


@pytest.mark.parametrize(
    ("value", "says"),
    [("reference", 'the backend is "reference"'), ("nonsense", "RETAINOPS_BACKEND: unknown backend 'nonsense'")],
)
def test_environment_variable(value: str, says: str) -> None:
    code = "import torch, retainops as ro; print(ro.explain(ro.mul_sin, torch.ones(1), 2.0))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"RETAINOPS_BACKEND": value}, capture_output=True, text=True, check=False
    )
    assert says in done.stdout + done.stderr


def test_explain_of_something_else() -> None:
    with pytest.raises(KeyError, match="'relu' is not an op of retainops; there are: .*mul_sin"):
        ro.explain(torch.relu, torch.ones(1))
    assert repr(ro.points(ro.mul_sin)) == "mul_sin: sin(a * b)\n  c = a * b   (broadcast of a and b)"
