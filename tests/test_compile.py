"""Retention inside torch.compile(fullgraph=True): the same answers as in eager, no graph break, no stale graph."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import retainops as ro
from retainops import parcel
from retainops.registry import find
from retainops.stats import STATISTICS
from tests.conftest import GPU, random_leaves
from tests.oracle import OPS, assert_near, is_float, leaves, sample

DEVICE = "cuda" if GPU else "cpu"
EVERY = tuple(name for name in STATISTICS if name != "hist")  # a rounding can change a bin


pytestmark = pytest.mark.usefixtures("whole_graphs")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def expression(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained | None = None) -> torch.Tensor:
    return torch.sin(ro.point(a * b, "c", retain=kept))


def compiled(f: Callable = expression, backend: str = "aot_eager", **options) -> Callable:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def request(want: ro.Stats | ro.Into | None = None) -> ro.Retained:
    return ro.Retained("c") if want is None else ro.Retained(c=want)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    rand = random_leaves(DEVICE)
    return rand(*shape, dtype=dtype), rand(*shape[-1:], dtype=dtype)


@pytest.fixture
def carriers_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUDA is in use and tensors are on the CPU, or on the second GPU."""

    def carrier() -> torch.Tensor:
        parcel._let_dynamo_keep_pack()
        return parcel.Parcel("", ("dense",), [torch.empty((), device="meta")]).requires_grad_()

    monkeypatch.setattr(parcel, "carrier", carrier)


def dc_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cos(a * b).detach()


OVERS = (None, "tensor", "rows", "channels")


@pytest.mark.parametrize(
    ("name", "backend", "over"),
    [
        *itertools.product(OPS, ["aot_eager"], OVERS),
        *itertools.product(["mul_sin"], ["inductor"], OVERS),
        *itertools.product(OPS[1:], ["inductor"], ["channels"]),  # seconds each
    ],
)
def test_the_same_answers_as_in_eager(name: str, backend: str, over: str | None) -> None:
    op = find(name)
    points = [p.name for p in op.points]
    step = compiled(lambda x, *rest, kept: op.call(x * 2, *rest, retain=kept) + 1, backend)
    for dtype in (torch.float32, torch.bfloat16) if backend == "aot_eager" else (torch.float32,):
        x, *rest = sample(name, DEVICE, dtype, (4, 33))
        rest = [r[0].detach().requires_grad_() if is_float(r) else r for r in rest]
        ours, theirs = (
            ro.Retained(*points)
            if over is None
            else ro.Retained(**{point: ro.Stats(*EVERY, over=over, grad=True) for point in points})
            for _ in range(2)
        )
        step(x, *rest, kept=ours).sum().backward()
        grads = [leaf.grad for leaf in leaves((x, *rest))]
        for leaf in leaves((x, *rest)):
            leaf.grad = None
        (op.call(x * 2, *rest, retain=theirs) + 1).sum().backward()
        for grad, leaf in zip(grads, leaves((x, *rest)), strict=True):
            assert_near(grad, leaf.grad, 4)
        for point in points:
            assert_near(ours[point].grad, theirs[point].grad, 4)
            for stat in EVERY if over else ():
                got, want = getattr(ours[point], stat), getattr(theirs[point], stat)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in OPS if len(find(name).points) > 1])
def test_one_point_of_several(name: str) -> None:
    op = find(name)
    step = compiled(lambda *inputs, kept: op.call(*inputs, retain=kept))
    for point in op.points:
        inputs = sample(name, DEVICE, shape=(4, 33))
        ours, theirs = ro.Retained(point.name), ro.Retained(point.name)
        step(*inputs, kept=ours).sum().backward()
        op.call(*inputs, retain=theirs).sum().backward()
        assert_near(ours[point.name].grad, theirs[point.name].grad, 4)


def test_nothing_of_a_compiled_function_is_an_error_anywhere_else() -> None:
    """The peers' rows of docs/compile.md, run: what PyTorch itself offers for this."""

    def inside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = a * b
        c.retain_grad()
        return torch.sin(c)

    a, b = pair(3, 4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="retain_grad"):
        compiled(inside)(a, b)
    counters.clear()

    outside = compiled(lambda a, b: ((c := a * b), torch.sin(c)))
    c, y = outside(a, b)
    c.retain_grad()
    y.sum().backward()
    assert c.grad is None  # without a word

    kept = request()
    compiled()(a, b, kept).sum().backward()
    assert_near(kept.c.grad, dc_of(a, b))


def test_retain_grad_inside_without_fullgraph_compiles_nothing() -> None:
    def inside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = a * b
        c.retain_grad()
        return torch.sin(c)

    torch.compile(inside, backend="aot_eager")(*pair(3, 4))
    assert graphs() == 0  # the whole function fell back to eager
    counters.clear()


def test_register_hook_inside_is_an_error() -> None:
    seen = []

    def inside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        c = a * b
        c.register_hook(lambda g: seen.append(g))
        return torch.sin(c)

    a, b = pair(3, 4)
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.InternalTorchDynamoError)):
        compiled(inside)(a, b)
    counters.clear()


def test_switching_on_and_off_goes_back_to_the_first_graph() -> None:
    step, (a, b) = compiled(), pair(3, 4)
    step(a, b, None).sum().backward()
    assert graphs() == 1
    for _ in range(3):  # a new request each time, as people write it: one graph for all of them
        kept = request()
        step(a, b, kept).sum().backward()
        assert_near(kept.c.grad, dc_of(a, b))
    assert graphs() == 2
    step(a, b, None).sum().backward()
    assert graphs() == 2


def test_batch_size_may_change() -> None:
    step, kept = compiled(), request(ro.Stats("l2", "mean", grad=True))
    for n in (5, 6, 7, 8):
        a, b = pair(n, 4)
        step(a, b, kept).sum().backward()
        assert_near(kept.c.grad, dc_of(a, b))
        torch.testing.assert_close(kept.c.mean, dc_of(a, b).mean())
        kept.reset()
    assert graphs() == 2  # one for the first size, one for all others


@pytest.mark.parametrize("over", ["tensor", "rows"])
def test_statistics_of_a_half_whose_width_changes(over: str) -> None:
    """A dynamic size that Dynamo takes from the stride of a view, which the gradient does not have."""
    step = torch.compile(lambda x, kept: ro.glu(x, retain=kept), fullgraph=True, backend="aot_eager")
    for n in (8, 16, 32):
        kept = ro.Retained(gate=ro.Stats("mean", "sum", grad=True, over=over))
        step(random_leaves("cpu")(3, n), kept).sum().backward()
        full = kept.gate.grad
        torch.testing.assert_close(kept.gate.mean, full.mean() if over == "tensor" else full.mean(-1))


def test_gradient_accumulation() -> None:
    step, (a, b), kept = compiled(), pair(3, 4), request(ro.Stats("amax", "sum", grad=True))
    for scale in (1, -5, 2):
        (step(a, b, kept) * scale).sum().backward()
    assert_near(kept.c.grad, -2 * dc_of(a, b), 8)
    torch.testing.assert_close(kept.c.amax, 5 * dc_of(a, b).abs().max())
    torch.testing.assert_close(kept.c.sum, -2 * dc_of(a, b).sum())


def test_two_uses_in_one_graph() -> None:
    step = compiled(lambda a, b, kept: expression(a, b, kept) + 2 * expression(b, a, kept))
    (a, b), kept = pair(3, 4), request(ro.Stats("amax", grad=True))
    step(a, b, kept).sum().backward()
    assert_near(kept.c.grad, 3 * dc_of(a, b), 4)
    torch.testing.assert_close(kept.c.amax, 2 * dc_of(a, b).abs().max())


def test_two_forwards_before_one_backward() -> None:
    step, (a, b), kept = compiled(), pair(3, 4), request()
    (step(a, b, kept).sum() + 2 * step(a, b, kept).sum()).backward()
    assert_near(kept.c.grad, 3 * dc_of(a, b), 4)


def test_two_shapes_at_one_point() -> None:
    step, kept = compiled(lambda a, b, kept: expression(a, b, kept).sum() + expression(a[:2], b, kept).sum()), request()
    with pytest.raises(Exception, match=r"point: a point.*used with two shapes.*\(3, 4\).*\(2, 4\)|\(2, 4\).*\(3, 4\)"):
        step(*pair(3, 4), kept).backward()
    step, kept = compiled(), request()
    step(*pair(3, 4), kept).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(5, 4\).*holds one of shape \(3, 4\).*reset\(\)"):
        step(*pair(5, 4), kept).sum().backward()


@pytest.mark.parametrize("where", ["inside", "around"])
def test_checkpoint(where: str) -> None:
    def inside(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        return checkpoint(expression, a * 1.5, b, kept, use_reentrant=False)

    (a, b), kept = pair(3, 4), request()
    if where == "inside":
        compiled(inside)(a, b, kept).sum().backward()
    else:
        checkpoint(compiled(), a * 1.5, b, kept, use_reentrant=False).sum().backward()
    assert_near(kept.c.grad, dc_of(a * 1.5, b))


def test_autocast() -> None:
    def f(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return torch.sin(ro.point(a @ b, "c", retain=kept))

    rand, kept = random_leaves(DEVICE), request()
    a, b = rand(4, 5), rand(5, 6)
    compiled(f)(a, b, kept).sum().backward()
    assert kept.c.dtype == torch.bfloat16
    assert a.grad.dtype == torch.float32
    theirs = request()
    f(a, b, theirs).sum().backward()
    assert_near(kept.c.grad, theirs.c.grad, 4)


def test_into_a_buffer() -> None:
    (a, b), buffer = pair(3, 4), torch.zeros(3, 4, device=DEVICE)
    kept = request(ro.Into(buffer))
    for _ in range(2):
        compiled()(a, b, kept).sum().backward()
    assert kept.c.grad is buffer
    assert_near(buffer, 2 * dc_of(a, b))


def test_gradients_of_the_inputs_are_bitwise_those_without() -> None:
    step = compiled()
    a, b = pair(64, 48)
    plain = torch.autograd.grad(step(a, b, None).sum(), (a, b))
    for want in (None, ro.Stats("l2", "amax", "act_grad")):
        with_ = torch.autograd.grad(step(a, b, request(want)).sum(), (a, b))
        assert all(torch.equal(x, y) for x, y in zip(plain, with_, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("matmul", [False, True])
def test_a_second_backward_is_right_or_refused(backend: str, matmul: bool) -> None:
    """A compiled backward may be given its saved buffers for good ("donated"): then PyTorch refuses retain_graph."""
    rand, kept = random_leaves(DEVICE), request()
    x, w, v = rand(8, 16), rand(16, 16), rand(16, 16)

    def f(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        c = ro.point(x @ w if matmul else x * w[0], "c", retain=kept)
        return torch.relu(torch.sin(c) @ v) if matmul else torch.sin(c) * v[0]

    want = request()
    f(x, w, v, want).sum().backward()
    y = compiled(f, backend)(x, w, v, kept).sum()
    try:
        y.backward(retain_graph=True)
    except RuntimeError as refusal:
        assert "donated buffers" in str(refusal)  # noqa: PT017 - either outcome is right
        return
    assert_near(kept.c.grad, want.c.grad, 8)
    y.backward(retain_graph=True)
    assert_near(kept.c.grad, 2 * want.c.grad, 8)


def test_no_gradient_reaches_the_point() -> None:
    a, b = (x.detach() for x in pair(3, 4))
    with pytest.raises(Exception, match="can't retain_grad"):
        compiled()(a, b, request())
    counters.clear()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_second_derivative_is_an_error() -> None:
    (a, b), kept = pair(3, 4), request()
    compiled()(a, b, kept).sum().backward(create_graph=True)
    torch.testing.assert_close(kept.c.grad.detach(), torch.cos(a * b).detach())
    with pytest.raises(RuntimeError, match="point 'c' was made in a compiled graph, which has no second derivative"):
        (a.sin().sum() + kept.c.grad.square().sum()).backward()  # where the second term would be lost


@pytest.mark.parametrize("f", [ro.mul_sin, lambda a, b, retain: torch.sin(ro.point(a * b, "c", retain=retain))])
def test_a_request_in_a_torch_func_transform_is_an_error_as_in_eager(f: Callable[..., torch.Tensor]) -> None:
    a, b = pair(3, 4)

    def grad(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained | None) -> torch.Tensor:
        return torch.func.grad(lambda a: f(a, b, retain=kept).sum())(a)

    with pytest.raises(RuntimeError, match="retain= inside a torch.func transform"):
        torch.compile(grad, backend="aot_eager")(a, b, request())
    torch.testing.assert_close(torch.compile(grad, backend="aot_eager")(a, b, None), torch.cos(a * b) * b)


def test_unknown_point_of_an_op() -> None:
    with pytest.raises(Exception, match="unknown point 'd'"):
        compiled(lambda a, b, kept: ro.mul_sin(a, b, retain=kept))(*pair(3, 4), ro.Retained("d"))
    counters.clear()


def test_a_name_that_is_not_asked_for_beside_many_like_it() -> None:
    """What it may have meant is looked for in errors alone: Dynamo cannot trace that."""
    kept = ro.Retained("hidden_a", "hidden_b", "hidden_c", "hidden_d")
    x = torch.randn(3, requires_grad=True)
    f = torch.compile(lambda x: ro.point(x * 2, "hidden_e", retain=kept).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(x), torch.sin(x * 2))


def test_mixing_eager_and_compiled_uses() -> None:
    (a, b), kept = pair(3, 4), request(ro.Stats("sum", grad=True))
    (expression(a, b, kept) + compiled()(a, b, kept)).sum().backward()
    assert_near(kept.c.grad, 2 * dc_of(a, b))
    torch.testing.assert_close(kept.c.sum, 2 * dc_of(a, b).sum())


@pytest.mark.parametrize(
    ("want", "stores"),
    [
        (None, 2),  # da, db
        ("grad", 3),
        (ro.Stats("l2"), 3),
        (ro.Stats("l2", "amax", "act_grad", "mean", "nonfinite"), 8),  # the mean is two: a sum and a count
        (ro.Stats("l2", "amax", over="channels"), 4),
    ],
    ids=repr,
)
@pytest.mark.skipif(GPU, reason="reads the C++ that Inductor writes for a CPU")
def test_inductor_stores_the_answer_from_the_one_fused_backward_kernel(
    want: ro.Stats | str | None, stores: int
) -> None:
    rand = random_leaves(DEVICE)
    a, b, dy = rand(64, 48), rand(64, 48), rand(64, 48, requires_grad=False)
    kept = None if want is None else ro.Retained("c") if want == "grad" else ro.Retained(c=want)
    step = torch.compile(expression, fullgraph=True)
    _, (_forward, backward) = run_and_get_code(lambda: step(a, b, kept).backward(dy))
    kernels = re.findall(r"async_compile.cpp_pybinding\(\[(.*?)\]", backward)
    assert len(kernels) == 1
    written = [argument for argument in kernels[0].split(",") if "const" not in argument]
    assert len(written) == stores
    assert "extern_kernels." not in backward


@pytest.mark.skipif(not GPU, reason="CUDA graphs need CUDA")
def test_reduce_overhead() -> None:
    step = torch.compile(expression, fullgraph=True, mode="reduce-overhead")
    a, b = pair(64, 48)
    for _ in range(4):
        kept = request(ro.Stats("l2", grad=True))
        step(a, b, kept).sum().backward()
        assert_near(kept.c.grad, dc_of(a, b))
        torch.testing.assert_close(kept.c.l2, dc_of(a, b).norm())
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("carriers_elsewhere")
@pytest.mark.parametrize("want", [None, ro.Stats("l2", "amax")], ids=str)
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_slot_does_not_know_where_the_tensors_will_be(want: ro.Stats | None, uses: int, backend: str) -> None:
    def call(a: torch.Tensor, b: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
        for _ in range(uses):
            a = ro.mul_sin(a, b, retain=kept)
        return a

    a, b = pair(3, 5)
    states = []
    for run in (call, compiled(call, backend)):
        kept = request(want)
        run(a, b, kept).sum().backward()
        states.append(kept.state())
    eager, ours = states
    assert eager.keys() == ours.keys()
    for name, x in eager.items():
        torch.testing.assert_close(ours[name], x)
