"""What a forward leaves for its backward is its own, whatever was called in between: of one op of each kind."""

from __future__ import annotations

import pytest
import torch

from retainops.registry import find, ops
from tests.conftest import Path
from tests.oracle import OPS, all_points, leaves, random_like, sample, several

SHAPES = {"group_norm": (2, 4, 6), "rope": (2, 3, 5, 8), "attention": (1, 2, 5, 8)}
OF_EACH_KIND = [*OPS, *(op.name for op in ops() if op.kind != "elementwise")]


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_two_forwards_before_their_backwards(path: Path, name: str) -> None:
    op = find(name)

    def forward(seed: int) -> tuple:
        inputs, kept = sample(name, path.device, shape=SHAPES.get(name, (5, 40)), seed=seed), all_points(op)
        return several(op.call(*inputs, retain=kept)), inputs, kept

    def backward(outputs: tuple, inputs: list, kept: dict) -> list[torch.Tensor]:
        torch.autograd.backward(outputs, [random_like(y) for y in outputs])
        return [*(y.detach() for y in outputs), *(x.grad for x in leaves(inputs)), *(s.grad for s in kept.values())]

    alone = [backward(*forward(seed)) for seed in (1, 2)]
    for again in ([0, 1], [1, 0]):
        both = [forward(seed) for seed in (1, 2)]
        for i in again:
            for ours, expected in zip(backward(*both[i]), alone[i], strict=True):
                assert torch.equal(ours, expected)
