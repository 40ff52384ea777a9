"""What is asked for changes no order of summation, wherever in memory the answers and the inputs lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import retainops as ro
from tests.conftest import Path, random_leaves

SHAPE = (3, 12, 9, 10)
WANTS: dict[str, Callable[[str], Any]] = {
    "grad": lambda _: ro.Stats("l2", grad=True),
    "into": lambda device: ro.Into(torch.zeros(12, 3, 10, 9, device=device).transpose(0, 1).mT),
    "rows": lambda _: ro.Stats("l2", "act_grad", over="rows"),
    "channels": lambda _: ro.Stats("l2", "act_grad", over="channels"),
}
CALLS: dict[str, tuple[str, tuple[int, ...], Callable[..., torch.Tensor]]] = {
    "mul_sin": ("c", (12, 1, 1), lambda x, w, kept: ro.mul_sin(x, w, retain=kept)),
    "scale_shift": ("scaled", (9, 1), lambda x, w, kept: ro.scale_shift(x, w, w, retain=kept)),
    "softmax": ("scaled", (10,), lambda x, w, kept: ro.softmax(x, 1.0, w, retain=kept)),
    "rms_norm": ("xhat", (10,), lambda x, w, kept: ro.rms_norm(x, w, retain=kept)),
    "layer_norm": ("xhat", (10,), lambda x, w, kept: ro.layer_norm(x, w, w, retain=kept)),
}


@pytest.mark.parametrize("memory", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("want", WANTS)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_broadcast_inputs_have_the_same_bits(
    kernels: Path, name: str, want: str, memory: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retainops.ops._replay.PLAIN", 1)
    point, small, call = CALLS[name]

    def gradients(kept: ro.Retained | None) -> tuple[torch.Tensor, ...]:
        rand = random_leaves(kernels.device)
        x, dy = (in_memory_as(rand(*SHAPE, requires_grad=False), memory) for _ in "xy")
        x, w = x.requires_grad_(), rand(*small)
        return torch.autograd.grad(call(x, w, kept), (x, w), dy)

    for _ in range(3 if want == "grad" else 1):  # launched, noted, and done again
        kept, expected = (ro.Retained(**{point: WANTS[want](kernels.device)}) for _ in "12")
        assert all(map(torch.equal, gradients(None), gradients(kept)))
    with ro.backend("reference"):
        gradients(expected)
    read = "grad" if want == "into" else "l2"
    torch.testing.assert_close(getattr(kept[point], read), getattr(expected[point], read), rtol=1e-4, atol=1e-4)


def in_memory_as(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """A copy whose dims lie in this order in memory, outermost first."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
