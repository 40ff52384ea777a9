"""Reductions and scans in the interpreter: any function, rounding at each step."""

import pytest
import torch
import triton
import triton.language as tl

from retainops.testing.simulated import simulated_gpu


@pytest.fixture(autouse=True)
def gpu():
    torch.manual_seed(0)
    with simulated_gpu():
        yield


@triton.jit
def sums_kernel(X, SUM, MAX, MIN, AT_MAX, AT_MIN, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)
    x = tl.load(X + i[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(SUM + i, tl.sum(x, axis=1))
    tl.store(MAX + i, tl.max(x, axis=1))
    tl.store(MIN + i, tl.min(x, 1, keep_dims=True).reshape(M))
    tl.store(AT_MAX + i, tl.argmax(x, axis=1))
    tl.store(AT_MIN + i, x.argmin(axis=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_reductions(dtype):
    x = (torch.randn(8, 64) * 100).to(dtype)
    x[3, 5] = x[3, 50] = 1000  # the first of equals
    total, high, low = torch.empty(3, 8).to(dtype)
    at_high, at_low = torch.empty(2, 8, dtype=torch.int32)
    sums_kernel[(1,)](x, total, high, low, at_high, at_low, M=8, N=64)
    pairs = x
    while pairs.shape[1] > 1:  # each step of the tree rounds to the dtype
        pairs = pairs[:, 0::2] + pairs[:, 1::2]
    if dtype == torch.float32:
        torch.testing.assert_close(total, pairs[:, 0], rtol=0, atol=x.abs().sum(1).max().item() * 2**-22)
    else:
        assert torch.equal(total, pairs[:, 0])
    assert torch.equal(high, x.amax(1))
    assert torch.equal(low, x.amin(1))
    assert torch.equal(at_high, x.float().argmax(1).int())
    assert torch.equal(x.gather(1, at_low.long()[:, None])[:, 0], low)
    assert at_high[3] == 5


def test_reductions_drop_nan():
    x = torch.randn(2, 8)
    x[0, 3] = x[1] = float("nan")
    total, high, low = torch.empty(3, 2)
    at_high, at_low = torch.empty(2, 2, dtype=torch.int32)
    sums_kernel[(1,)](x, total, high, low, at_high, at_low, M=2, N=8)
    assert total.isnan().all()
    assert high[0] == x[0].nan_to_num(-9).max()
    assert low[0] == x[0].nan_to_num(9).min()
    assert high[1].isnan()


@triton.jit
def online_softmax(m, s, m2, s2):
    """Joins (maximum, sum of exponentials) of two stretches."""
    top = tl.maximum(m, m2)
    return top, s * tl.exp(m - top) + s2 * tl.exp(m2 - top)


@triton.jit
def affine(a, b, a2, b2):
    """The map x -> a x + b, then x -> a2 x + b2: associative, and in order."""
    return a * a2, b * a2 + b2


@triton.jit
def larger(a, b):
    """With a branch, so that it takes scalars only."""
    if a > b:
        c = a
    else:
        c = b
    return c


@triton.jit
def folds_kernel(X, LOGSUM, LAST, LARGEST, SCAN, BACK, SUMS, N: tl.constexpr):
    j = tl.arange(0, N)
    x = tl.load(X + j)
    m, s = tl.reduce((x, tl.full((N,), 1.0, tl.float32)), 0, online_softmax)
    tl.store(LOGSUM, m + tl.log(s))
    _a, b = tl.reduce((tl.full((N,), 0.5, tl.float32), x), 0, affine)
    tl.store(LAST, b)
    tl.store(LARGEST, tl.reduce(x, 0, larger))
    _a, b = tl.associative_scan((tl.full((N,), 0.5, tl.float32), x), 0, affine)
    tl.store(SCAN + j, b)
    _a, b = tl.associative_scan((tl.full((N,), 0.5, tl.float32), x), 0, affine, reverse=True)
    tl.store(BACK + j, b)
    tl.store(SUMS + j, tl.cumsum(x.to(tl.bfloat16).to(tl.float32), 0) + tl.associative_scan(x, 0, larger))


@pytest.mark.parametrize("n", [1, 2, 64])
def test_any_associative_function(n):
    x = torch.randn(n)
    logsum, last, largest = torch.empty(3, 1)
    scan, back, sums = torch.empty(3, n)
    folds_kernel[(1,)](x, logsum, last, largest, scan, back, sums, N=n)

    def recurrence(values: torch.Tensor) -> torch.Tensor:
        states = [values[0]]
        for value in values[1:]:
            states.append(0.5 * states[-1] + value)
        return torch.stack(states)

    torch.testing.assert_close(logsum[0], x.logsumexp(0))
    torch.testing.assert_close(last[0], recurrence(x)[-1])
    torch.testing.assert_close(scan, recurrence(x))
    torch.testing.assert_close(back, recurrence(x.flip(0)).flip(0))
    torch.testing.assert_close(sums, x.bfloat16().float().cumsum(0) + x.cummax(0).values)
    assert largest[0] == x.max()
