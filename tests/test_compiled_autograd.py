"""Eager forward, backward under compiled autograd: the same gradients, and the same answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo import compiled_autograd

import retainops as ro
from retainops.registry import find
from tests.conftest import Path, random_leaves
from tests.oracle import all_points, assert_near, clones, leaves, sample

# PyTorch's own, of the tensors that it makes fake.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def traced(loss: torch.Tensor) -> None:
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("name", ["mul_sin", "rms_norm", "cross_entropy"])
def test_ops(path: Path, name: str, retained: bool) -> None:
    op, ours = find(name), sample(name, path.device)
    theirs = clones(ours)
    kept, want = all_points(op), all_points(op)
    traced(op.call(*ours, retain=kept if retained else None).square().sum())
    op.call(*theirs, retain=want).square().sum().backward()
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad)
    if retained:
        for point in want:
            assert_near(kept[point].grad, want[point].grad)


@pytest.mark.parametrize("want", [lambda: ro.Stats("l2", "act_grad"), lambda: ro.Into(torch.zeros(3, 4))])
@pytest.mark.parametrize("of", [ro.mul_sin, lambda a, b, retain: ro.point(a * b, "c", retain=retain).sin()])
def test_forms(path: Path, of: Callable[..., torch.Tensor], want: Callable) -> None:
    rand = random_leaves(path.device)
    a, b = rand(3, 4), rand(3, 4)
    asked = want()
    if isinstance(asked, ro.Into):
        asked = ro.Into(asked.buffer.to(path.device))
    kept = ro.Retained(c=asked)
    traced(of(a, b, retain=kept).sum())
    dc = torch.cos(a * b).detach()
    if isinstance(asked, ro.Into):
        assert_near(kept.c.grad, dc)
    else:
        assert_near(kept.c.l2, dc.norm())
        terms = (a * b * dc).detach()
        assert_near(kept.c.act_grad, terms.sum(), (terms.abs().sum() / terms.sum().abs()).item())  # ulp of the terms


def test_nested_requests(path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), ro.nn.RMSNorm(4), ro.nn.Point()).to(path.device)
    x = torch.randn(2, 4, device=path.device)
    with ro.retain(model) as dense, ro.retain(model, "*", ro.Stats("l2")) as stats:
        traced(model(x).square().sum())
    assert len(dense) == 3
    for name in dense:
        assert_near(stats[name].l2, dense[name].grad.norm())
