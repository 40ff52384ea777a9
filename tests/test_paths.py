"""Which path a call takes, and that every path is right: compile, torch.func, forward AD, meta, fake, and the rest."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import retainops as ro
from retainops.points import unretained
from retainops.registry import find
from tests.conftest import GPU, Path, random_leaves
from tests.oracle import OPS, assert_near, clones, eager, is_float, leaves, sample

over_ops = pytest.mark.parametrize("name", OPS)


def explained(name: str, *inputs) -> str:
    return ro.explain(name, *inputs)


@over_ops
def test_kernels_where_they_can(kernels: Path, name: str) -> None:
    inputs = sample(name, kernels.device, shape=(3, 4))
    with ro.backend("auto"):
        assert explained(name, *inputs).startswith(f"{name} takes the Triton kernels")
        y = find(name).call(*inputs)
    assert type(y.grad_fn) is not type(eager(find(name), inputs)[0].grad_fn)


@pytest.mark.parametrize(("size", "takes"), [(2**31 - 2**16, True), (2**31 - 1, False), (2**31, True)])
@pytest.mark.parametrize("name", ["layer_norm", "softmax", "cross_entropy"])
def test_no_loop_over_rows_steps_beyond_int32(kernels: Path, name: str, size: int, takes: bool) -> None:
    one = torch.ones((), device=kernels.device)
    for shape, what in (((1, size), "columns"), ((size, 1), "rows")):
        x, target = one.expand(shape), torch.zeros((), dtype=torch.int64, device=kernels.device).expand(shape[0])
        options = {"layer_norm": (None, None, 1e-5, 0.0), "cross_entropy": (target, None)}.get(name, ())
        with ro.backend("auto"):
            said = explained(name, x, *options)
        assert ("takes the Triton kernels" if takes else f"x has {size} {what}, and a step beyond") in said


@pytest.mark.skipif(GPU, reason="says what happens without a GPU")
@over_ops
def test_reference_on_the_cpu(name: str) -> None:
    inputs = sample(name, "cpu", shape=(3, 4))
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


def functions_of_the_first(name: str, device: str) -> tuple[Callable, Callable, torch.Tensor]:
    """The op and its definition as functions of their first input, and that input."""
    op = find(name)
    x, *rest = sample(name, device, shape=(4,), requires_grad=False)
    return lambda x: op.call(x, *rest), lambda x: op.reference(x, *rest, unretained), x


@over_ops
def test_torch_func(path: Path, name: str) -> None:
    ours, theirs, x = functions_of_the_first(name, path.device)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: lambda x: torch.func.vjp(f, x)[1](f(x))[0],
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    ):
        torch.testing.assert_close(transform(ours)(x), transform(theirs)(x))


@over_ops
def test_forward_mode(path: Path, name: str) -> None:
    ours, theirs, x = functions_of_the_first(name, path.device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.flip(0))
        torch.testing.assert_close(*(forward_ad.unpack_dual(f(dual)).tangent for f in (ours, theirs)))


@over_ops
def test_vectorised_jacobian(path: Path, name: str) -> None:
    ours, theirs, x = functions_of_the_first(name, path.device)
    jacobian = torch.autograd.functional.jacobian(ours, x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.func.jacrev(theirs)(x))


@over_ops
def test_meta_and_fake_tensors(path: Path, name: str) -> None:
    op = find(name)
    inputs = sample(name, "meta", shape=(3, 5))
    if is_float(inputs[-1]) and len(inputs) > 1:  # broadcast and promoted
        inputs[-1] = inputs[-1][0].double()
    y, want = op.call(*inputs), op.reference(*inputs, unretained)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (3, 5), want.dtype)
    with FakeTensorMode():
        inputs = sample(name, path.device, shape=(3, 5))
        y = op.call(*inputs)
        y.sum().backward()
        assert y.shape == (3, 5)
        assert [x.grad.shape for x in leaves(inputs)] == [x.shape for x in leaves(inputs)]
        assert y.device.type == path.device


@over_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph(path: Path, name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    op = find(name)

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def step(x: torch.Tensor, *rest: object) -> torch.Tensor:
        return op.call(x * 2, *rest) + 1

    for n in (5, 9):
        ours = sample(name, path.device, shape=(3, n))
        ours = [x.detach()[0].requires_grad_() if i == 1 and is_float(x) else x for i, x in enumerate(ours)]
        theirs = clones(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Inductor says of the compiler it finds is not ours
            y = step(*ours)
            y.sum().backward()
        want = eager(op, [theirs[0] * 2, *theirs[1:]])[0] + 1
        want.sum().backward()
        assert_near(y, want, 4)
        for x, t in zip(leaves(ours), leaves(theirs), strict=True):
            assert_near(x.grad, t.grad, 4)


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


def test_other_names_of_an_op() -> None:
    assert repr(ro.points(ro.siren)) == repr(ro.points("siren")) == repr(ro.points(ro.mul_sin))
    assert repr(ro.points(ro.bias_gelu)) == repr(ro.points("bias_gelu")) == repr(ro.points(ro.add_gelu))
    assert ro.explain(ro.siren, torch.ones(1), 30.0).startswith("mul_sin takes the reference path: ")


def test_explain_takes_calls_without_what_has_a_default(kernels: Path) -> None:
    x, target = torch.ones(4, 8, device=kernels.device), torch.zeros(4, dtype=torch.int64, device=kernels.device)
    calls = {
        "cross_entropy": (x, target),
        "linear_cross_entropy": (x, torch.ones(5, 8, device=kernels.device), target),
        "bias_dropout_add": (x, None, x),
        "rms_norm": (x,),
        "add_layer_norm": (x, x),
        "group_norm": (x, 2),
        "softmax": (x,),
        "rope": (x, x, x, x),
        "swiglu": (x,),
    }
    for name, inputs in calls.items():
        assert "takes the Triton kernels" in ro.explain(name, *inputs), name
    assert "the Triton kernels" in ro.explain("attention", x, x, x)
    for siren in (ro.siren, "siren"):  # whose w0 has a default
        assert "mul_sin takes the Triton kernels" in ro.explain(siren, x)
    assert "mish takes the Triton kernels" in ro.explain(ro.nn.Mish(), x)


def test_explain_of_what_is_no_call() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match="mul_sin: 0 inputs were given; expected a, b, or those without a default"):
        ro.explain(ro.mul_sin)
    with pytest.raises(TypeError, match="cross_entropy: 1 inputs were given; expected logits, target, weight, "):
        ro.explain(ro.cross_entropy, x)
    with pytest.raises(TypeError, match="rope: 3 inputs were given; expected q, k, cos, sin, "):
        ro.explain("rope", x, x, x)
    f = ro.fuse_pointwise(lambda a, b, *, t=1.0: a * b * t)
    with pytest.raises(TypeError, match="1 inputs were given; expected a, b, t, or those without a default"):
        ro.explain(f, x)
    for op, of in ((ro.mul_sin, "mul_sin"), ("siren", "mul_sin"), (ro.siren, "mul_sin")):
        with pytest.raises(TypeError, match=f"{of}: the inputs given are float, int; expected a torch.Tensor among"):
            ro.explain(op, 1.0, 2)


def test_explain_of_something_else() -> None:
    with pytest.raises(KeyError, match="'relu' is not an op of retainops; did you mean '(reglu|.*_relu)'"):
        ro.explain("relu", torch.ones(1))
    with pytest.raises(KeyError, match="'sin' is not an op of retainops; there are: "):
        ro.points(torch.sin)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(KeyError, match=r"a Sequential is a model, not an op of retainops; .*, ro.points\(model\)"):
        ro.explain(model, torch.ones(1))
    with pytest.raises(KeyError, match="'einsum' is not an op of retainops; there are: .*mul_sin"):
        ro.explain(torch.einsum, torch.ones(1))
    assert repr(ro.points(ro.mul_sin)) == "mul_sin: sin(a * b)\n  c = a * b   (broadcast of a and b)"
