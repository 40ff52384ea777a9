"""Both cross entropies on targets of a few bits, which hold neither every class nor every ignored index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.class_loss_cases import OPS, TARGET, WIDTH, inputs_of, over_losses
from tests.conftest import Path
from tests.oracle import assert_near

pytestmark = over_losses

CASES = {
    "-100 is a class in uint8": (torch.uint8, 256, -100, (0, 100, 155, 156, 255)),
    "-100 is none in uint8": (torch.uint8, 200, -100, (0, 1, 156, 157, 199)),
    "classes that int8 does not hold": (torch.int8, 300, 1, (0, 1, 2, 127)),
}


def ours(name: str, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    if name == "cross_entropy":
        return OPS[name].call(F.linear(x, weight), target, **options)
    return OPS[name].call(x, weight, target, **options)


def torchs(name: str, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight), target.long(), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["eager", "create_graph", "compiled"])
def test_targets_of_8_bits(path: Path, name: str, how: str, case: str) -> None:
    dtype, classes, ignored, targets = CASES[case]
    g = torch.Generator().manual_seed(8)
    x, weight = (torch.randn(n, WIDTH, generator=g).to(path.device) for n in (len(targets), classes))
    target = torch.tensor(targets, dtype=dtype, device=path.device)
    found = []
    for loss in (torch.compile(ours, backend="aot_eager") if how == "compiled" else ours, torchs):
        leaf = x.clone().requires_grad_()
        y = loss(name, leaf, weight, target, ignore_index=ignored, reduction="none")
        (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=how == "create_graph")
        found.append((y.detach(), dx.detach()))
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 8)


def test_an_ignored_index_that_the_dtype_does_not_hold(path: Path, name: str) -> None:
    given = inputs_of(name, path.device)
    given[TARGET[name]] = torch.full((2, 3), -56, dtype=torch.int8, device=path.device)  # what 200 is in 8 bits
    given = [200 if isinstance(x, int) and x == -100 else x for x in given]
    if path.name == "reference":
        with pytest.raises(IndexError, match="Target -56 is out of bounds"):
            OPS[name].call(*given)
    else:
        assert OPS[name].call(*given).isnan().all()  # nobody waits for the GPU to look
