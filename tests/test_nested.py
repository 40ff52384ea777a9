"""Jagged nested tensors: ops take them where PyTorch's own do; their points cannot be asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

import retainops as ro

NORMS: dict[str, tuple[Callable, Callable]] = {
    "rms_norm": (
        lambda x, w, b: ro.rms_norm(x, w) + b,
        lambda x, w, b: F.rms_norm(x, (4,), w, eps=1e-6) + b,
    ),
    "layer_norm": (ro.layer_norm, lambda x, w, b: F.layer_norm(x, (4,), w, b)),
    "add_rms_norm": (
        lambda x, w, b: ro.add_rms_norm(x, 2 * x, w)[0] + b,
        lambda x, w, b: F.rms_norm(3 * x, (4,), w, eps=1e-6) + b,
    ),
    "add_layer_norm": (
        lambda x, w, b: ro.add_layer_norm(x, 2 * x, w, b)[0],
        lambda x, w, b: F.layer_norm(3 * x, (4,), w, b),
    ),
}


def jagged() -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randn(n, 4, generator=g) for n in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are new
        return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_jagged_rows(name: str) -> None:
    ours, torchs = NORMS[name]
    found = []
    for norm in (ours, torchs):
        x, w, b = jagged(), torch.linspace(1, 2, 4).requires_grad_(), torch.linspace(-1, 1, 4).requires_grad_()
        y = norm(x, w, b).values()
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        found.append((y.detach(), x.grad.values(), w.grad, b.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", ["point", "mul_sin", "rms_norm"])
def test_a_point_of_one_is_refused_in_words(op: str) -> None:
    calls: dict[str, Callable] = {
        "point": lambda x: ro.point(x * 1, "c", retain=ro.Retained("c")),
        "mul_sin": lambda x: ro.mul_sin(x, 2.0, retain=ro.Retained("c")),
        "rms_norm": lambda x: ro.rms_norm(x, retain=ro.Retained("xhat")),
    }
    with pytest.raises(
        RuntimeError, match=rf"{op}: point '\w+' is a nested tensor.* x.values\(\), or leave out retain="
    ):
        calls[op](jagged())
