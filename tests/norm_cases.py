"""What the tests of the norms over the last dim share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import retainops as ro
from retainops.ops import _norm
from retainops.ops.norm import ADD_LAYER_NORM, ADD_RMS_NORM, LAYER_NORM, RMS_NORM
from retainops.registry import Op
from tests.oracle import all_points, assert_near, clones, eager, is_float, leaves, random_like

OPS = [RMS_NORM, LAYER_NORM, ADD_RMS_NORM, ADD_LAYER_NORM]
SUMS = OPS[2:]
over_ops = pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
over_sums = pytest.mark.parametrize("op", SUMS, ids=[op.name for op in SUMS])
in_rows_and_chunks = pytest.mark.parametrize("cut", ["whole rows", "chunks"])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def inputs_of(op: Op, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    made = op.sample(torch.Size(shape), dtype, device, torch.Generator().manual_seed(6))
    return [x.requires_grad_() if is_float(x) else x for x in made]


def with_eps(op: Op, inputs: Sequence[Any], eps: float) -> list[Any]:
    """The same inputs with another eps: a large one where what is left of a row is rounding errors."""
    at = next(i for i, x in enumerate(inputs) if isinstance(x, float))
    return [eps if i == at else x for i, x in enumerate(inputs)]


def cut_rows(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few dozen columns as one tile, or in chunks of 32, as rows are that are wider than registers."""
    if cut == "chunks":
        tilings = [name for name in vars(_norm) if name.startswith(("FORWARD", "BACKWARD"))]
        for name in (*tilings, "PROJECTIONS"):
            monkeypatch.setattr(_norm, name, getattr(_norm, name)._replace(widest=16, elements=512, chunk=32))


def several(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def joined(op: Op) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """The op and its definition with all outputs in one tensor, for what takes functions of one output."""

    def ours(*inputs: Any, retain: ro.Retained | None = None) -> torch.Tensor:
        return torch.cat(several(op.call(*inputs, retain=retain)), -1)

    def theirs(*inputs: Any) -> torch.Tensor:
        return torch.cat(several(op.reference(*inputs)), -1)

    return ours, theirs


def differentiate(outputs: Any, dys: Any = None) -> list[torch.Tensor]:
    outputs = several(outputs)
    dys = [random_like(y, seed) for seed, y in enumerate(outputs)] if dys is None else dys
    torch.autograd.backward(outputs, dys)
    return list(dys)


def compare(op: Op, *ours: Any, scale: float = 1.0) -> None:
    """Outputs, gradients and retained gradients are eager's."""
    theirs, kept = clones(ours), all_points(op)
    outputs = op.call(*ours, retain=kept)
    want, values = eager(op, theirs)
    for y, w in zip(several(outputs), several(want), strict=True):
        assert_near(y, w, scale)
        assert y.stride() == w.stride()
    differentiate(want, differentiate(outputs))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_near(a.grad, b.grad, 2 * scale)
    for name, slot in kept.items():
        assert_near(slot.grad, values[name].grad, 2 * scale)


def launched(call: Callable[[], Any]) -> list[tuple[str, int, dict[str, Any]]]:
    """Names, programs and arguments of the kernels that a call launches. They are executed nowhere."""
    simulated_gpu = pytest.importorskip("retainops.testing").simulated_gpu
    found: list[Any] = []
    with simulated_gpu(engine=found.append, compiles=False):
        call()
    return [(one.name, one.grid[0], dict(zip(one.fn.arg_names, one.args, strict=True))) for one in found]
