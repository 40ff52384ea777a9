"""What only a real GPU can show, for every op: no host waits, CUDA graphs, other streams, and the memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.registry import find, ops
from tests.conftest import GPU
from tests.oracle import all_points, leaves, sample, several

pytestmark = [
    pytest.mark.skipif(not GPU, reason="it is about a real GPU, and there is none"),
    # Leaves were used on one stream to warm up and are captured on another, as PyTorch's own recipe has it.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
]

NAMES = [op.name for op in ops()]
over_ops = pytest.mark.parametrize("name", NAMES)
SHAPE = (2048, 4096)
SLACK = 1 << 20
"""Bytes that do not grow with the tensors: shares of sums, numbers a row, the allocator's rounding."""


@pytest.fixture(autouse=True)
def on_kernels() -> Iterator[None]:
    with ro.backend("triton"):
        yield


def step(name: str, inputs: list[Any], kept: ro.Retained | None, dys: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Forward and backward; the gradients of the inputs."""
    outputs = several(find(name).call(*inputs, retain=kept))
    return list(torch.autograd.grad(outputs, leaves(inputs), dys, allow_unused=True))


def gradients(name: str, inputs: list[Any]) -> list[torch.Tensor]:
    return [torch.randn_like(y) for y in several(find(name).call(*inputs))]


def requests(name: str) -> list[ro.Retained | None]:
    points = [p.name for p in find(name).points]
    return [None, all_points(find(name)), ro.Retained(**{p: ro.Stats("l2", "amax", "nonfinite") for p in points})]


@over_ops
def test_the_host_never_waits(name: str) -> None:
    inputs = sample(name, "cuda")
    dys = gradients(name, inputs)
    for kept in requests(name):
        step(name, inputs, kept, dys)  # compiles
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(name, inputs, kept, dys)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@over_ops
def test_a_cuda_graph_of_forward_and_backward_replays_with_new_inputs(name: str) -> None:
    if name == "bias_dropout_add":
        pytest.skip("its seed is an input here, so it is as any other; with its own seed: tests/test_dropout.py")
    inputs, kept = sample(name, "cuda"), all_points(find(name))
    dys = gradients(name, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(name, inputs, kept, dys)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept.reset()
    with torch.cuda.graph(graph):
        outputs = several(find(name).call(*inputs, retain=kept))
        wanted = leaves(inputs) + [slot.tensor for slot in kept.values()]
        found = torch.autograd.grad(outputs, wanted, dys, allow_unused=True)
    with torch.no_grad():
        for x, other in zip(inputs, sample(name, "cuda", seed=11), strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(other)
    graph.replay()
    again = all_points(find(name))
    outputs = several(find(name).call(*inputs, retain=again))
    wanted = leaves(inputs) + [slot.tensor for slot in again.values()]
    for one, other in zip(found, torch.autograd.grad(outputs, wanted, dys, allow_unused=True), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@over_ops
def test_another_stream_gives_the_same_bits(name: str) -> None:
    inputs = sample(name, "cuda")
    dys = gradients(name, inputs)
    here = step(name, inputs, None, dys)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = step(name, inputs, None, dys)
    stream.synchronize()
    assert all(a is b or torch.equal(a, b) for a, b in zip(here, there, strict=True))


def allocated(call: Any) -> tuple[int, Any]:
    """Peak bytes above what there was before, and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return torch.cuda.max_memory_allocated() - before, result


HAVE_THEIR_OWN = ("linear_cross_entropy", "attention")
"""Tests: one works in blocks, and the other through kernels of PyTorch's, which take memory for their work."""


def size(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors, of each memory once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not None}.values())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in HAVE_THEIR_OWN])
def test_memory_is_that_of_the_results(name: str) -> None:
    """Forward takes its outputs, backward the gradients, a point its gradient, statistics nothing to speak of."""
    op, inputs = find(name), sample(name, "cuda", shape=SHAPE)
    dys = gradients(name, inputs)
    points = [p.name for p in op.points]
    kinds = [{}, *({p: None} for p in points), *({p: ro.Stats("l2", "amax")} for p in points)]
    shares = SHAPE[0] * SHAPE[1] // 16  # of a sum over rows: 1/64 of the elements, in float32
    if op.kind == "row":  # a norm's weights: two programs on each multiprocessor leave a row each, however many rows
        shares = 2 * 132 * SHAPE[1] * 4 * 2
    for kind in kinds:
        for measured in (False, True):  # the first time compiles
            whole = [p for p, want in kind.items() if want is None]
            kept = ro.Retained(*whole, **{p: want for p, want in kind.items() if want}) if kind else None
            taken, outputs = allocated(lambda kept=kept: several(op.call(*inputs, retain=kept)))
            assert not measured or taken <= size(*outputs) + SLACK, f"forward, {kind}"
            wanted = leaves(inputs) + [kept[p].tensor for p in kind]
            taken, found = allocated(
                lambda outputs=outputs, wanted=wanted: torch.autograd.grad(outputs, wanted, dys, allow_unused=True)
            )
            own = [g for g in found if g is not None and all(g.data_ptr() != dy.data_ptr() for dy in dys)]
            assert not measured or taken <= size(*own) + shares + SLACK, f"backward, {kind}"
