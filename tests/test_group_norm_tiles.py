"""group_norm of groups that are one tile each, and when they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops.group_norm import group_norm
from retainops.testing import simulated_gpu, static_report
from tests.conftest import Path
from tests.group_norm_cases import CHANNELS_LAST, compare, drawn, inputs_of
from tests.norm_cases import launched
from tests.oracle import random_like

TILES, SHARES = ("tile_fwd",), ("moments", "gather", "fwd")
TILES_BACK, SHARES_BACK = ("tile_bwd",), ("sums", "project", "bwd")


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 20, 8, 8), 2),  # fewer channels than a tile has rows
        ((3, 8, 64), 4),  # as many, and no masks
        ((2, 3, 50), 1),
        ((2, 3, 150), 3),  # each channel a group
        ((2, 64, 2, 2, 4), 1),
        ((1, 4, 4096), 2),  # as large as it gets
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(shape: tuple[int, ...], groups: int, dtype: torch.dtype, kernels: Path) -> None:
    assert kernels_of(drawn(*shape, dtype=dtype), groups) == (*TILES, *TILES_BACK)
    compare(*inputs_of(drawn(*shape, dtype=dtype, device=kernels.device), groups), scale=2)


def kernels_of(
    x: torch.Tensor, groups: int, dy: Callable = torch.empty_like, kept: ro.Retained | None = None
) -> tuple[str, ...]:
    def call() -> None:
        y = group_norm(x.detach().requires_grad_(), groups, retain=kept)
        y.backward(dy(y))

    return tuple(name.removeprefix("group_norm_").removesuffix("_kernel") for name, *_ in launched(call))


def test_which_groups_are_tiles() -> None:
    """Those that lie side by side in memory and that registers hold."""
    x = torch.empty(2, 8, 16, 16)
    assert kernels_of(x, 4) == (*TILES, *TILES_BACK)
    assert kernels_of(x[:, ::2], 2) == (*TILES, *TILES_BACK)
    assert kernels_of(x.contiguous(memory_format=CHANNELS_LAST), 4) == (*SHARES, *SHARES_BACK)
    assert kernels_of(x[..., ::2, ::2], 1) == (*SHARES, *SHARES_BACK)
    assert kernels_of(x.mT, 4) == (*SHARES, *SHARES_BACK)
    assert kernels_of(x[:1, :1].expand(x.shape), 4) == (*TILES, *TILES_BACK)
    assert kernels_of(x[..., :1].expand(x.shape), 4) == (*SHARES, *SHARES_BACK)


@pytest.mark.parametrize(
    ("channels", "positions", "dtype", "which"),
    [
        (1, 64, torch.float32, (*SHARES, *SHARES_BACK)),  # too small
        (33, 65, torch.float32, (*SHARES, *SHARES_BACK)),  # 64 x 128 lanes: nearly four for each element
        (2, 8192, torch.float32, (*TILES, *SHARES_BACK)),
        (4, 8192, torch.float32, (*SHARES, *SHARES_BACK)),
        (2, 4096, torch.float64, (*TILES, *SHARES_BACK)),
        (1, 8190, torch.float32, (*TILES, *SHARES_BACK)),  # accesses are not 128 bits wide
    ],
    ids=str,
)
def test_which_groups_fit(channels: int, positions: int, dtype: torch.dtype, which: tuple[str, ...]) -> None:
    assert kernels_of(torch.empty(2, channels, positions, dtype=dtype), 1) == which


def test_forward_by_tiles_and_backward_by_shares(kernels: Path) -> None:
    """Backward finds the moments that it needs, whichever way forward went."""
    compare(*inputs_of(drawn(1, 2, 8192, device=kernels.device), 1), scale=2)

    def turned(y: torch.Tensor) -> torch.Tensor:
        return random_like(y).mT.contiguous().mT

    assert kernels_of(torch.empty(2, 8, 10, 12), 2, turned) == (*TILES, *SHARES_BACK)
    compare(*inputs_of(drawn(2, 8, 10, 12, device=kernels.device), 2), scale=4, dy=turned)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (1, 8, 1, 1), (2, 1, 10, 10)], ids=str)
def test_gradients_that_are_expanded(size: tuple[int, ...], kernels: Path) -> None:
    def expanded(y: torch.Tensor) -> torch.Tensor:
        return drawn(*size, device=y.device.type).detach().expand(y.shape)

    assert kernels_of(torch.empty(2, 8, 10, 10), 2, expanded) == (*TILES, *TILES_BACK)
    compare(*inputs_of(drawn(2, 8, 10, 10, device=kernels.device), 2), scale=4, dy=expanded)


def test_points_that_lie_otherwise_take_a_launch_of_their_own() -> None:
    """A launch cannot walk over them in the tiles of the gradients; and the gradients keep each bit of theirs."""
    image, sequence = torch.empty(2, 8, 16, 16), torch.empty(2, 8, 256)
    for x, want, apart in (
        (image, None, False),
        (image, ro.Stats("l2"), False),
        (image, ro.Stats("l2", over="rows"), True),
        (sequence, ro.Stats("l2", over="rows"), False),
        (sequence, ro.Stats("l2", over="channels"), False),
        (image, ro.Into(torch.empty(image.shape)), False),
        (image, ro.Into(torch.empty(image.shape).mT), True),
    ):
        kept = ro.Retained("xhat") if want is None else ro.Retained(xhat=want)
        assert kernels_of(x, 4, kept=kept) == (*TILES, *TILES_BACK, *(("bwd",) if apart else ()))


@pytest.mark.parametrize("over", ["rows", "channels"])
def test_statistics_of_sequences(over: Any, kernels: Path) -> None:
    """Whose rows are walked with the gradients."""
    want, found = (ro.Retained(xhat=ro.Stats("l2", "amax", "act_grad", over=over)) for _ in "ab")
    for kept, backend in ((want, "reference"), (found, "triton")):
        with ro.backend(backend):
            y = group_norm(*inputs_of(drawn(2, 6, 100, device=kernels.device), 2), retain=kept)
        y.backward(random_like(y))
    for name in ("l2", "amax", "act_grad"):
        torch.testing.assert_close(getattr(found.xhat, name), getattr(want.xhat, name), rtol=1e-4, atol=1e-4)


def test_what_is_asked_for_changes_no_bit_of_the_compiled_codes_results() -> None:
    """As of norms over rows, in tests/test_norm_machine_code.py."""
    runs = []
    with simulated_gpu(engine="ptx"):
        for kept in (None, ro.Retained("xhat"), ro.Retained(xhat=ro.Stats("l2", "amax", "act_grad", grad=True))):
            x, *others = inputs_of(drawn(2, 6, 100), 2)
            y = group_norm(x, *others, retain=kept)
            runs.append([y, *torch.autograd.grad(y, [x, *others[1:3]], random_like(y))])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_machine_code(dtype: torch.dtype) -> None:
    """Each tensor is read once, 128 bits at a time, nothing spills, and a point is one store more."""
    x = torch.empty(2, 64, 64, 64, dtype=dtype, requires_grad=True)
    w, b = (torch.empty(64, dtype=dtype, requires_grad=True) for _ in "wb")

    def call(kept: ro.Retained | None) -> None:
        y = group_norm(x, 32, w, b, retain=kept)
        torch.autograd.grad(y, (x, w, b), torch.empty_like(y))

    forward, plain = static_report(lambda: call(None))
    full, stats = (
        static_report(lambda kept=kept: call(kept))[1]
        for kept in (ro.Retained("xhat"), ro.Retained(xhat=ro.Stats("l2", "amax", "act_grad")))
    )
    once = 8192 * dtype.itemsize // 16 // (32 * forward.num_warps)
    for report, read, written in ((forward, 1, 1), (plain, 2, 1), (full, 2, 1 + 4 // dtype.itemsize), (stats, 2, 1)):
        assert report.spill_stores == report.spill_loads == 0, str(report)
        assert report.whole_tile["LDG.128"] == read * once, str(report)
        assert report.whole_tile["STG.128"] == written * once, str(report)


@pytest.mark.parametrize(
    ("shape", "dtype", "target"),
    [
        ((80, 16, 16), torch.bfloat16, "sm_90"),
        ((40, 16, 16), torch.float32, "sm_90"),
        ((128, 7, 7), torch.bfloat16, "sm_120"),
    ],
    ids=str,
)
def test_the_largest_tiles_do_not_spill(shape: tuple[int, ...], dtype: torch.dtype, target: str) -> None:
    """Of channels and positions that are no powers of two, where masks take registers, with most asked for."""
    x, _, w, b, _ = inputs_of(torch.empty(2, *shape, dtype=dtype), 2)

    def call() -> None:
        y = group_norm(x, 2, w, b, retain=ro.Retained(xhat=ro.Stats("l2", "amax", "act_grad", grad=True)))
        torch.autograd.grad(y, (x, w, b), torch.empty_like(y))

    for report in static_report(call, target):
        assert report.spill_stores == report.spill_loads == 0, str(report)
