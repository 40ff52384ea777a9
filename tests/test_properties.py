"""Hypothesis draws shapes, broadcasts, strides and dtypes; the oracle is eager PyTorch in float64."""

from __future__ import annotations

import contextlib

import hypothesis
import torch
from hypothesis import strategies as st

import retainops as ro
from tests.conftest import GPU, nan_filled_memory

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
DEVICE = "cuda" if GPU else "cpu"
settings = hypothesis.settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape in any layout: permuted, stepped, offset, expanded, with dims of 1 in place of others."""
    seed = draw(st.integers(0, 2**16))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    expand = [draw(st.sampled_from([False, False, False, True])) for _ in shape]
    stored = [1 if e else n * s for n, s, e in zip(shape, steps, expand, strict=True)]
    offset = draw(st.integers(0, 3))
    base = torch.randn(
        [stored[d] for d in order] + [offset + 1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    base = base.to(DEVICE, dtype)[..., offset] if draw(st.booleans()) else base[..., 0].contiguous().to(DEVICE, dtype)
    inverse = [order.index(d) for d in range(len(shape))]
    x = base.permute(inverse)
    for d, (n, step, e) in enumerate(zip(shape, steps, expand, strict=True)):
        x = (
            x.expand(*(n if i == d else -1 for i in range(x.dim())))
            if e
            else x.narrow(d, 0, n * step)[
                tuple(slice(None, None, step) if i == d else slice(None) for i in range(x.dim()))
            ]
        )
    assert x.shape == shape
    return x


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    full = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 33]), min_size=0, max_size=4)))
    if torch.Size(full).numel() > 4000:
        full = full[:2]
    sides = []
    for _ in range(2):
        shape = tuple(1 if draw(st.sampled_from([False, False, True])) else n for n in full)
        sides.append(shape[draw(st.integers(0, len(shape))) :] if draw(st.booleans()) else shape)
    return draw(tensors(sides[0], draw(DTYPES))), draw(tensors(sides[1], draw(DTYPES)))


@settings
@hypothesis.given(pair=pairs(), needs=st.sampled_from([(True, True), (True, False), (False, True)]), data=st.data())
def test_any_two_tensors(pair: tuple, needs: tuple[bool, bool], data: st.DataObject) -> None:
    a, b = (x.detach().requires_grad_(need) for x, need in zip(pair, needs, strict=True))
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (a, b)]
    eager = torch.sin(a * b)
    dy = data.draw(tensors(tuple(eager.shape), eager.dtype))
    kept = ro.Retained("c")
    with contextlib.ExitStack() as stack:
        if not GPU:
            from retainops.testing import simulated_gpu

            stack.enter_context(simulated_gpu())
        stack.enter_context(ro.backend("triton"))
        stack.enter_context(nan_filled_memory())
        y = ro.mul_sin(a, b, retain=kept)
        y.backward(dy)
    moves = [d for d, size in enumerate(y.shape) if size > 1]  # the stride of a dim of one element says nothing
    assert [y.stride(d) for d in moves] == [eager.stride(d) for d in moves] or not y.numel()
    assert y.dtype == eager.dtype
    c = wide[0] * wide[1]
    c.retain_grad()
    want = torch.sin(c)
    want.backward(dy.double())
    held = torch.finfo(torch.promote_types(y.dtype, torch.float32)).eps
    close(y, want, held)
    close(kept.c.grad, c.grad, held)
    for ours, exact in zip((a, b), wide, strict=True):
        if ours.requires_grad:
            assert ours.grad.dtype == ours.dtype
            close(ours.grad, exact.grad, held)
        else:
            assert ours.grad is None


def close(ours: torch.Tensor, exact: torch.Tensor, held: float) -> None:
    """Within half an ulp of the dtype (one rounding) and a few of what interiors are held in."""
    assert ours.shape == exact.shape
    assert not ours.isnan().any()
    if ours.numel():
        top = exact.detach().abs().max().item()
        bound = torch.finfo(ours.dtype).eps / 2 * exact.detach().abs() + 40 * held * max(top, 1) + tiny(ours.dtype)
        assert ((ours.detach().double() - exact.detach()).abs() <= bound).all()


def tiny(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal
