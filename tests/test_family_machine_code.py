"""What the machine code of each elementwise op does: the bytes that it must move, 128 bits at a time, and no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.registry import find
from retainops.testing import static_report
from retainops.testing.driver import driver
from retainops.testing.static import KernelReport
from tests.oracle import FAMILY, OPS, all_points, leaves, sample, widening
from tests.triton_version import IS_OLDEST


def shape_of(name: str, aligned: bool) -> tuple[int, ...]:
    """Of an output that is a whole number of tiles, or not.

    Rows of a packed tensor are read from their middle on: if they were of an odd length, no wide access there would be
    aligned in memory, and Triton knows only of strides that divide by 16. So they are ragged in tiles alone.
    """
    if widening(name) > 1:
        return (5, 4096 if aligned else 4112)
    return (4096 if aligned else 4099,)


def call_of(name: str, shape: tuple[int, ...], dtype: torch.dtype, retain: bool) -> Callable[[], None]:
    op, inputs = find(name), sample(name, "cpu", dtype, shape)

    def call() -> None:
        y = op.call(*inputs, retain=all_points(op)) if retain else op.call(*inputs)
        torch.autograd.grad(y, leaves(inputs), torch.ones_like(y))

    return call


def assert_no_spills(*reports: KernelReport, known: int = 0) -> None:
    for report in reports:
        assert max(report.spill_stores, report.spill_loads) <= known, str(report)


def assert_moves(report: KernelReport, read: int, written: int) -> None:
    """A whole tile's accesses are all 128 bits wide, and as many as it takes to move these tensors of one size."""
    found = {access: n for access, n in report.whole_tile.items() if access.startswith(("LDG", "STG"))}
    found = {access: n for access, n in found.items() if not access.startswith("LDG.CONSTANT")}  # tables of sin and cos
    if report.name.startswith("bias_dropout_add"):
        assert found.pop("LDG.64") == 1, str(report)  # the seed
    a_tensor = found.get("STG.128", 0) / written
    assert a_tensor in (1, 2, 4), str(report)
    assert found == {"LDG.128": read * a_tensor, "STG.128": written * a_tensor}, str(report)


def moved(name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """How many tensors of the output's size the forward and the backward read and write, at the least."""
    inputs = sample(name, "cpu", shape=(1024,))
    tensors = sum(x.numel() for x in leaves(inputs)) // 1024
    forward, backward = (tensors, 1), (tensors + 1, tensors)
    if name.startswith("add_"):
        backward = 3, 1  # both inputs have one gradient
    elif name == "scale_shift":
        backward = 3, 2  # shift is not read, and its gradient is dy
    elif name == "bias_dropout_add":
        backward = 1, 1  # dy alone is read; x and bias have one gradient, and that of residual is dy
    fewest = tuple(round(n / 4096) for n in find(name).traffic(*inputs))
    assert (sum(forward), sum(backward), 1) == fewest  # the op says the same
    return forward, backward


KNOWN = (
    {
        ("mul_cos", "sm_90", torch.bfloat16): 12,
        ("mul_cos", "sm_100", torch.bfloat16): 12,
        **{(f"add_{f}", "sm_100", torch.bfloat16): 8 for f in ("tanh", "sigmoid", "softplus")},
    }
    if IS_OLDEST
    else {}
)
"""Bytes that are known to spill in the backward of ragged tensors, with each point retained.

The oldest Triton makes an address of 64 bits for each element that is read or written with a mask, and ptxas stops at
96 or 128 registers: of one or two it runs short. Later ones make one address for eight neighbours; add_tanh takes 68
registers by them, mul_cos 91 to 93.
"""


@pytest.mark.parametrize("name", FAMILY)
def test_only_what_must_move_moves_and_a_point_is_one_more_store(name: str) -> None:
    shape = shape_of(name, aligned=False)
    forward, off = static_report(call_of(name, shape, torch.bfloat16, retain=False))
    on = static_report(call_of(name, shape, torch.bfloat16, retain=True))[-1]
    assert_no_spills(forward, off)
    assert_no_spills(on, known=KNOWN.get((name, "sm_90", torch.bfloat16), 0))
    by_forward, (read, written) = moved(name)
    assert_moves(forward, *by_forward)
    assert_moves(off, read, written)
    assert_moves(on, read, written + len(find(name).points))
    assert on.loads == off.loads
    assert off.machine_code != on.machine_code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in OPS if widening(name) == 1])
def test_no_warp_waits_for_statistics(name: str, dtype: torch.dtype) -> None:
    """Of dense tensors each warp leaves a share, so there is no barrier. (The halves of a packed one are not dense.)"""
    op, inputs = find(name), sample(name, "cpu", dtype, (4096,))
    kept = ro.Retained(**{op.points[0].name: ro.Stats("l2", "abs_sum", "amax", "nonfinite", "act_grad")})

    def call() -> None:
        torch.autograd.grad(op.call(*inputs, retain=kept), leaves(inputs), torch.ones(4096, dtype=dtype))

    backward = static_report(call)[-1]
    assert_no_spills(backward)
    assert (backward.mix["BAR"], backward.shared) == (0, 0), str(backward)
    assert backward.mix["SHFL"] > 0  # so statistics there are


@pytest.mark.parametrize(
    ("name", "dtype", "aligned"),
    [
        *((name, torch.bfloat16, False) for name in FAMILY),
        *((name, torch.float32, aligned) for name in OPS for aligned in (True, False)),
    ],
)
def test_the_same_products_are_fused_into_sums_whatever_is_asked_for(
    name: str, dtype: torch.dtype, aligned: bool
) -> None:
    """Else bits of the other gradients would depend on it. LLVM decides which: the PTX says."""
    counts = []
    for retain in (False, True):
        with driver() as launches:
            call_of(name, shape_of(name, aligned), dtype, retain)()
            counts.append(Counter(re.findall(r"\b(fma\.rn|add|sub)\.f32\b", launches[-1].kernel.asm["ptx"])))
    assert counts[0] == counts[1]


TARGETS = [("sm_80", torch.float32, True), ("sm_100", torch.bfloat16, False), ("sm_120", torch.float32, False)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each op on one more target, so each f of f(a o b) on all of them; with --every-target each op on all of them."""
    if "target" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-target")
        cases = [
            (name, *target)
            for i, name in enumerate(FAMILY)
            for j, target in enumerate(TARGETS)
            if every or name in OPS or i % len(TARGETS) == j
        ]
        metafunc.parametrize(("name", "target", "dtype", "aligned"), cases)


def test_every_target(name: str, target: str, dtype: torch.dtype, aligned: bool) -> None:
    forward, backward = static_report(call_of(name, shape_of(name, aligned), dtype, retain=True), target)
    assert_no_spills(forward)
    assert_no_spills(backward, known=0 if aligned else KNOWN.get((name, target, dtype), 0))
    by_forward, (read, written) = moved(name)
    assert_moves(forward, *by_forward)
    assert_moves(backward, read, written + len(find(name).points))


@pytest.mark.parametrize("name", FAMILY)
def test_amd(name: str) -> None:
    assert_no_spills(*static_report(call_of(name, shape_of(name, True), torch.bfloat16, retain=True), "gfx942"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    assert_no_spills(*static_report(call_of(name, shape_of(name, False), dtype, retain=True)))


@pytest.mark.parametrize(
    ("name", "frozen", "read"), [("mul_sin", 0, 3), ("mul_sin", 1, 3), ("swiglu", 0, 2), ("swiglu", 1, 3)]
)
def test_a_gradient_that_is_not_needed_is_not_stored_nor_what_only_it_needs_read(
    name: str, frozen: int, read: int
) -> None:
    inputs = sample(name, "cpu", shape=shape_of(name, aligned=True))
    inputs[frozen].requires_grad_(False)
    _, backward = static_report(lambda: find(name).call(*inputs).backward(torch.ones(4096)))
    assert_moves(backward, read, 1)
