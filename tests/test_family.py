"""What differs from one elementwise op to another, for each of them, on the kernels: its maths.

Everything that they share (layouts, retention, statistics, paths) is tested on one op of each kind, by the other files.
"""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

import retainops as ro
from retainops.registry import Op, find
from retainops.testing import check_op
from retainops.testing._errors import misplaced
from retainops.testing.check import check_layouts
from tests.conftest import Path
from tests.oracle import DTYPES, FAMILY, all_points, clones, eager, is_float, leaves, refusal, sample

EXTREME = [
    *(math.nan, math.inf, 0.0, 1e-45, 1e-38, 1e-30, 1e-8, 1e-3, 0.5, 1.0, 3.0, 9.0, 17.0, 20.0, 20.5, 60.0, 88.5, 89.5),
    *(104.5, 1e4, 1e6, 1e12, 1e19, 1e20, 3e38),
]
"""Saturation of sigmoid and tanh, softplus's threshold, exp, squares and cubes at their limits, subnormal numbers."""


def test_the_family_is_whole() -> None:
    assert len(FAMILY) >= 59
    for binary, unary in itertools.product(["mul", "add", "sub", "div"], ["sin", "gelu_tanh", "square"]):
        assert f"{binary}_{unary}" in FAMILY
        assert callable(getattr(ro.pointwise, f"{binary}_{unary}"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_errors_are_eagers_and_bits_do_not_depend_on_retention(kernels: Path, name: str, dtype: torch.dtype) -> None:
    report = check_op(name, *sample(name, kernels.device, dtype, requires_grad=False))
    assert report.ok, report


@pytest.mark.parametrize("name", FAMILY)
def test_broadcasting(kernels: Path, name: str) -> None:
    """By the kernels that they share; so each op has one of the layouts, and each layout a third of the ops."""
    layouts = check_layouts(*sample(name, kernels.device, shape=(5, 70), requires_grad=False))
    chosen = [layout for layout in ("outer", "scalar 0", "row 1") if layout in layouts]
    if chosen:
        chosen = [chosen[[*FAMILY].index(name) % len(chosen)]]
    for layout in chosen or ("transposed", "expanded"):  # of one tensor: there is nothing to broadcast with
        report = check_op(name, *layouts[layout])
        assert report.ok, f"{layout}: {report}"


@pytest.mark.parametrize("name", FAMILY)
def test_first_and_second_derivatives_in_float64(kernels: Path, name: str) -> None:
    inputs = sample(name, kernels.device, torch.float64, (2, 3))
    with ro.backend("auto"):  # the second ones are the reference's
        assert torch.autograd.gradcheck(find(name).call, inputs)
        assert torch.autograd.gradgradcheck(find(name).call, inputs)


@pytest.mark.parametrize("name", FAMILY)
def test_python_numbers(kernels: Path, name: str) -> None:
    """In the place of each tensor whose annotation says so, or else as eager has it."""
    op, inputs = find(name), sample(name, kernels.device, shape=(3, 50), requires_grad=False)
    takes = [p.annotation for p in inspect.signature(op.call).parameters.values()]
    if sum(map(is_float, inputs)) == 1:
        inputs = inputs[:0]
    for i, number in itertools.product((i for i, x in enumerate(inputs) if is_float(x)), (0.7, 3)):
        given = (*inputs[:i], number, *inputs[i + 1 :])
        if "float" in takes[i]:
            report = check_op(name, *given)
            assert report.ok, report
        elif refusal(op, given) is TypeError:
            with pytest.raises(TypeError, match="expected a torch.Tensor"):
                op.call(*given)


CAPS = [(), (1,), (70,), (5, 1), (5, 70)]


def learned_cap(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """In place of the number that softcap's sample has."""
    return (2 + torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).to(device, dtype)


@pytest.mark.parametrize("shape", CAPS, ids=str)
def test_softcap_of_a_cap_that_is_learned(kernels: Path, shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        x, _ = sample("softcap", kernels.device, dtype, (5, 70), requires_grad=False)
        report = check_op("softcap", x, learned_cap(kernels.device, dtype, shape))
        assert report.ok, report


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
def test_derivatives_by_a_cap_that_is_learned(kernels: Path, shape: tuple[int, ...]) -> None:
    x, _ = sample("softcap", kernels.device, torch.float64, (2, 3))
    cap = learned_cap(kernels.device, torch.float64, shape).requires_grad_()
    with ro.backend("auto"):
        assert torch.autograd.gradcheck(ro.softcap, (x, cap))
        assert torch.autograd.gradgradcheck(ro.softcap, (x, cap))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_extreme_arguments(kernels: Path, name: str, dtype: torch.dtype) -> None:
    """NaN and infinities where eager has them, and every other element as near to the truth as eager's."""
    op, inputs = find(name), extremes(name, kernels.device, dtype)
    kept = all_points(op)
    y = op.call(*inputs, retain=kept)
    y.sum().backward()
    ours = [y, *(slot.grad for slot in kept.values()), *(x.grad for x in leaves(inputs))]
    eagers, exact = results(op, clones(inputs)), results(op, widened(inputs))
    errors = [(e - x).abs() for e, x in zip(eagers, exact, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):  # eager's error is a matter of luck too: it is the largest one near by
        moved = [nearby(x, generator) if is_float(x) else x for x in inputs]
        for error, e, x in zip(errors, results(op, clones(moved)), results(op, widened(moved)), strict=True):
            error.copy_(torch.maximum(error, (e - x).abs().nan_to_num(0, 0, 0)))
    info = torch.finfo(dtype)
    for our, eager_, true, error in zip(ours, eagers, exact, errors, strict=True):
        assert not misplaced(our, eager_, true), differing(inputs, our, eager_)
        finite = our.isfinite() & eager_.isfinite() & true.isfinite()
        bar = 2 * error.double() + 4 * info.eps * true.abs() + 4 * info.tiny
        wrong = finite & ~((our.double() - true).abs() <= bar)
        assert not wrong.any(), differing(inputs, our, eager_, wrong)


def nearby(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    steps = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device) - 0.5
    return (x.detach().double() * (1 + steps / 256)).to(x.dtype).requires_grad_()


def results(op: Op, inputs: list) -> list[torch.Tensor]:
    """Eager's output, and gradients of points and inputs."""
    y, values = eager(op, inputs)
    y.sum().backward()
    return [y.detach(), *(v.grad for v in values.values()), *(x.grad for x in leaves(inputs))]


def extremes(name: str, device: str, dtype: torch.dtype) -> list:
    """Every pair of extreme arguments, of either sign, in an op's first two tensors; ones in the others."""
    line = torch.tensor([*EXTREME, *(-x for x in EXTREME)], dtype=torch.float64).to(device, dtype)
    grid = torch.meshgrid(line, line, indexing="ij")
    inputs = sample(name, device, dtype, tuple(grid[0].shape), requires_grad=False)
    floats = [i for i, x in enumerate(inputs) if is_float(x)]
    if inputs[0].shape != grid[0].shape:  # packed
        inputs[0] = torch.cat(grid, dim=-1)
    else:
        for i, values in itertools.zip_longest(floats, grid[: len(floats)], fillvalue=torch.ones_like(grid[0])):
            inputs[i] = values
    return [x.clone().requires_grad_() if is_float(x) else x for x in inputs]


def widened(inputs: list) -> list:
    return [x.detach().double().requires_grad_() if is_float(x) else x for x in inputs]


def differing(inputs: list, ours: torch.Tensor, eagers: torch.Tensor, wrong: torch.Tensor | None = None) -> str:
    """Some of the elements that are wrong (default: not finite where eager's are, or the other way round)."""
    if wrong is None:
        wrong = ~((ours == eagers) | (ours.isnan() & eagers.isnan()) | (ours.isfinite() & eagers.isfinite()))
    return "; ".join(
        f"{ours[at].item()}, eager's {eagers[at].item()}, at "
        f"{[x[at].item() for x in leaves(inputs) if x.shape == ours.shape]}"
        for at in map(tuple, wrong.nonzero()[:5].tolist())
    )
