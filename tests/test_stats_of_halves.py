"""A gradient too large for float16 is not finite there, though a kernel has it in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import retainops as ro
from tests.conftest import Path

TOP = 32752.0  # twice this is 65504, the largest of float16
ABOVE = 32768.0
LARGE = torch.tensor([TOP, -TOP, ABOVE, -ABOVE, 1.0])
OF_EACH_CLASS = torch.tensor([27000.0, -27000.0, 28000.0, -28000.0, 1.0])  # times 3 * (1 - 1 / 5)


def of_classes(x: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
    target, weight = torch.arange(5, device=x.device), torch.full((5,), 3.0, device=x.device)
    return ro.cross_entropy(x, target, weight, reduction="none", retain=kept)


def of_a_layer(x: torch.Tensor, kept: ro.Retained) -> torch.Tensor:
    target, weight = torch.arange(5, device=x.device), torch.full((5,), 3.0, device=x.device)
    return ro.linear_cross_entropy(x, x.detach(), target, class_weight=weight, reduction="none", retain=kept)


CASES: dict[str, tuple[str, Callable[..., torch.Tensor], torch.Tensor]] = {
    "elementwise": ("c", lambda x, kept: ro.pointwise.mul_square(x, 1.0, retain=kept), LARGE.diag()),
    "a summed point": (
        "biased",
        lambda x, kept: ro.bias_dropout_add(x[0], None, x, 0.0, retain=kept),
        torch.stack([LARGE, LARGE, *torch.zeros(3, 5)]),
    ),
    "a row op": (
        "scaled",
        lambda x, kept: ro.log_softmax(x, retain=kept),
        60000 * torch.tensor([1.0, -1.0, -1.0, -1.0, 0.0]).expand(5, 5),  # times (1.4, -0.6, -0.6, -0.6, 0.4)
    ),
    "cross entropy": ("logits", of_classes, OF_EACH_CLASS),
    "linear cross entropy": ("logits", of_a_layer, OF_EACH_CLASS),
    "attention": (
        "p",
        lambda x, kept: ro.attention(x[None, None], x[None, None], 2 * x[None, None], retain=kept),
        LARGE.diag()[None, None],
    ),
}


@pytest.mark.parametrize(("over", "compiled"), [("tensor", False), ("channels", False), ("tensor", True)])
@pytest.mark.parametrize(("point", "call", "dy"), CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore")  # what Inductor says of the machine's compilers is not ours
def test_what_overflows_counts(
    path: Path, point: str, call: Callable[..., torch.Tensor], dy: torch.Tensor, over: str, compiled: bool
) -> None:
    x = torch.ones(5, 5, dtype=torch.float16, device=path.device, requires_grad=True)
    kept = ro.Retained(**{point: ro.Stats("nonfinite", over=over, grad=True)})
    torch._dynamo.reset()
    y = (torch.compile(call, fullgraph=True) if compiled else call)(x, kept)
    dy = dy.to(y.device, y.dtype)
    assert dy.isfinite().all()
    y.backward(dy)
    wrong = (~kept[point].grad.isfinite()).to(torch.int64)
    expected = wrong.sum() if over == "tensor" else wrong.reshape(-1, wrong.shape[-1]).sum(0)
    assert torch.equal(kept[point].nonfinite, expected)
    assert 0 < wrong.sum() < wrong.numel()


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
@pytest.mark.filterwarnings("ignore")  # as above
def test_the_least_that_overflows(path: Path, compiled: bool) -> None:
    """3 * 21840 is 65520, halfway from the largest number to the next one."""
    x = torch.full((2,), 1.5, dtype=torch.float16, device=path.device, requires_grad=True)
    kept = ro.Retained(c=ro.Stats("nonfinite"))
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> torch.Tensor:
        return ro.pointwise.mul_square(x, 1.0, retain=kept)

    (torch.compile(call) if compiled else call)(x).backward(x.new_tensor([21840, 21824]))
    assert kept.c.nonfinite == 1


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
