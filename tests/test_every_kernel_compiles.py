"""Every kernel compiles, by the Triton that is there. `make oldest` asks the oldest one that is supported.

Triton's front end and its passes differ from version to version: what one takes another one refuses, and says so only
when the kernel is first launched. The other tests read what the installed version makes of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch

import retainops as ro
from retainops.ops.pointwise import FAMILY
from retainops.registry import Op, find, ops
from tests.attention_cases import CASES
from tests.attention_oracle import Run
from tests.oracle import all_points, leaves, several
from tests.triton_version import IS_OLDEST

triton = pytest.importorskip("triton")
SHAPES = ((8192, 4096), (40, 1000), (2, 65536))
REQUESTS = ("nothing", "points", "statistics")
ONE_OF_EACH_KIND = ("mul_sin", "add_gelu", "sub_silu", "div_softplus")
NAMES = [op.name for op in ops() if op.name in ONE_OF_EACH_KIND or op.name not in FAMILY]
pytestmark = pytest.mark.skipif(
    not IS_OLDEST, reason="`make oldest` runs it; others compile with this Triton all the time"
)


def requested(op: Op, what: str) -> ro.Retained | None:
    if what == "statistics":
        return ro.Retained(**{p.name: ro.Stats("l2", "amax", "nonfinite") for p in op.points})
    return all_points(op) if what == "points" else None


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("name", [name for name in NAMES if find(name).call is not ro.attention])
def test_op(name: str, what: str) -> None:
    from retainops.testing import static_report

    op, compiled = find(name), 0
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            with contextlib.suppress(ValueError):  # a shape that the op cannot have, or leaves to its reference
                compiled += len(static_report(call_of(op, shape, dtype, what)))
    assert compiled >= 4


def call_of(op: Op, shape: tuple[int, int], dtype: torch.dtype, what: str) -> Callable[[], None]:
    inputs = op.sample(torch.Size(shape), dtype, "cpu", torch.Generator().manual_seed(0))
    for i, x in enumerate(inputs):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and i not in op.constants:
            x.requires_grad_()

    def call() -> None:
        outputs = several(op.call(*inputs, retain=requested(op, what)))
        torch.autograd.grad(outputs, leaves(inputs), [torch.ones_like(y) for y in outputs], allow_unused=True)

    return call


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in CASES), ("plain", torch.float32)])
def test_attention(name: str, dtype: torch.dtype) -> None:
    from retainops.ops import _scores_kernels as kernels
    from retainops.ops._scores import Wanted
    from retainops.testing import static_report

    run = Run(CASES[name], dtype)
    if kernels.refuses(run.scores, None, None) is None:
        s, p = Wanted(run.empty(), parts=("sumsq",)), Wanted(run.empty(), relevance=("chefer", "legrad"))
        assert static_report(lambda: kernels.answer(run.scores, s, p))
