"""Slots and requests: what they do, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import embedding

import retainops as ro
from tests import slot_cases
from tests.conftest import GPU, Path, random_leaves
from tests.oracle import assert_near
from tests.slot_cases import dc_of

ab = slot_cases.ab  # a fixture


def test_a_request_is_a_mapping(path: Path, ab: tuple) -> None:
    kept = ro.Retained("c")
    assert list(kept) == ["c"]
    assert len(kept) == 1
    assert kept["c"] is kept.c
    assert "c" in kept
    assert "d" not in kept
    assert kept != ro.Retained("c")
    assert "not used yet" in repr(kept)
    ro.mul_sin(*ab, retain=kept).sum().backward()
    assert repr(kept) == "Retained\n  c  (6, 50)  float32  grad"


def test_names_that_are_not_there() -> None:
    kept = ro.Retained("c")
    with pytest.raises(KeyError, match="no point 'd' was retained; there are: c"):
        kept["d"]
    with pytest.raises(AttributeError, match="no attribute or point 'd'; retained points: c"):
        kept.d  # noqa: B018
    kept = ro.Retained(*(f"model.layers.{i}.mlp.act" for i in range(30)))
    some = re.escape("there are: model.layers.*.mlp.act; did you mean 'model.layers.0.mlp.act'?")
    with pytest.raises(KeyError, match=some):
        kept["layers.0.mlp.act"]
    with pytest.raises(AttributeError, match=r"in brackets: kept\['model.layers.0.mlp.act'\]"):
        kept.model  # noqa: B018


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ro.Retained(), TypeError, "no point named"),
        (lambda: ro.Retained("c", "c"), ValueError, "'c' is named twice"),
        (lambda: ro.Retained("c", c=ro.Into(torch.zeros(1))), ValueError, "'c' is named twice"),
        (lambda: ro.Retained(3), TypeError, "name is int; expected a string"),
        (lambda: ro.Retained(c=torch.zeros(1)), TypeError, r"c= is Tensor; expected .*Into\(buffer\)"),
        (lambda: _two_into(), ValueError, "for points 'c' and 'h' share memory.*, or give both accumulate=True"),
    ],
)
def test_requests_that_make_no_sense(make, error, message: str) -> None:
    with pytest.raises(error, match=f"Retained: .*{message}"):
        make()


def _two_into() -> ro.Retained:
    whole = torch.zeros(4, 6)
    return ro.Retained(c=ro.Into(whole[:3]), h=ro.Into(whole[1:]))


def test_the_tensor_of_an_unused_slot() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"slot 'c' has no tensor yet.*call the op with retain= first.*Inside a compiled graph it has",
    ):
        ro.Retained("c").c.tensor  # noqa: B018


@pytest.mark.parametrize("want", ["Into", "Stats"])
def test_a_batched_gradient_goes_to_no_buffer_and_no_statistic(path: Path, ab: tuple, want: str) -> None:
    kept = ro.Retained(c=ro.Stats("l2") if want == "Stats" else ro.Into(torch.zeros(6, 50, device=path.device)))
    y = ro.mul_sin(*ab, retain=kept)
    with pytest.raises(RuntimeError, match=rf"mul_sin: point 'c' was asked for {want}.* batched .* in a loop"):
        torch.autograd.grad(y, ab[0], torch.ones(2, 6, 50, device=path.device), is_grads_batched=True)


def test_sparse_gradients() -> None:
    weight, rows = torch.randn(5, 3, requires_grad=True), torch.tensor([1, 2, 2])
    kept = ro.Retained("c")
    embedding(rows, ro.point(weight, "c", retain=kept), sparse=True).sum().backward()
    assert kept.c.grad.is_sparse
    assert torch.equal(kept.c.grad.to_dense(), weight.grad.to_dense())
    assert kept.first_nonfinite() is None
    kept = ro.Retained(c=ro.Stats("l2"))
    loss = embedding(rows, ro.point(weight, "c", retain=kept), sparse=True).sum()
    with pytest.raises(RuntimeError, match=r"asked for Stats\(l2\), and its gradient is of the layout torch.sp"):
        loss.backward()


def test_a_sparse_value() -> None:
    x, kept = torch.eye(3, requires_grad=True), ro.Retained("c")
    torch.sparse.mm(ro.point(x.to_sparse(), "c", retain=kept), 2 * torch.eye(3)).sum().backward()
    assert torch.equal(kept.c.grad.to_dense(), 2 * torch.eye(3))


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
def test_a_point_in_a_torch_func_transform(ab: tuple, used: bool) -> None:
    kept = ro.Retained("c")

    def f(a: torch.Tensor) -> torch.Tensor:
        return ro.point(a * 2, "c", retain=kept).sum()

    if used:
        f(ab[0])
    with pytest.raises(RuntimeError, match="point: retain= inside a torch.func transform"):
        torch.func.grad(f)(ab[0])


@pytest.mark.skipif(GPU, reason="looks at the arguments of launches, which only a simulated driver hands out")
def test_the_kernel_writes_where_the_caller_reads() -> None:
    """No second pass: the pointer that the kernel stores dc to is that of `.grad`, or of the buffer."""
    from retainops.testing import simulated_gpu

    a, b = torch.ones(6, 50, requires_grad=True), torch.ones(6, 50)
    for want in (None, ro.Into(torch.empty(6, 50))):
        kept, pointers = ro.Retained("c") if want is None else ro.Retained(c=want), []

        def execute(launch, pointers=pointers) -> None:
            operands = dict(zip(launch.fn.arg_names, launch.args, strict=True))
            if "DC" in operands:
                pointers.append(operands["DC"][0].ptr.data_ptr())

        with simulated_gpu(engine=execute):
            ro.mul_sin(a, b, retain=kept).sum().backward()
        assert pointers == [kept.c.grad.data_ptr()]


def test_reuse_with_another_shape(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained("c")
    ro.mul_sin(a, b, retain=kept).sum().backward()
    before = kept.c.grad.clone()
    with pytest.raises(RuntimeError, match=r"shape \(3, 50\).*holds one of shape \(6, 50\).*reset\(\).*statistics"):
        ro.mul_sin(a[:3], b, retain=kept)
    with pytest.raises(RuntimeError, match=r"torch.float64.*holds one of.*torch.float32"):
        ro.mul_sin(a.double(), b.double(), retain=kept)
    assert torch.equal(kept.c.grad, before)
    kept.reset()
    ro.mul_sin(a[:3], b, retain=kept).sum().backward()
    assert_near(kept.c.grad, dc_of(a[:3], b))


def test_resetting_between_forward_and_backward(path: Path, ab: tuple) -> None:
    """The first graph's gradient goes to the leaf it was built with, whatever the slot is bound to by then."""
    a, b = ab
    kept = ro.Retained("c")
    y = ro.mul_sin(a, b, retain=kept)
    first = kept.c.tensor
    kept.reset()
    small = ro.mul_sin(a[:3], b, retain=kept)
    y.sum().backward()
    assert_near(first.grad, dc_of(a, b))
    assert kept.c.grad is None
    small.sum().backward()
    assert_near(kept.c.grad, dc_of(a[:3], b))


@pytest.mark.parametrize(("over", "rows"), [("tensor", 3), ("channels", 3), ("rows", 6)])
def test_statistics_alone_take_every_shape_that_they_add_up_over(path: Path, ab: tuple, over: str, rows: int) -> None:
    """Micro-batches of several lengths: forwards in a row, then backwards, in any order."""
    (a, b), less = ab, slice(None) if over == "channels" else slice(20)
    kept = ro.Retained(c=ro.Stats("sum", "amax", over=over))
    ys = [ro.mul_sin(x, y, retain=kept).sum() for x, y in ((a, b), (a[:rows, less], b[less]), (a, b))]
    for y in reversed(ys):
        y.backward()
    dim = {"tensor": (0, 1), "channels": 0, "rows": 1}[over]
    whole, part = dc_of(a, b), dc_of(a[:rows, less], b[less])
    assert_near(kept.c.sum, 2 * whole.sum(dim) + part.sum(dim), 16)
    assert_near(kept.c.amax, torch.maximum(whole.abs().amax(dim), part.abs().amax(dim)), 4)


def test_a_reset_does_away_with_the_graphs_of_every_shape(path: Path, ab: tuple) -> None:
    a, b = ab
    kept = ro.Retained(c=ro.Stats("sum"))
    old = [ro.mul_sin(x, b, retain=kept).sum() for x in (a, a[:3])]
    kept.reset()
    ro.mul_sin(a[:2], b, retain=kept).sum().backward()
    sum(old).backward()
    assert_near(kept.c.sum, dc_of(a[:2], b).sum(), 16)


def test_statistics_that_do_not_add_up_over_shapes(path: Path, ab: tuple) -> None:
    a, b = ab
    for want in (ro.Stats("l2", over="rows"), ro.Stats("l2", grad=True)):
        kept = ro.Retained(c=want)
        ro.mul_sin(a, b, retain=kept)
        with pytest.raises(RuntimeError, match=r"shape \(3, 50\).*holds one of shape \(6, 50\).*reset\(\)"):
            ro.mul_sin(a[:3], b, retain=kept)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 0), ()], ids=str)
def test_one_element_or_none_accumulates_without_a_warning(path: Path, shape: tuple[int, ...]) -> None:
    kept, x = ro.Retained("c"), random_leaves(path.device)(*shape)
    for _ in range(2):  # warnings are errors in this suite
        ro.point(x * 2, "c", retain=kept).sum().backward()
    assert kept.c.grad.eq(2).all()
    assert kept.c.grad.is_contiguous()
