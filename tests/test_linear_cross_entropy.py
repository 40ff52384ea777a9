"""What is special to linear_cross_entropy: blocks of any size, what is rounded when, memory, compiled code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops import _blocks
from retainops.ops._blocks import Cut
from retainops.ops.linear_cross_entropy import linear_cross_entropy
from tests.conftest import GPU, Path
from tests.oracle import assert_near


def drawn(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def layer(rows: int, width: int, classes: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, weight, target, bias."""
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows)).to(device)
    like = {"dtype": dtype, "device": device}
    return drawn(rows, width, **like), drawn(classes, width, **like), target, drawn(classes, **like)


def pair(
    x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, w, bias), target, **options)


def in_float64(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]


def with_gradients(loss: Any, *inputs: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """A loss, and the gradients of x, weight and bias."""
    y = loss(*inputs, **options)
    wanted = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_is_torchs_pair(path: Path, weighted: bool, smoothing: float) -> None:
    inputs = layer(6, 3, 9, torch.float64, path.device)
    weight = drawn(9, device=path.device).detach().abs() if weighted else None
    for reduction, index in itertools.product(("mean", "sum", "none"), (-100, int(inputs[2][1]))):
        options = {"reduction": reduction, "ignore_index": index, "label_smoothing": smoothing}
        ours = with_gradients(linear_cross_entropy, *inputs, class_weight=weight, chunk=2, **options)
        theirs = with_gradients(pair, *inputs, weight=weight, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


CUTS = [(5, 8, 1), (5, 8, 4), (5, 8, 100), (5, 8, None), (8, 5, 1), (8, 5, 3), (1, 9, 1), (9, 1, 2)]


@pytest.mark.parametrize(("rows", "classes", "chunk"), CUTS)
def test_blocks_of_any_size(path: Path, rows: int, classes: int, chunk: int | None) -> None:
    inputs = layer(rows, 3, classes, torch.float64, path.device)
    kept = ro.Retained("x", logits=ro.Stats("amax", "mean", over="channels", grad=True))
    ours = with_gradients(linear_cross_entropy, *inputs, chunk=chunk, retain=kept)
    torch.testing.assert_close(ours, with_gradients(pair, *inputs))
    linear_cross_entropy(*inputs, chunk=chunk, retain=kept).backward()
    z = F.linear(inputs[0], inputs[1], inputs[3]).detach().requires_grad_()
    F.cross_entropy(z, inputs[2]).backward()
    torch.testing.assert_close(kept.logits.grad, z.grad)
    torch.testing.assert_close(kept.logits.amax, z.grad.abs().amax(0))
    torch.testing.assert_close(kept.logits.mean, z.grad.mean(0))
    assert torch.equal(kept.x.grad, inputs[0].grad)


def test_blocks_are_cut_along_the_longer_side() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert Cut.of(1024, 8192, 131072, cpu) == (8192, 16384)
    assert Cut.of(1024, 8192, 1000, cpu) == (1024, 1000)
    assert Cut.of(4096, 2048, 131072, cpu) == (4096, 131072)
    assert Cut.of(None, 8192, 131072, gpu) == (8192, 16384)
    assert Cut.of(None, 8192, 131072, cpu) == (8192, 512)
    assert Cut.of(1, 5, 8, cpu) == (5, 1)
    for rows, classes, chunk in CUTS:
        cut = Cut.of(chunk, rows, classes, cpu)
        seen = torch.zeros(rows, classes)
        for block in cut.blocks(rows, classes):
            seen[block] += 1
            assert seen[block].numel() <= max(chunk or rows, 1) * classes
        assert (seen == 1).all()


@pytest.mark.parametrize("rows", [7, 90], ids=["cut by classes", "cut by rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_errors_are_no_larger_than_eagers(path: Path, dtype: torch.dtype, rows: int) -> None:
    inputs = layer(rows, 16, 80, dtype, path.device)
    exact = with_gradients(pair, *in_float64(inputs))
    ours = with_gradients(linear_cross_entropy, *inputs, chunk=rows // 3)
    for got, theirs, want in zip(ours, with_gradients(pair, *inputs), exact, strict=True):
        one_ulp = torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= (theirs - want).abs().max() + one_ulp


@pytest.mark.parametrize("classes", [24, 2], ids=["cut by classes", "cut by rows"])
def test_gradients_are_added_up_in_float32(path: Path, classes: int) -> None:
    """24 blocks, of which the first adds 256 and each other one 0.5: in bfloat16 the sum would stay at 256."""
    long = torch.full((24, 1), 0.5, dtype=torch.bfloat16, device=path.device)
    long[0] = 256.0
    zeros, target = torch.zeros(classes, 1).to(long), torch.zeros(24, dtype=torch.int64, device=path.device)
    x, weight = (torch.zeros_like(long), long) if classes == 24 else (long, zeros)
    one = {"label_smoothing": 1.0, "z_loss": classes / (2 * math.log(classes))}  # where all logits are 0, dz is 1
    for t in (x, weight):
        t.requires_grad_()
    y = linear_cross_entropy(x, weight, target, reduction="sum", chunk=1, **one)
    (added,) = torch.autograd.grad(y, x if classes == 24 else weight)
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(added, torch.full_like(added, 267.5), rtol=2**-8, atol=0)


def test_logits_of_forward_and_backward_are_the_same_bits(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    logits = _blocks.Layer.logits

    def recorded(self: _blocks.Layer) -> torch.Tensor:
        made.append(logits(self).clone())
        return logits(self)

    monkeypatch.setattr(_blocks.Layer, "logits", recorded)
    for rows, classes in ((7, 80), (80, 7)):
        made.clear()
        inputs = layer(rows, 16, classes, torch.float32, kernels.device)
        linear_cross_entropy(*inputs, chunk=3).backward()
        half = len(made) // 2
        assert half > 1
        assert all(torch.equal(a, b) for a, b in zip(made[:half], made[half:], strict=True))


def test_large_numbers_in_all_logits(path: Path) -> None:
    x, weight, target, _ = layer(4, 3, 50, torch.float32, path.device)
    bias = torch.full((50,), 1000.0, device=path.device, requires_grad=True)
    options = {"label_smoothing": 0.3, "chunk": 1}
    ours = with_gradients(linear_cross_entropy, x, weight, target, bias, **options)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wide = with_gradients(pair, *exact, target, bias.detach().double().requires_grad_(), label_smoothing=0.3)
    theirs = with_gradients(pair, x, weight, target, bias, label_smoothing=0.3)
    for got, eagers, want in zip(ours, theirs, wide, strict=True):
        # The products' own rounding at 1000 is 6e-5; a loss made of larger numbers would be off by more.
        assert (got - want).abs().max() <= (eagers - want).abs().max() + 6e-5 * want.abs().max()


@pytest.mark.parametrize("index", [30, -1, 2**40])
def test_targets_out_of_range_are_nan_on_a_gpu(kernels: Path, index: int) -> None:
    x, weight, target, bias = layer(4, 3, 30, torch.float32, kernels.device)
    target[1] = index
    y = linear_cross_entropy(x, weight, target, bias, reduction="none", chunk=1)
    assert y.isnan().tolist() == [False, True, False, False]
    y.sum().backward()
    assert x.grad.isnan().all(-1).tolist() == [False, True, False, False]


def test_targets_out_of_range_are_an_error_on_the_host() -> None:
    x, weight, target, bias = layer(4, 3, 30, torch.float32, "cpu")
    target[1] = 30
    with pytest.raises(IndexError, match="linear_cross_entropy: Target 30 is out of bounds"):
        linear_cross_entropy(x, weight, target, bias)


@pytest.mark.parametrize("rows", [6, 12], ids=["cut by classes", "cut by rows"])
def test_mixed_dtypes_under_autocast(path: Path, rows: int) -> None:
    x, weight, target, bias = layer(rows, 4, 9, torch.float32, path.device)
    found = []
    for loss in (lambda *i: linear_cross_entropy(*i, chunk=2), pair):
        with torch.autocast(path.device, torch.bfloat16):
            y = loss(x.bfloat16(), weight, target, bias)
        assert y.dtype == torch.float32
        found.append(torch.autograd.grad(y, [x, weight, bias]))
        assert [g.dtype for g in found[-1]] == [torch.float32] * 3
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.01 * want.abs().max().item())


def test_a_layer_of_no_width(path: Path) -> None:
    x, weight, target, bias = layer(4, 0, 9, torch.float32, path.device)
    torch.testing.assert_close(
        with_gradients(linear_cross_entropy, x, weight, target, bias, chunk=1),
        with_gradients(pair, x, weight, target, bias),
    )


# Memory.


def peak(step: Callable[[], Any]) -> int:
    """The most bytes that are alive at once of what PyTorch's allocator of the CPU hands out."""
    with torch.autograd.profiler.profile(profile_memory=True) as found:
        step()
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.filterwarnings("ignore")  # what the compiler says of the machine is not ours
@pytest.mark.skipif(GPU, reason="reads the allocator of a CPU")
@pytest.mark.parametrize("classes", [4096, 256], ids=["cut by classes", "cut by rows"])
def test_peak_memory_is_that_of_a_block(classes: int) -> None:
    """In units of the logits: eager holds three of them at its peak, and a block is 1/64 of one."""
    rows = 2**20 // classes
    x, weight, target, _ = layer(rows, 1, classes, torch.float32, "cpu")

    def ours(retain: ro.Retained | None = None) -> torch.Tensor:
        return linear_cross_entropy(x, weight, target, chunk=rows // 64, retain=retain)

    statistics = ro.Retained(logits=ro.Stats("l2", "amax", over="rows"))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "eager": lambda: pair(x, weight, target),
        "ours": ours,
        "statistics": lambda: ours(statistics),
        "compiled": torch.compile(ours, fullgraph=True, backend="aot_eager_decomp_partition"),  # as Inductor cuts it up
    }
    found = {}
    for name, loss in ways.items():
        loss().backward()  # loads and compiles what there is
        found[name] = peak(lambda loss=loss: loss().backward()) / (4 * rows * classes)
    assert found["eager"] > 2.9
    assert max(found["ours"], found["compiled"]) < 0.1, found
    assert found["statistics"] < 0.15, found


@pytest.mark.skipif(GPU, reason="looks at the path of a CPU")
@pytest.mark.parametrize("rows", [7, 40], ids=["cut by classes", "cut by rows"])
def test_second_derivatives_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Whose logits exist as a whole; those of the first ones do not."""
    largest, linear = [0], F.linear

    def watched(x: torch.Tensor, *others: Any) -> torch.Tensor:
        y = linear(x, *others)
        if not x.is_meta:  # shapes and dtypes are found there
            largest[0] = max(largest[0], y.numel())
        return y

    monkeypatch.setattr(F, "linear", watched)
    inputs = layer(rows, 3, 30, torch.float32, "cpu")
    linear_cross_entropy(*inputs, chunk=2).backward()
    assert largest[0] == (rows * (2 * 30 // rows) if rows == 7 else 2 * 30)
    torch.autograd.grad(linear_cross_entropy(*inputs, chunk=2), inputs[0], create_graph=True)
    assert largest[0] == rows * 30


# Compiled code; the same for both losses is in tests/test_class_losses_requests.py.


@pytest.mark.filterwarnings("ignore")  # what the compiler says of the machine is not ours
def test_compiled_code_runs_the_kernels(kernels: Path) -> None:
    x, weight, target, bias = layer(6, 4, 40, torch.float32, kernels.device)
    kept = ro.Retained("logits")
    torch._dynamo.reset()
    step = torch.compile(
        lambda x: linear_cross_entropy(x, weight, target, bias, chunk=3, retain=kept),
        fullgraph=True,
        backend="aot_eager",
    )
    ours = with_gradients(step, x)
    torch.testing.assert_close(ours, with_gradients(pair, x, weight, target, bias)[:2])
    if not GPU:
        from retainops.testing import simulated_gpu

        with simulated_gpu(compiles=False) as launches:
            step(x).backward()
        names = [launch.name for launch in launches]
        assert names == 2 * ["cross_entropy_fwd_kernel"] + 2 * ["cross_entropy_bwd_kernel"]
        z = F.linear(x, weight, bias).detach().requires_grad_()
        F.cross_entropy(z, target).backward()
        assert_near(kept.logits.grad, z.grad, 4)


def test_operators_are_what_torch_expects_of_them() -> None:
    x, weight, target, bias = (t.detach() for t in layer(6, 4, 9, torch.float32, "cpu"))
    fixed = (None, -100, 0.1, 1e-3, 5.0, 2, torch.float32)
    checks = ("test_schema", "test_faketensor")
    inputs = (x, weight, target, bias, *fixed)
    torch.library.opcheck(torch.ops.retainops.linear_cross_entropy_forward, inputs, test_utils=checks)
    rows = torch.ops.retainops.linear_cross_entropy_forward(*inputs)[1:]
    for request in (
        (False, "", "tensor"),
        (True, "l2 mean amax act_grad nonfinite", "rows"),
        (True, "hist l2", "tensor"),
    ):
        more = (*rows, torch.ones(6, 1), [True, False, True], *request, [2, 3])
        torch.library.opcheck(torch.ops.retainops.linear_cross_entropy_backward, (*inputs, *more), test_utils=checks)


# Refusals.

X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
REFUSED = [
    (([1.0], W, T), {}, TypeError, "x is list; expected a torch.Tensor"),
    ((X, W.long(), T), {}, TypeError, "weight is torch.int64; expected a floating-point dtype"),
    ((X, W.T, T), {}, RuntimeError, r"x has shape \(3, 4\) and weight \(4, 5\); expected \(..., H\) and \(V, H\)"),
    ((X, W[0], T), {}, RuntimeError, r"x has shape \(3, 4\) and weight \(4,\)"),
    ((X, W[:0], T), {}, RuntimeError, r"x has shape \(3, 4\) and weight \(0, 4\); .* with V above 0"),
    ((X, W.double(), T), {}, RuntimeError, r"weight is torch.float64 and x torch.float32; expected one dtype: use .to"),
    ((X, W.to("meta"), T), {}, RuntimeError, "weight is on meta; expected cpu"),
    ((X, W, T[:2]), {}, RuntimeError, r"target has shape \(2,\); expected \(3,\), since x has shape \(3, 4\)"),
    ((X, W, T.float()), {}, TypeError, "target is torch.float32; expected class indices"),
    ((X, W, T), {"bias": X[0]}, RuntimeError, r"bias has shape \(4,\); expected \(5,\), since there are 5 classes"),
    ((X, W, T), {"bias": 1.0}, TypeError, "bias is float; expected a torch.Tensor"),
    ((X, W, T), {"class_weight": X[0]}, RuntimeError, r"class_weight has shape \(4,\); expected \(5,\)"),
    ((X, W, T), {"chunk": 0}, ValueError, "chunk is 0; expected a number of rows, 1 or more, or None"),
    ((X, W, T), {"chunk": 2.0}, ValueError, "chunk is 2.0"),
    ((X, W, T), {"reduction": None}, ValueError, "reduction is None; expected one of none, mean, sum"),
    ((X, W, T), {"softcap": -1}, ValueError, "softcap is -1"),
    ((X, W, T), {"retain": ro.Retained("p")}, KeyError, "unknown point 'p'; its points are: x, logits"),
    ((X, W, T), {"retain": ro.Retained("logits")}, RuntimeError, "can't retain_grad on point 'logits'"),
    ((X, W.clone().requires_grad_(), T), {"retain": ro.Retained("x")}, RuntimeError, "can't retain_grad on point 'x'"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "says"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refusals_say_what_was_expected(inputs: tuple, options: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"linear_cross_entropy: {says}"):
        linear_cross_entropy(*inputs, **options)
