"""group_norm: layouts without copies, groups of any size, and what autograd and statistics expect."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.group_norm import GROUP_NORM, group_norm
from retainops.points import unretained
from retainops.testing import check_op
from tests.conftest import GPU, Path
from tests.norm_cases import launched
from tests.oracle import DTYPES, all_points, assert_near, clones, eager, leaves, random_like

CHANNELS_LAST = torch.channels_last


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def inputs_of(x: torch.Tensor, groups: int) -> list[Any]:
    w, b = (drawn(x.shape[1], dtype=x.dtype, device=x.device.type, seed=s) for s in (4, 5))
    return [x.detach().requires_grad_(), groups, w, b, 1e-3]


def compare(*ours: Any, scale: float = 1.0, dy: Callable[[torch.Tensor], torch.Tensor] = random_like) -> None:
    """Output, gradients and retained gradient are eager's, and lie as they do in eager."""
    theirs, kept = clones(ours), all_points(GROUP_NORM)
    y = group_norm(*ours, retain=kept)
    want, values = eager(GROUP_NORM, theirs)
    assert_near(y, want, 4 * scale)
    assert y.stride() == want.stride()
    y.backward(dy(y))
    want.backward(dy(y))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 8 * scale)
    assert_near(kept.xhat.grad, values["xhat"].grad, 4 * scale)


def test_numbers_of_numpy(path: Path) -> None:
    x, groups, *others, eps = inputs_of(drawn(2, 6, 5, device=path.device), 3)
    compare(x, np.int64(groups), *others, np.float32(eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_is_pytorchs(path: Path, dtype: torch.dtype) -> None:
    x, groups, w, b, eps = inputs_of(drawn(2, 6, 5, 3, dtype=dtype, device=path.device), 3)
    for weights in ((w, b), (w, None), (None, None)):
        y, want = group_norm(x, groups, *weights, eps), F.group_norm(x, groups, *weights, eps)
        assert_near(y, want, 2)
        given = [x, *(t for t in weights if t is not None)]
        dy = random_like(y)
        for a, b in zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(want, given, dy), strict=True):
            assert_near(a, b, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_error_is_no_larger_than_eagers(dtype: torch.dtype, memory_format: Any, kernels: Path) -> None:
    x = drawn(2, 6, 7, 9, dtype=dtype, device=kernels.device).detach().contiguous(memory_format=memory_format)
    assert_no_less_accurate(x, 2)


def assert_no_less_accurate(x: torch.Tensor, groups: int) -> None:
    """Than eager. Weights have the shape in which they broadcast: so `check_op` knows that their gradients are sums."""
    _, _, *weights, eps = inputs_of(x, groups)

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, retain: ro.Retained | None = None) -> torch.Tensor:
        return group_norm(x, groups, w.flatten(), b.flatten(), eps, retain=retain)

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, point: Callable) -> torch.Tensor:
        seen = {}

        def kept(name: str, value: torch.Tensor) -> torch.Tensor:
            return seen.setdefault(name, point(name, value))

        GROUP_NORM.reference(x, groups, None, None, eps, kept)
        return (seen["xhat"] * w.to(seen["xhat"].dtype) + b.to(seen["xhat"].dtype)).to(x.dtype)

    report = check_op(ours, x, *(w.detach().view(-1, 1, 1) for w in weights), reference=theirs)
    assert report.ok, report


def test_a_mean_far_above_the_deviation(kernels: Path) -> None:
    """The sum of squares is taken around the mean of each share, and shares are put together by their distances."""
    x = drawn(1, 4, 100, 50, device=kernels.device).detach() + 3e4
    x[:, 1] += 3e3  # a channel that is unlike the other one of its group
    assert_no_less_accurate(x, 2)


# Shapes and layouts.


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, 8), 4),  # nothing but channels: a group is D elements
        ((2, 1, 50), 1),  # one channel: instance and layer norm at once
        ((1, 5, 1), 1),
        ((4, 6, 1), 2),
        ((2, 6, 10), 6),  # each channel a group
        ((3, 4, 1), 4),  # each element a group
        ((3, 4, 2, 3, 4), 2),
        ((1, 4, 5000), 2),  # several shares along a channel, the last one ragged
        ((2, 130, 3), 13),  # more channels than a tile has rows
        ((1, 1100, 2), 1),  # more shares than a program adds up at a time
    ],
    ids=str,
)
def test_shapes(shape: tuple[int, ...], groups: int, kernels: Path) -> None:
    compare(*inputs_of(drawn(*shape, device=kernels.device), groups))


def views(device: str) -> dict[str, torch.Tensor]:
    base = drawn(3, 6, 8, 10, device=device).detach()
    sequence = drawn(9, 3, 6, device=device).detach()
    return {
        "channels last": base.contiguous(memory_format=CHANNELS_LAST),
        "channels last, several shares": drawn(1, 6, 20, 10, device=device).detach().to(memory_format=CHANNELS_LAST),
        "time, batch, channels": sequence.permute(1, 2, 0),
        "batch, time, channels": sequence.transpose(1, 2),
        "height and width swapped": base.mT,
        "every second pixel": base[:, :, ::2, ::2],
        "every second channel": base[:, ::2],
        "offset": base.flatten()[1 : 1 + 2 * 6 * 20].view(2, 6, 20),
        "one pixel, expanded": base[:, :, :1, :1].expand(3, 6, 4, 5),
        "one channel, expanded": base[:, :1].expand(3, 6, 8, 10),
        "one batch, expanded": base[:1].expand(3, 6, 8, 10),
    }


@pytest.mark.parametrize("layout", views("cpu"))
def test_layouts_of_the_input(layout: str, kernels: Path) -> None:
    x = views(kernels.device)[layout]
    *given, _ = inputs_of(x, 3)
    compare(*given, 0.5, scale=2)  # a large eps: of equal numbers only rounding errors are left


@pytest.mark.parametrize("shape", [(2, 6, 7, 11), (1, 4, 40_001), (2, 8, 33, 33)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_of_groups_of_equal_values_nothing_is_left(shape: tuple, memory_format: Any, kernels: Path) -> None:
    """As of rows in tests/test_norm.py."""
    if memory_format is CHANNELS_LAST and len(shape) < 4:
        shape = (*shape, 1)
    x = torch.full(shape, 12345.678, device=kernels.device).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.ones(shape[1], device=kernels.device, requires_grad=True)
    y = group_norm(x, 2, w)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-5)
    for got in torch.autograd.grad(y.sum(), (x, w)):
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=2e-4 * shape[0])


def test_a_group_of_equal_values_changes_no_bit_of_its_neighbours(kernels: Path) -> None:
    x = drawn(1, 8, 64, device=kernels.device).detach()
    equal = x.clone()
    equal[:, 2:4] = 7.3
    y, beside = group_norm(x, 4), group_norm(equal, 4)
    assert torch.equal(y[:, [0, 1, 4, 5, 6, 7]], beside[:, [0, 1, 4, 5, 6, 7]])
    assert beside[:, 2:4].abs().max() < 1e-5


ORDERS = {
    "batch, channels, time": torch.empty(3, 64, 256),
    "batch, time, channels": torch.empty(3, 256, 64).permute(0, 2, 1),
    "time, batch, channels": torch.empty(256, 3, 64).permute(1, 2, 0),
    "time, every second of a batch, channels": torch.empty(256, 6, 64)[:, ::2].permute(1, 2, 0),
}


@pytest.mark.parametrize("x", ORDERS.values(), ids=ORDERS)
def test_shares_are_few_in_any_order_of_the_dims(x: torch.Tensor) -> None:
    """One for each channel and 128 or more positions: never a buffer of the size of x."""
    x = x.detach().requires_grad_()
    launches = launched(lambda: group_norm(x, 4).backward(x.detach()))
    shares = [
        given[name].ptr for _, _, given in launches for name in ("COUNT", "DW") if hasattr(given.get(name), "ptr")
    ]
    assert [t.numel() <= x.numel() // 128 for t in shares] == [True, True]


GRADIENTS = {
    "one number": lambda y: y.new_tensor(0.5).expand(y.shape),
    "one a channel": lambda y: random_like(y[:1, :, :1, :1]).expand(y.shape),
    "one a pixel": lambda y: random_like(y[:, :1]).expand(y.shape),
    "contiguous": lambda y: random_like(y).contiguous(),
    "channels last": lambda y: random_like(y).contiguous(memory_format=CHANNELS_LAST),
    "height and width swapped": lambda y: random_like(y).mT.contiguous().mT,
}


@pytest.mark.parametrize("dy", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_gradients_of_any_layout(dy: Callable, memory_format: Any, kernels: Path) -> None:
    x = drawn(3, 6, 8, 10, device=kernels.device).detach().contiguous(memory_format=memory_format)
    compare(*inputs_of(x, 3), scale=4, dy=dy)


def test_weights_of_another_dtype_and_layout(kernels: Path) -> None:
    x = drawn(2, 6, 5, 5, dtype=torch.bfloat16, device=kernels.device)
    w, b = (drawn(6, 2, device=kernels.device, seed=s).detach()[:, 0].requires_grad_() for s in (4, 5))
    compare(x, 2, w, b, 1e-3)
    compare(drawn(2, 6, 5, 5, device=kernels.device), 2, None, drawn(6, device=kernels.device, seed=4), 1e-3)


@pytest.mark.parametrize("shape", [(0, 6, 5), (2, 6, 0), (2, 6, 0, 3)], ids=str)
def test_no_elements(shape: tuple[int, ...], path: Path) -> None:
    ours, kept = inputs_of(drawn(*shape, device=path.device), 3), all_points(GROUP_NORM)
    y = group_norm(*ours, retain=kept)
    y.sum().backward()
    assert [t.grad.shape for t in leaves(ours)] == [torch.Size(shape), (6,), (6,)]
    assert not any(t.grad.any() for t in leaves(ours))
    assert y.shape == kept.xhat.grad.shape == shape


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_nan_and_inf_stay_in_their_groups(memory_format: Any, path: Path) -> None:
    x = drawn(3, 6, 4, 4, device=path.device).detach().contiguous(memory_format=memory_format)
    inf, nan = torch.inf, torch.nan
    x[0, 0, 1, 2], x[0, 2, 0, 0], x[0, 4:], x[1, :2], x[1, 2:4] = nan, -inf, 1e30, 2.0, 0.0
    ours, kept = inputs_of(x, 3), all_points(GROUP_NORM)
    theirs = clones(ours)
    y = group_norm(*ours, retain=kept)
    want, values = eager(GROUP_NORM, theirs)
    assert torch.equal(y.isnan(), want.isnan())
    torch.testing.assert_close(y[1:], want[1:], rtol=1e-4, atol=1e-4)
    y.backward(random_like(y))
    want.backward(random_like(y))
    for a, b in zip([*leaves(ours), kept.xhat], [*leaves(theirs), values["xhat"]], strict=True):
        assert torch.equal(a.grad.isnan(), b.grad.isnan())


@pytest.mark.skipif(GPU, reason="runs only the last program, which a GPU cannot")
def test_offsets_beyond_two_to_the_31st() -> None:
    """Of the last group, in memory that has addresses and no pages."""
    from retainops.testing import simulated_gpu

    one = inputs_of(drawn(1, 4, 16, dtype=torch.bfloat16), 2)
    batch = 2**31 // 64 + 2
    x = torch.empty(batch, 4, 16, dtype=torch.bfloat16)
    x[-1] = one[0].detach()[0]
    with simulated_gpu(programs=[-1], check=False):
        y = group_norm(x.requires_grad_(), *one[1:])
        dy = random_like(y[:1])
        (dx,) = torch.autograd.grad(y, x, dy.expand(y.shape))
    want, _ = eager(GROUP_NORM, one)
    want.backward(dy)
    for a, b in ((y, want), (dx, one[0].grad)):
        assert_near(a[-1:, 2:], b[:, 2:], 4)


# What autograd, torch.compile, statistics and buffers expect.


def image(path: Path, dtype: torch.dtype = torch.float32) -> list[Any]:
    x = drawn(2, 6, 20, 10, dtype=dtype, device=path.device).detach()
    return inputs_of(x.contiguous(memory_format=CHANNELS_LAST), 3)


def test_retention_changes_no_bit_and_two_runs_are_equal(kernels: Path) -> None:
    runs = []
    stats = (ro.Retained(xhat=ro.Stats("l2", "act_grad", over=over, grad=True)) for over in ("tensor", "channels"))
    for kept in (None, None, ro.Retained("xhat"), *stats):
        ours = image(kernels, torch.bfloat16)
        y = group_norm(*ours, retain=kept)
        runs.append([y, *torch.autograd.grad(y, leaves(ours), random_like(y))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_backward_again_and_nothing_written_over(path: Path) -> None:
    ours, kept, seen = image(path), all_points(GROUP_NORM), []
    before = [(t.detach().clone(), t._version) for t in leaves(ours)]
    y = group_norm(*ours, retain=kept)
    y.register_hook(seen.append)
    dy, held = random_like(y), y.detach().clone()
    (ours[0].detach() + y).backward(dy, retain_graph=True)
    first = [t.grad.clone() for t in (*leaves(ours), kept.xhat)]
    (y + ours[0].detach()).backward(dy)
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((*leaves(ours), kept.xhat), first, strict=True))
    assert all(torch.equal(t, value) and t._version == n for t, (value, n) in zip(leaves(ours), before, strict=True))
    assert torch.equal(y, held)
    assert all(torch.equal(g, random_like(y)) for g in (dy, *seen))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_gradients_that_nobody_needs(kernels: Path) -> None:
    for wanted in range(3):
        ours = image(kernels)
        theirs, kept = clones(ours), ro.Retained(xhat=ro.Stats("l2"))
        for given in (ours, theirs):
            for i, t in enumerate(leaves(given)):
                t.requires_grad_(i == wanted)
        y, want = group_norm(*ours, retain=None if wanted else kept), eager(GROUP_NORM, theirs)[0]
        y.backward(random_like(y))
        want.backward(random_like(y))
        (mine,), (eagers,) = leaves(ours), leaves(theirs)
        assert_near(mine.grad, eagers.grad, 8)
        assert (kept.xhat.l2 is None) == bool(wanted)  # of x alone has xhat a gradient


def test_first_and_second_derivatives_in_float64(kernels: Path) -> None:
    ours = inputs_of(drawn(1, 4, 2, dtype=torch.float64, device=kernels.device), 2)
    assert torch.autograd.gradcheck(group_norm, ours, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(group_norm, ours)


def test_torch_func_autocast_and_meta(path: Path) -> None:
    x, groups, *weights = (t.detach() if isinstance(t, torch.Tensor) else t for t in image(path))

    def f(op: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: (op(x, groups, *weights) ** 2).sum()

    def reference(*inputs: Any) -> torch.Tensor:
        return GROUP_NORM.reference(*inputs, unretained)

    torch.testing.assert_close(torch.func.grad(f(group_norm))(x), torch.func.grad(f(reference))(x))
    tangent = torch.func.jvp(f(group_norm), (x,), (x.flip(0),))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(f(reference), (x,), (x.flip(0),))[1])
    with torch.autocast(path.device, torch.bfloat16):
        assert group_norm(x.bfloat16(), groups, *weights).dtype == torch.bfloat16
    on_meta = group_norm(x.to("meta"), groups, *(t.to("meta") for t in weights[:2]))
    assert (on_meta.shape, on_meta.device.type) == (x.shape, "meta")


def test_compiled_with_retention() -> None:
    torch._dynamo.reset()
    step = torch.compile(lambda kept, *given: group_norm(*given, retain=kept), fullgraph=True, backend="aot_eager")
    ours, kept = image(Path("reference", "cpu")), all_points(GROUP_NORM)
    theirs = clones(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        y = step(kept, *ours)
        y.backward(random_like(y))
    want, values = eager(GROUP_NORM, theirs)
    want.backward(random_like(y))
    for a, b in zip([*leaves(ours), kept.xhat], [*leaves(theirs), values["xhat"]], strict=True):
        assert_near(a.grad, b.grad, 8)


@pytest.mark.parametrize("over", ["tensor", "rows", "channels"])
def test_statistics_are_those_of_the_gradient(over: str, kernels: Path) -> None:
    names = ("l2", "sum", "abs_sum", "amax", "mean", "nonfinite", "act_grad")
    want, found = (ro.Retained(xhat=ro.Stats(*names, over=over)) for _ in "ab")
    for kept, backend in ((want, "reference"), (found, "triton")):
        with ro.backend(backend):
            y = group_norm(*image(kernels), retain=kept)
        y.backward(random_like(y))
    for name in names:
        torch.testing.assert_close(getattr(found.xhat, name), getattr(want.xhat, name), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("accumulate", [False, True])
def test_into_a_buffer(accumulate: bool, kernels: Path) -> None:
    buffer = torch.ones(2, 6, 20, 10, device=kernels.device)
    into, kept = ro.Retained(xhat=ro.Into(buffer, accumulate=accumulate)), ro.Retained("xhat")
    for retain in (into, kept):
        y = group_norm(*image(kernels), retain=retain)
        y.backward(random_like(y))
    torch.testing.assert_close(buffer, kept.xhat.grad + accumulate)


# Bad input.

X, W = torch.ones(2, 6, 4), torch.ones(6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: group_norm([1.0], 2), TypeError, "group_norm: x is list; expected a torch.Tensor"),
        (lambda: group_norm(X, 2, 1.0), TypeError, "group_norm: weight is float; expected a torch.Tensor"),
        (lambda: group_norm(X, 2.0), TypeError, "group_norm: num_groups is float; expected an integer, such as 32"),
        (lambda: group_norm(X, 2, W, W, "1"), TypeError, "group_norm: eps is str; expected a number, such as 1e-5"),
        (lambda: group_norm(X, 2, W, W, 0.0), ValueError, "group_norm: eps is 0.0; expected a number above 0"),
        (lambda: group_norm(X.int(), 2), TypeError, r"x is torch.int32; expected a floating-point dtype: .*\.to\("),
        (lambda: group_norm(W, 2), RuntimeError, r"x has shape \(6,\); expected \(batch, channels, \.\.\.\)"),
        (
            lambda: group_norm(X, 4),
            RuntimeError,
            r"num_groups is 4, and x of shape \(2, 6, 4\) has 6 channels; .*divid",
        ),
        (lambda: group_norm(X, 0), RuntimeError, r"num_groups is 0.*expected a number that divides them"),
        (lambda: group_norm(X, 2, W[:4]), RuntimeError, r"weight has shape \(4,\); expected \(6,\), one for each chan"),
        (lambda: group_norm(X, 2, W, W.to("meta")), RuntimeError, r"bias is on meta and x on cpu; move one of them"),
        (lambda: group_norm(X, 2, retain=ro.Retained("c")), KeyError, "unknown point 'c'; its points are: xhat"),
    ],
    ids=range(12),
)
def test_errors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_kernel_has_thousands_of_instructions(dtype: torch.dtype) -> None:
    """As one had that summed a mask to count: every thread added all 4096 elements of its program's tile."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    x = torch.empty(4, 64, 4096, dtype=dtype, requires_grad=True)
    w, b = (torch.empty(64, dtype=dtype, requires_grad=True) for _ in "wb")
    for report in static_report(lambda: group_norm(x, 32, w, b).sum().backward()):
        assert report.instructions < 1200, str(report)
