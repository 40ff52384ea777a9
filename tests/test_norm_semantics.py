"""The norms over the last dim: what autograd, torch.compile, statistics and buffers expect of every op."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops import _norm
from retainops.ops.norm import RMS_NORM, layer_norm, rms_norm
from retainops.points import unretained
from retainops.registry import Op
from tests.conftest import Path
from tests.norm_cases import (
    SUMS,
    cut_rows,
    differentiate,
    in_rows_and_chunks,
    inputs_of,
    joined,
    launched,
    over_ops,
    several,
)
from tests.oracle import all_points, assert_near, clones, eager, is_float, leaves, random_like

EVERY = ("l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad")


def stats_of(op: Op, *names: str, **options: Any) -> ro.Retained:
    return ro.Retained(**{p.name: ro.Stats(*names, **options) for p in op.points})


@over_ops
@in_rows_and_chunks
def test_retention_changes_no_bit_and_two_runs_are_equal(
    op: Op, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several programs that walk several tiles each: another cut into tiles would be another order of sums."""
    cut_rows(cut, monkeypatch)
    monkeypatch.setattr("retainops.ops._rows._multiprocessors", lambda device: 1)
    stats = (stats_of(op, "l2", "act_grad", over=over, grad=over == "rows") for over in ("rows", "channels"))
    runs = []
    for kept in (None, None, all_points(op), *stats):
        ours = inputs_of(op, 70, 40, dtype=torch.bfloat16, device=kernels.device)
        outputs = several(op.call(*ours, retain=kept))
        differentiate(outputs)
        runs.append([*outputs, *(x.grad for x in leaves(ours))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@over_ops
def test_backward_again_and_inputs_unwritten(op: Op, path: Path) -> None:
    ours, kept = inputs_of(op, 7, 30, device=path.device), all_points(op)
    before = [(x.detach().clone(), x._version) for x in leaves(ours)]
    outputs = several(op.call(*ours, retain=kept))
    dys = [random_like(y) for y in outputs]
    held = [t.detach().clone() for t in (*dys, *outputs)]
    torch.autograd.backward(outputs, dys, retain_graph=True)
    first = [x.grad.clone() for x in leaves(ours)] + [s.grad.clone() for s in kept.values()]
    torch.autograd.backward(outputs, dys)
    second = [x.grad for x in leaves(ours)] + [s.grad for s in kept.values()]
    assert all(torch.equal(b, 2 * a) for a, b in zip(first, second, strict=True))
    for x, (value, version) in zip(leaves(ours), before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert all(torch.equal(a, b) for a, b in zip((*dys, *outputs), held, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        outputs[0].sum().backward()


@over_ops
@pytest.mark.parametrize("order", ["z + op(x)", "op(x) + z"])
def test_sums_with_an_output_in_both_orders(op: Op, order: str, path: Path) -> None:
    """z is the input itself, whose gradient is the sum of both: nothing may be written over on the way."""
    ours = inputs_of(op, 7, 30, device=path.device)
    theirs, seen = clones(ours), []

    def loss(inputs: list[Any], outputs: Any) -> torch.Tensor:
        y, *others = several(outputs)
        y.register_hook(seen.append)
        total = inputs[0] + y if order == "z + op(x)" else y + inputs[0]
        return (total * total).sum() + y.sum() + sum((3 * o).sum() for o in others)

    loss(ours, op.call(*ours)).backward()
    loss(theirs, eager(op, theirs)[0]).backward()
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 8)
    assert_near(seen[0], seen[1], 4)  # what a hook captured was not written over afterwards


@over_ops
def test_gradients_that_nobody_needs(op: Op, kernels: Path) -> None:
    for wanted in range(len(leaves(inputs_of(op, 2, 3, device="cpu")))):
        ours = inputs_of(op, 5, 30, device=kernels.device)
        theirs = clones(ours)
        for given in (ours, theirs):
            for i, x in enumerate(leaves(given)):
                x.requires_grad_(i == wanted)
        y, want = several(op.call(*ours))[0], several(eager(op, theirs)[0])[0]
        want.backward(differentiate(y)[0])
        (mine,), (eagers,) = leaves(ours), leaves(theirs)
        assert_near(mine.grad, eagers.grad, 4)


def test_many_rows_are_shared_by_few_programs() -> None:
    """Each leaves one share of the weights' gradients, however many rows there are."""
    x, w, b = (torch.empty(*size, requires_grad=True) for size in ((40_000, 64), (64,), (64,)))
    _, (_, programs, given), (_, _, of_shares) = launched(lambda: layer_norm(x, w, b).backward(torch.empty_like(x)))
    assert programs == 2 * 132
    assert given["DW"].ptr.shape == given["DB"].ptr.shape == (programs, 64)
    assert of_shares["A"].ptr is given["DW"].ptr
    assert of_shares["B"].ptr is given["DB"].ptr


# Derivatives of derivatives, and functions of functions.


@over_ops
def test_first_and_second_derivatives_in_float64(op: Op, kernels: Path) -> None:
    ours = inputs_of(op, 2, 3, dtype=torch.float64, device=kernels.device)
    assert torch.autograd.gradcheck(op.call, ours, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(op.call, ours)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # which is what is tested
@over_ops
def test_create_graph_gives_a_differentiable_gradient_at_every_point(op: Op, path: Path) -> None:
    ours, kept = inputs_of(op, 3, 5, dtype=torch.float64, device=path.device), all_points(op)
    theirs, added = clones(ours), {}

    def point(name: str, value: torch.Tensor) -> torch.Tensor:
        added[name] = torch.zeros_like(value).requires_grad_()
        return value + added[name]

    for outputs in (op.call(*ours, retain=kept), op.reference(*theirs, point)):
        dys = [random_like(y) for y in several(outputs)]
        torch.autograd.backward(several(outputs), dys, create_graph=True)
    for given, retained in ((ours, [s.grad for s in kept.values()]), (theirs, [a.grad for a in added.values()])):
        (sum((x.grad**2).sum() for x in leaves(given)) + sum((g**3).sum() for g in retained)).backward()
    for a, b in zip([*leaves(ours), *kept.values()], [*leaves(theirs), *added.values()], strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for x in (*leaves(ours), *leaves(theirs), *added.values()):
        x.grad = None  # they refer to the graph, and it to them
    kept.reset()


@over_ops
def test_in_place_change_is_pytorchs_error(op: Op, kernels: Path) -> None:
    ours = inputs_of(op, 3, 5, device=kernels.device)
    outputs = several(op.call(*ours))
    with torch.no_grad():
        (outputs[1] if op in SUMS else ours[0]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


@over_ops
def test_autocast_is_as_for_the_eager_expression(op: Op, path: Path) -> None:
    ours = inputs_of(op, 5, 30, device=path.device)
    theirs = clones(ours)
    with torch.autocast(path.device, torch.bfloat16):
        eye = torch.eye(30, device=path.device)
        outputs = several(op.call(ours[0] @ eye, *ours[1:]))
        want = several(op.reference(theirs[0] @ eye, *theirs[1:], unretained))
    assert [y.dtype for y in outputs] == [w.dtype for w in want]
    differentiate(want, differentiate(outputs))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32


@over_ops
def test_torch_func_and_meta(op: Op, kernels: Path) -> None:
    x, *rest = (t.detach() if is_float(t) else t for t in inputs_of(op, 3, 6, device=kernels.device))
    ours, theirs = joined(op)

    def f(x: torch.Tensor) -> torch.Tensor:
        return ours(x, *rest)

    def g(x: torch.Tensor) -> torch.Tensor:
        return theirs(x, *rest, unretained)

    with ro.backend("auto"):
        for transform in (
            lambda f: torch.func.grad(lambda x: (f(x) ** 2).sum()),
            lambda f: lambda x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
            torch.func.jacrev,
            torch.func.jacfwd,
        ):
            torch.testing.assert_close(transform(f)(x), transform(g)(x))
        outputs = several(op.call(*(t.to("meta") if is_float(t) else t for t in (x, *rest))))
    assert all((y.device.type, y.shape) == ("meta", (3, 6)) for y in outputs)


@over_ops
def test_compiled_with_retention(op: Op) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(kept: ro.Retained, x: torch.Tensor, *rest: Any) -> Any:
        return op.call(x * 2, *rest, retain=kept)

    ours, kept = inputs_of(op, 4, 9, device="cpu"), all_points(op)
    theirs = clones(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        outputs = step(kept, *ours)
        dys = differentiate(outputs)
    want, values = eager(op, [theirs[0] * 2, *theirs[1:]])
    differentiate(want, dys)
    for y, w in zip(several(outputs), several(want), strict=True):
        assert_near(y, w, 4)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 8)
    for name, slot in kept.items():
        assert_near(slot.grad, values[name].grad, 8)


# Statistics and buffers.


@over_ops
@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
@in_rows_and_chunks
def test_statistics_are_those_of_the_gradient(
    op: Op, over: str, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_rows(cut, monkeypatch)
    names = (*EVERY, "hist") if over == "tensor" else EVERY
    shape = (2, 40, 70)
    full, stats = (inputs_of(op, *shape, device=kernels.device) for _ in "ab")
    want, found = stats_of(op, *names, over=over, grad=True), stats_of(op, *names, over=over)
    with ro.backend("reference"):
        differentiate(op.call(*full, retain=want))
    differentiate(op.call(*stats, retain=found))
    for a, b in zip(leaves(full), leaves(stats), strict=True):
        assert_near(a.grad, b.grad, 4)
    for point in found:
        for name in names:
            a, b = getattr(found[point], name), getattr(want[point], name)
            if name == "hist":
                assert (a - b).abs().sum() <= 0.01 * a.sum()  # a value near a power of two may fall on either side
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_statistics_that_take_a_launch_of_their_own(kernels: Path) -> None:
    """Beside statistics of another point that do not, and beside the gradient of the same one."""
    over = {"xhat": "channels", "y": "rows"}
    kept, want = (ro.Retained(**{p: ro.Stats("l2", over=o, grad=True) for p, o in over.items()}) for _ in "ab")
    for retain, backend in ((kept, "triton"), (want, "reference")):
        with ro.backend(backend):
            differentiate(rms_norm(*inputs_of(RMS_NORM, 70, 90, device=kernels.device), retain=retain))
    for point in over:
        torch.testing.assert_close(kept[point].l2, want[point].l2)
        torch.testing.assert_close(kept[point].grad, want[point].grad)


def test_statistics_over_channels_take_little_memory() -> None:
    """One share for 64 rows, whatever the width: never a buffer of the gradient's size."""
    x, w = torch.empty(640, 2048, requires_grad=True), torch.empty(2048)
    kept = ro.Retained(xhat=ro.Stats("l2", over="channels"))
    _, dense, alone = launched(lambda: rms_norm(x, w, retain=kept).backward(torch.empty_like(x)))
    assert dense[0] == alone[0] == "norm_bwd_kernel"
    assert dense[2]["DXHAT"].stats.sumsq is None
    assert alone[2]["DXHAT"].stats.sumsq.numel() == 640 // _norm.TALL.widest * 2048


@over_ops
@pytest.mark.parametrize("accumulate", [False, True])
@in_rows_and_chunks
def test_into_buffers(op: Op, accumulate: bool, cut: str, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_rows(cut, monkeypatch)
    grads = []
    for into in (False, True):
        ours = inputs_of(op, 5, 40, device=kernels.device)
        kept = all_points(op)
        if into:
            buffers = {p.name: torch.ones(5, 40, device=kernels.device) for p in op.points}
            kept = ro.Retained(**{name: ro.Into(b, accumulate=accumulate) for name, b in buffers.items()})
        differentiate(op.call(*ours, retain=kept))
        grads.append([slot.grad for slot in kept.values()])
    for without, with_ in zip(*grads, strict=True):
        torch.testing.assert_close(with_, without + accumulate)


def test_layer_norm_of_complex_numbers_is_its_definition() -> None:
    z = torch.complex(torch.arange(6.0).view(2, 3), torch.ones(2, 3))
    centred = z - z.mean(-1, keepdim=True)
    expected = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(ro.layer_norm(z), expected)
