"""Cases in which a reviewer once found the library wrong. Each is what eager PyTorch does."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import retainops as ro
from tests.conftest import GPU, Path, random_leaves
from tests.oracle import assert_near


@pytest.fixture
def ab(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rand = random_leaves(path.device)
    return rand(3, 40), rand(3, 40)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


# A retained gradient is the slot's own.


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_what_a_slot_holds_is_nobody_elses(wrap) -> None:
    def f(a: torch.Tensor, k: ro.Retained) -> torch.Tensor:
        return ro.point(ro.point(a * 2, "c", retain=k) + 1, "d", retain=k) * 3

    a, kept, dy = torch.ones(4, requires_grad=True), ro.Retained("c", "d"), torch.ones(4)
    step = wrap(f)
    step(a, kept).backward(dy)
    step(a, kept).backward(dy)
    f(a, kept).backward(dy)  # and eager accumulates in place, into what the graph gave
    assert kept.c.grad.tolist() == kept.d.grad.tolist() == [9.0] * 4
    assert dy.tolist() == [1.0] * 4
    kept.c.grad.zero_()
    assert kept.d.grad.tolist() == [9.0] * 4


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_the_callers_gradient_is_not_taken(wrap) -> None:
    step = wrap(lambda a, k: ro.point(a * 2, "c", retain=k))
    a, kept, dy = torch.ones(4, requires_grad=True), ro.Retained("c"), torch.ones(4)
    for _ in range(3):
        step(a, kept).backward(dy)
    dy.zero_()
    assert kept.c.grad.tolist() == [3.0] * 4


# No gradient in, none out.


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> None:
        return None


def test_where_no_gradient_arrives_none_leaves(path: Path, ab: tuple) -> None:
    a, b = ab
    for kept in (None, ro.Retained("c"), ro.Retained(c=ro.Stats("l2"))):
        for f in (ro.mul_sin, lambda a, b, retain: ro.point(a * b, "c", retain=retain)):
            Stop.apply(f(a, b, retain=kept)).sum().backward()
            assert a.grad is None
            assert b.grad is None
    assert kept.c.l2 is None


# Shapes of statistics.


def test_statistics_of_gradients_of_two_shapes_do_not_merge(path: Path) -> None:
    step = compiled(lambda a, k: torch.sin(ro.point(a * 2, "c", retain=k)))
    kept = ro.Retained(c=ro.Stats("sum", over="rows"))
    step(torch.ones(4, 3, requires_grad=True, device=path.device), kept).sum().backward()
    with pytest.raises(RuntimeError, match=r"point 'c': statistics of shape \(1,\) do not merge.*\(4,\).*reset"):
        step(torch.ones(1, 3, requires_grad=True, device=path.device), kept).sum().backward()
    assert kept.c.sum.shape == (4,)


def test_a_refused_gradient_changes_no_statistic(path: Path) -> None:
    step = compiled(lambda a, k: torch.sin(ro.point(a * 2, "c", retain=k)))
    kept = ro.Retained(c=ro.Stats("sum", grad=True))
    step(torch.ones(4, 3, requires_grad=True, device=path.device), kept).sum().backward()
    before = kept.c.sum
    with pytest.raises(RuntimeError, match="holds one of shape"):
        step(torch.ones(1, 3, requires_grad=True, device=path.device), kept).sum().backward()
    assert torch.equal(kept.c.sum, before)


def test_statistics_of_a_graph_from_before_a_reset_are_not_shown(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained(c=ro.Stats("sum"))
    late = ro.mul_sin(a, b, retain=kept)
    kept.reset()
    ro.mul_sin(a[:1], b[:1], retain=kept).sum().backward()
    before = kept.c.sum
    late.sum().backward()
    assert torch.equal(kept.c.sum, before)


def test_a_compiled_point_refuses_what_an_eager_one_refuses(path: Path) -> None:
    step = compiled(lambda a, k: ro.point(a * 2, "c", retain=k).abs().sum())
    z = torch.tensor([1 + 2j, 3j], requires_grad=True, device=path.device)
    with pytest.raises(Exception, match="Stats of point 'c', which is torch.complex64"):
        step(z, ro.Retained(c=ro.Stats("l2")))
    with pytest.raises(Exception, match="which has no dims"):
        step(torch.ones((), requires_grad=True, device=path.device), ro.Retained(c=ro.Stats("l2", over="rows")))


# Several threads, one slot.


def test_threads_may_share_a_slot() -> None:
    kept, first = ro.Retained(c=ro.Stats("mean", grad=True)), threading.Barrier(4)

    def work() -> None:
        first.wait()
        for _ in range(200):
            a = torch.ones(8, requires_grad=True)
            ro.point(a * 1, "c", retain=kept).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert kept.c._parts["count"] == 4 * 200 * 8
    assert kept.c.grad.tolist() == [800.0] * 8


# Buffers.


def test_a_buffer_that_is_the_incoming_gradient(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b, buffer = rand(70, 70), rand(70, 70), rand(70, 70, requires_grad=False)
    dy = buffer.t().clone()
    ro.mul_sin(a, b, retain=ro.Retained(c=ro.Into(buffer))).backward(buffer.t())
    assert_near(a.grad, (dy * torch.cos(a * b) * b).detach())
    assert_near(buffer, (dy * torch.cos(a * b)).detach())


def test_a_backward_that_fails_leaves_no_gradient_in_a_buffer(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retainops.ops import _launch

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    rand = random_leaves(kernels.device)
    a, b = rand(3, 4), rand(3, 4)
    kept = ro.Retained(c=ro.Into(torch.full((3, 4), 9.0, device=kernels.device)))
    y = ro.mul_sin(a, b, retain=kept)
    with monkeypatch.context() as patch:
        patch.setattr(_launch, "walk", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            y.sum().backward(retain_graph=True)
    assert kept.c.grad is None
    y.sum().backward()
    assert_near(kept.c.grad, torch.cos(a * b).detach())


# Numbers, sizes, stand-ins.


@pytest.mark.parametrize("number", [1e300, -1e300])
def test_numbers_beyond_float32(path: Path, number: float) -> None:
    a = torch.ones(3, device=path.device)
    assert ro.mul_sin(a, number).isnan().all()
    assert torch.sin(a * number).isnan().all()


@pytest.mark.skipif(GPU, reason="runs only the last program, which a GPU cannot")
def test_sizes_just_below_two_to_the_31st() -> None:
    """Where rounding the size up to tiles would overflow int32."""
    from retainops.testing import simulated_gpu

    n = 2**31 - 512
    a, b = torch.full((1,), 0.5, dtype=torch.bfloat16).expand(n), torch.full((1,), 2.0, dtype=torch.bfloat16)
    with simulated_gpu(programs=[-1], check=False):
        y = ro.mul_sin(a, b)
    assert (y[-512:] == torch.sin(torch.ones(())).bfloat16()).all()


def test_create_graph_after_a_reset_and_another_shape(path: Path) -> None:
    rand = random_leaves(path.device)
    a, b, kept = rand(2), rand(2), ro.Retained("c")
    y = ro.mul_sin(a, b, retain=kept)
    leaf = kept.c.tensor
    kept.reset()
    z = ro.mul_sin(rand(3), rand(3), retain=kept)
    (da, dc) = torch.autograd.grad(y.sum(), (a, leaf), create_graph=True)
    assert_near(dc.detach(), torch.cos(a * b).detach())
    assert da.requires_grad
    z.sum().backward()
    assert kept.c.grad.shape == (3,)


def test_symbolic_trace() -> None:
    traced = torch.fx.symbolic_trace(ro.nn.MulSin(2.0))
    x = torch.ones(3)
    assert torch.equal(traced(x), torch.sin(x * 2))


def test_zero_tensors_as_gradients(kernels: Path) -> None:
    a = random_leaves(kernels.device)(3)
    zero = torch._efficientzerotensor((3,), device=kernels.device)
    with ro.backend("auto"):
        (da,) = torch.autograd.grad(ro.mul_sin(a, 2.0), a, zero)
    assert (da + torch.zeros_like(a)).tolist() == [0.0] * 3


# Inputs that change between forward and backward.


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "group_norm"])
def test_a_bias_is_not_kept_for_backward(path: Path, name: str, create_graph: bool) -> None:
    rand = random_leaves(path.device)
    x, weight, bias = rand(3, 4), rand(4), rand(4)
    y = {
        "layer_norm": lambda: ro.layer_norm(x, weight, bias),
        "add_layer_norm": lambda: ro.add_layer_norm(x, x, weight, bias)[0],
        "group_norm": lambda: ro.group_norm(x, 2, weight, bias),
    }[name]()
    with torch.no_grad():
        bias.fill_(float("nan"))  # no error, in eager PyTorch neither: nobody looks at it again
    dy = torch.linspace(-1, 1, 12, device=path.device).view(3, 4)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=create_graph)
    assert_near(dbias, dy.sum(0))
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
    if create_graph:
        assert torch.autograd.grad(dx.square().sum(), weight)[0].isfinite().all()


# Copies.


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


over_copies = pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)


@over_copies
def test_copies_of_a_request_have_its_gradients(how) -> None:
    kept = ro.Retained("unused", "c", total=ro.Into(torch.zeros(3)))
    a = torch.ones(3, requires_grad=True)
    ro.point(ro.point(a * 2, "c", retain=kept) * 3, "total", retain=kept).sum().backward()
    copied = how(kept)
    assert copied.c.grad.tolist() == [3.0] * 3
    assert copied.c.grad is not kept.c.grad
    assert copied.total.grad.tolist() == [1.0] * 3
    assert copied.unused.grad is None
    assert copied.c.tensor.untyped_storage().nbytes() == copied.c.tensor.element_size()  # of one stored element, still
    assert copied.c.tensor.is_leaf
    ro.point(a * 2, "c", retain=copied).sum().backward()
    assert (copied.c.grad.tolist(), kept.c.grad.tolist()) == ([4.0] * 3, [3.0] * 3)


@over_copies
def test_copies_of_a_request_work(how) -> None:
    kept = ro.Retained("d", c=ro.Stats("l2", grad=True))
    a = torch.ones(3, requires_grad=True)
    ro.point(a * 1, "c", retain=kept).sum().backward()
    copied = how(kept)
    assert copied.c.l2 == kept.c.l2
    compiled(lambda a, k: ro.point(a * 1, "c", retain=k))(a, copied).sum().backward()
    assert copied.c.l2 > kept.c.l2
    assert kept.c.grad.tolist() == [1.0] * 3


def test_two_points_of_one_name() -> None:
    class Both(ro.nn.MulSin):
        def __init__(self) -> None:
            super().__init__(2.0)
            self.c = ro.nn.Point()

    with pytest.raises(ValueError, match=r"two points are called '0.c'.*rename"):
        ro.points(torch.nn.Sequential(Both()))
