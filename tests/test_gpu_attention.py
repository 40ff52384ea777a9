"""What only a real GPU can show of attention: which logarithm PyTorch's kernels keep, tensor cores, and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import retainops as ro
from retainops.ops._attention import lse_of
from tests.attention_cases import CASES, Case
from tests.attention_oracle import Run, check, check_as_eager, largest
from tests.conftest import GPU

pytestmark = pytest.mark.skipif(not GPU, reason="it is about a real GPU, and there is none")

KERNELS = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
LARGER = {
    "ragged, causal": Case((2, 3, 300, 64), (2, 3, 300, 64), (2, 3, 300, 64), causal=True),
    "heads of 80": Case((1, 2, 257, 80), (1, 2, 400, 80), (1, 2, 400, 80), mask="boolean"),
    "grouped, window": Case((1, 4, 320, 128), (1, 2, 320, 128), (1, 2, 320, 128), gqa=True, window=(50, 10)),
}
ALL = {**CASES, **LARGER}


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(2, 3, 128, 64), (1, 2, 77, 40), (2, 2, 200, 128)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_lse_is_the_logarithm_of_the_sum(
    kernel: SDPBackend, shape: tuple[int, ...], causal: bool, masked: bool
) -> None:
    """Natural, one a row, and 0 for a row that sees no key: all that is asked of s rests on it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    n, mask = shape[-2], None
    if masked:
        mask = torch.rand(n, n, device="cuda") > 0.5
        mask[3] = False
    try:
        with sdpa_kernel(kernel):
            o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    except RuntimeError as error:
        pytest.skip(f"this kernel does not take the call: {error}")
    found = lse_of(o)
    if kernel == SDPBackend.CUDNN_ATTENTION and masked:  # what it keeps of a row that sees nothing is something else
        assert found is None
        return
    s = (q.double() @ k.double().mT) * shape[-1] ** -0.5
    hidden = ~mask if mask is not None else torch.ones_like(s[0, 0]).triu(1).bool() if causal else None
    s = s if hidden is None else s.masked_fill(hidden, -torch.inf)
    truth = s.logsumexp(-1).masked_fill(s.isneginf().all(-1), 0.0)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("no ")])
def test_gradients_and_relevance(name: str, dtype: torch.dtype) -> None:
    """By the real tiles, against float64 eager on the GPU; two runs are equal to the bit."""
    from retainops.ops import _scores_kernels as kernels
    from retainops.ops._scores import Wanted

    run = Run(ALL[name], dtype, "cuda")
    first, second = [], []
    for kept in (first, second):
        s, p = run.empty(), run.empty()
        _, parts = kernels.answer(run.scores, Wanted(s), Wanted(p, relevance=("chefer", "legrad")))
        kept += [s, p, parts["chefer"], parts["legrad"]]
    assert all(map(torch.equal, first, second))
    s, p, chefer, legrad = first
    if dtype == torch.float32:  # two orders of the same float32 sums: cuBLAS's has the smaller error in heads of 256
        check("p", p, run.truth["p"], run.eager["p"])
    else:
        check_as_eager(p, run.truth["p"], run.eager["p"])
    products = [g["p"] * g["value of p"] for g in (run.truth, run.eager)]
    check("s", s, run.truth["s"], run.eager["s"], size=largest(products[0]))
    check("chefer", chefer, *(x.relu().mean(1) for x in products))
    check("legrad", legrad, *(g["p"].relu().mean((1, 2)) for g in (run.truth, run.eager)))


def test_the_kernels_answer_through_the_public_function() -> None:
    q, k, v = (torch.randn(1, 4, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    do = torch.randn_like(q)
    without = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), do)
    kept = ro.Retained(p=ro.Relevance("chefer", "legrad"), s=ro.Stats("l2", over="heads"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        ro.attention(q, k, v, is_causal=True, retain=kept).backward(do)
    launched = {event.key for event in profile.key_averages()}
    assert {"relevance_kernel", "by_key_kernel", "by_query_kernel"} <= launched
    for x, grad in zip((q, k, v), without, strict=True):
        assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("name", ["chefer", "legrad"])
def test_relevance_takes_a_twentieth_of_the_memory_of_eager(name: str) -> None:
    """At 32 heads of 4096 tokens, beyond the inputs and what plain attention takes."""
    shape = (1, 32, 4096, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    do = torch.randn_like(q)

    def peak(retain: ro.Retained | None, eager: bool = False) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if eager:
            p = (q @ k.mT * shape[-1] ** -0.5).softmax(-1)
            p.retain_grad()
            o = p @ v
        else:
            o = ro.attention(q, k, v, retain=retain)
        torch.autograd.backward(o, do, inputs=[q, k, v] + ([p] if eager else [retain.p.tensor] if retain else []))
        return torch.cuda.max_memory_allocated() - before

    peak(ro.Retained(p=ro.Relevance(name)))  # compiles
    plain = peak(None)
    mine = peak(ro.Retained(p=ro.Relevance(name))) - plain
    assert mine < (peak(None, eager=True) - plain) / 20
