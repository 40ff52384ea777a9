"""attention on a real GPU: what PyTorch's kernels say of their rows, and that nothing waits for the host."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import retainops as ro
from retainops.ops._attention import LSE, lse_of
from tests.attention_cases import Case, bar, error, loss_of, run_eager, truth
from tests.conftest import GPU

pytestmark = pytest.mark.skipif(not GPU, reason="it is about a real GPU, and there is none")

Tensor = torch.Tensor
KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
CASES = {
    "plain": Case((2, 4, 128, 64), (2, 4, 128, 64), (2, 4, 128, 64)),
    "causal, ragged": Case((2, 4, 131, 64), (2, 4, 131, 64), (2, 4, 131, 64), causal=True),
    "padded heads": Case((1, 2, 100, 80), (1, 2, 100, 80), (1, 2, 100, 80)),
    "odd heads": Case((1, 2, 100, 36), (1, 2, 100, 36), (1, 2, 100, 36)),
    "grouped": Case((2, 8, 96, 64), (2, 2, 96, 64), (2, 2, 96, 64), gqa=True),
    "other keys": Case((2, 4, 33, 64), (2, 4, 150, 64), (2, 4, 150, 64)),
    "dead rows": Case((1, 2, 65, 64), (1, 2, 65, 64), (1, 2, 65, 64), mask="dead rows"),
    "added": Case((1, 2, 64, 64), (1, 2, 64, 64), (1, 2, 64, 64), mask="added in each head"),
}


def attend(case: Case, kernel: SDPBackend, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs and the output by this kernel; skips what it does not take."""
    q, k, v, mask = case.tensors(dtype, "cuda")
    with sdpa_kernel(kernel):
        try:
            o = scaled_dot_product_attention(q, k, v, mask, is_causal=case.causal, enable_gqa=case.gqa)
        except RuntimeError as e:
            pytest.skip(f"{kernel.name} does not take it: {str(e).splitlines()[0]}")
    return q, k, v, mask, o


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_the_logarithm_of_each_row_is_natural(kernel: SDPBackend, name: str) -> None:
    case = CASES[name]
    *_, o = attend(case, kernel, torch.bfloat16)
    found = lse_of(o)
    if kernel == SDPBackend.CUDNN_ATTENTION and case.mask:
        assert found is None, "it is that of a finite number where the mask hides a whole row"
        return
    assert found is not None, f"{type(o.grad_fn).__name__} keeps none, of {', '.join(LSE)}"
    expected = run_eager(case, torch.bfloat16, torch.float64, "cuda")["s"]["value"].logsumexp(-1)
    expected = expected.masked_fill(expected.isneginf(), 0.0)
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", [*KERNELS, SDPBackend.MATH], ids=lambda kernel: kernel.name)
def test_gradients_of_points_beside_every_kernel(kernel: SDPBackend, name: str) -> None:
    case, dtype = CASES[name], torch.bfloat16
    *inputs, o = attend(case, kernel, dtype)
    alone = torch.autograd.grad(loss_of(o), inputs[:3])
    kept = ro.Retained("s", "p")
    with sdpa_kernel(kernel):
        o = ro.attention(*inputs, is_causal=case.causal, enable_gqa=case.gqa, retain=kept)
    loss_of(o).backward()
    true, eager = truth(case, dtype, "cuda"), run_eager(case, dtype, dtype, "cuda")
    for point, times in (("s", 4), ("p", 1)):
        grad, there = kept[point].grad, true[point]["grad"]
        assert error(grad, there) <= times * error(eager[point]["grad"], there) + bar(there, there, dtype, 1, 8)
    if kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):  # others may add atomically, in any order
        for x, grad in zip(inputs, alone, strict=False):
            assert torch.equal(x.grad, grad)


WANTS: list[dict[str, Any]] = [
    {"p": ro.Relevance("chefer", "legrad")},
    {"s": ro.Stats("l2", over="keys")},
    {"s": ro.Part(queries=[3, 1], keys=[7])},
]


@pytest.mark.parametrize("wants", WANTS, ids=str)
def test_the_host_never_waits(wants: dict[str, Any]) -> None:
    q, k, v, _ = CASES["causal, ragged"].tensors(torch.bfloat16, "cuda")
    dy = torch.randn(q.shape, device="cuda", dtype=q.dtype)
    for waits in ("default", "error"):  # the first time compiles
        with contextlib.ExitStack() as stack:
            torch.cuda.set_sync_debug_mode(waits)
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            ro.attention(q, k, v, is_causal=True, retain=ro.Retained(**wants)).backward(dy)
