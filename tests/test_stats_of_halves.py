"""A gradient too large for float16 is not finite there, though a kernel has it in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from tests.conftest import Path

TOP = 32752.0  # twice this is 65504, the largest of float16
ABOVE = 32768.0
LARGE = [TOP, -TOP, ABOVE, -ABOVE, 1.0]
CASES: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "elementwise": ("c", lambda x, kept: ro.pointwise.mul_square(x, 1.0, retain=kept)),
    "a summed point": ("c", lambda x, kept: ro.pointwise.mul_square(x[0], 1.0, retain=kept) + 0 * x),
    "a row op": ("scaled", lambda x, kept: ro.log_softmax(x, retain=kept)),
    "cross entropy": (
        "logits",
        lambda x, kept: ro.cross_entropy(x, torch.arange(len(x), device=x.device), reduction="none", retain=kept),
    ),
    "attention": ("p", lambda x, kept: ro.attention(x[None, None], x[None, None], 2 * x[None, None], retain=kept)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
@pytest.mark.parametrize("over", ["tensor", "channels"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # what Inductor says of the machine's compilers is not ours
def test_what_overflows_counts(path: Path, case: str, over: str, compiled: bool) -> None:
    point, call = CASES[case]
    x = torch.ones(5, 5, dtype=torch.float16, device=path.device, requires_grad=True)
    kept = ro.Retained(**{point: ro.Stats("nonfinite", over=over, grad=True)})
    torch._dynamo.reset()
    y = (torch.compile(call, fullgraph=True) if compiled else call)(x, kept)
    dy = torch.tensor(LARGE, device=path.device)
    if case == "cross entropy":
        dy = 2 * dy
    elif case == "a row op":  # of (1, -1, -1, -1, 0) it is (1.4, -0.6, -0.6, -0.6, 0.4)
        dy = torch.where(dy == TOP, 60000.0, torch.where(dy == 1, 0.0, -60000.0)).expand(5, 5)
    else:
        dy = dy.diag()
    y.backward(dy.reshape(y.shape).to(y.dtype))
    wrong = (~kept[point].grad.isfinite()).to(torch.int64)
    expected = wrong.sum() if over == "tensor" else wrong.reshape(-1, wrong.shape[-1]).sum(0)
    assert torch.equal(kept[point].nonfinite, expected)
    assert 0 < wrong.sum() < wrong.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_other_dtypes_have_room_for_does_not(path: Path, dtype: torch.dtype) -> None:
    x = torch.ones(5, 5, dtype=dtype, device=path.device, requires_grad=True)
    kept = ro.Retained(c=ro.Stats("nonfinite"))
    ro.pointwise.mul_square(x, 1.0, retain=kept).backward(torch.full_like(x, ABOVE))
    assert kept.c.nonfinite == 0


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_counts_are_whole_whatever_the_default_dtype(path: Path, default: torch.dtype) -> None:
    x = torch.ones(5001, dtype=torch.float16, device=path.device, requires_grad=True)
    kept = ro.Retained(c=ro.Stats("nonfinite"))
    torch.set_default_dtype(default)
    try:
        ro.pointwise.mul_square(x, 1.0, retain=kept).backward(torch.full_like(x, ABOVE))
    finally:
        torch.set_default_dtype(torch.float32)
    assert kept.c.nonfinite == 5001
