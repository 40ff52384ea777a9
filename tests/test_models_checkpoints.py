"""Points of models whose forward runs again in backward, by a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import retainops as ro
from tests.small_model import (
    IN_BLOCKS,
    assert_kept,
    oracle,
)


@pytest.mark.parametrize(
    ("use_reentrant", "inside"), [(False, True), (False, False), (True, True)], ids=["inside", "after", "reentrant"]
)
def test_checkpoint(model_x: tuple, use_reentrant: bool, inside: bool) -> None:
    """Recomputation finds the requests inside the `with`; the non-reentrant kind also works after it."""
    model, x = model_x
    y = x.requires_grad_()
    with ro.retain(model, "layers.*") as kept:
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=use_reentrant)
        if inside:
            y.sum().backward()
    if not inside:
        y.sum().backward()
    assert_kept(kept, oracle(model, x), IN_BLOCKS)


def test_a_selective_checkpoint_counts_no_operation_of_ours(rand: Callable) -> None:
    """What its policy saves is found again by how often the operation was called before, a slot's leaf made or not."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point, self.scale = ro.nn.Point(), nn.Parameter(torch.randn(1, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.point(x) * self.scale.expand(3, 4).contiguous())

    def policy(ctx: object, op: object, *_: object, **__: object) -> CheckpointPolicy:
        is_saved = op in (torch.ops.aten.expand.default, torch.ops.aten.zeros.default)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    x = rand(3, 4)
    model = Scaled().to(x.device)
    saving = functools.partial(create_selective_checkpoint_contexts, policy)
    results = []
    for run in (model, functools.partial(checkpoint, model, use_reentrant=False, context_fn=saving)):
        x.grad = model.scale.grad = None
        with ro.retain(model) as kept:
            run(x).sum().backward()
        results.append((kept["point"].grad, x.grad, model.scale.grad))
    torch.testing.assert_close(*results)


def test_checkpoints_whose_backward_comes_after_the_with(model_x: tuple) -> None:
    """What docs/retain_grad.md says of it: an error of PyTorch's, or nothing comes."""
    model, x = model_x
    with ro.retain(model, "*.act", ro.Stats("act_grad")):
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False)
    with pytest.raises(CheckpointError, match="number of tensors"):
        y.sum().backward()
    with pytest.warns(RuntimeWarning, match="run backward inside the with"), ro.retain(model, "*.act") as kept:
        y = checkpoint(model, x, use_reentrant=True)
    y.sum().backward()
    assert kept["layers.0.act"].grad is None
