"""group_norm: the definition, layouts without copies, and groups of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import retainops as ro
from retainops.ops.group_norm import GROUP_NORM, group_norm
from retainops.testing import check_op
from tests.conftest import GPU, Path
from tests.group_norm_cases import CHANNELS_LAST, compare, drawn, inputs_of
from tests.norm_cases import launched
from tests.oracle import DTYPES, all_points, assert_near, clones, eager, leaves, random_like


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_kernel_has_thousands_of_instructions(dtype: torch.dtype) -> None:
    """As one had that summed a mask to count: every thread added all 4096 elements of its program's tile."""
    pytest.importorskip("triton")
    from retainops.testing import static_report

    x = torch.empty(4, 64, 4096, dtype=dtype, requires_grad=True)
    w, b = (torch.empty(64, dtype=dtype, requires_grad=True) for _ in "wb")
    for report in static_report(lambda: group_norm(x, 32, w, b).sum().backward()):
        assert report.instructions < 1200, str(report)


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


@pytest.mark.parametrize("shape", [(2, 6, 7, 11), (1, 6, 33_001), (2, 8, 33, 33)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST], ids=str)
def test_of_groups_of_equal_values_nothing_is_left(shape: tuple, memory_format: Any, path: Path) -> None:
    """As of rows in tests/test_norm.py."""
    if memory_format is CHANNELS_LAST and len(shape) < 4:
        shape = (*shape, 1)
    x = torch.full(shape, 12345.678, device=path.device).contiguous(memory_format=memory_format).requires_grad_()
    w = torch.ones(shape[1], device=path.device, requires_grad=True)
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
    "batch, channels, time": torch.empty(3, 64, 512),
    "batch, time, channels": torch.empty(3, 512, 64).permute(0, 2, 1),
    "time, batch, channels": torch.empty(512, 3, 64).permute(1, 2, 0),
    "time, every second of a batch, channels": torch.empty(512, 6, 64)[:, ::2].permute(1, 2, 0),
}


@pytest.mark.parametrize("x", ORDERS.values(), ids=ORDERS)
def test_shares_are_few_in_any_order_of_the_dims(x: torch.Tensor) -> None:
    """One for each channel and 128 or more positions: never a buffer of the size of x."""
    x = x.detach().requires_grad_()
    launches = launched(lambda: group_norm(x, 1).backward(x.detach()))
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
@pytest.mark.parametrize("positions", [16, 64], ids=["by shares", "by tiles"])
def test_offsets_beyond_two_to_the_31st(positions: int) -> None:
    """Of the last group, in memory that has addresses and no pages."""
    from retainops.testing import simulated_gpu

    one = inputs_of(drawn(1, 4, positions, dtype=torch.bfloat16), 2)
    batch = 2**31 // (4 * positions) + 2
    x = torch.empty(batch, 4, positions, dtype=torch.bfloat16)
    x[-1] = one[0].detach()[0]
    with simulated_gpu(programs=[-1], check=False):
        y = group_norm(x.requires_grad_(), *one[1:])
        dy = random_like(y[:1])
        (dx,) = torch.autograd.grad(y, x, dy.expand(y.shape))
    want, _ = eager(GROUP_NORM, one)
    want.backward(dy)
    for a, b in ((y, want), (dx, one[0].grad)):
        assert_near(a[-1:, 2:], b[:, 2:], 4)
