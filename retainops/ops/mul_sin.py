"""mul_sin: y = sin(c), c = a * b. The derivation is docs/ops/mul_sin.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from retainops.dispatch import HAS_TRITON, run
from retainops.ops._backward import kernels_can, save_inputs, saved_inputs, through_reference
from retainops.ops._check import check_elementwise, refuses_dtypes
from retainops.registry import Op, Point, PointInfo, register
from retainops.retained import Retained
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import mul_sin as kernels
    from retainops.ops import _tiles


def mul_sin(a: torch.Tensor | float, b: torch.Tensor | float, *, retain: Retained | None = None) -> torch.Tensor:
    """sin(a * b) in one kernel, with the gradient of the product on request.

    Args:
        a, b: tensors of any floating dtype, layout and device whose shapes broadcast; one of them may be a Python
            number. dtypes are promoted as in `torch.sin(a * b)`.
        retain: `Retained("c")` to keep the gradient of the loss with respect to c = a * b.

    Returns:
        sin(a * b), of the broadcast shape and the promoted dtype. The interior c is held in float32 (float64 for
        float64), so in float16 and bfloat16 the result is nearer to the true one than eager's.

    Raises:
        TypeError: an input is neither a tensor nor a number, or `retain` is not a `Retained`.
        RuntimeError: the shapes do not broadcast, the devices differ, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than c.

    Points:
        c = a * b, of the broadcast shape.

    Example:
        >>> kept = ro.Retained("c")
        >>> ro.mul_sin(a, b, retain=kept).sum().backward()
        >>> kept.c.grad  # cos(a * b)

    Source: the activation of SIREN, Sitzmann et al. 2020 (arXiv 2006.09661), as sin(w0 * x).
    """
    check_elementwise("mul_sin", a=a, b=b)
    return run(MUL_SIN, (a, b), retain)


def mul_sin_reference(a: Any, b: Any, point: Point) -> torch.Tensor:
    """The definition."""
    c = point("c", a * b)
    return torch.sin(c)


class MulSin(torch.autograd.Function):
    """The fused op: two kernels, and one more differentiable input, the slot of c."""

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, c: torch.Tensor | None, slots: Any, dtype: torch.dtype) -> torch.Tensor:
        save_inputs(ctx, a, b)
        ctx.slots, ctx.leaves = slots, {} if c is None else {"c": c}
        ctx.set_materialize_grads(False)
        a, b = _tiles.tensors(dtype, a, b)
        y = _tiles.result(dtype, a, b)
        _tiles.launch(kernels.mul_sin_fwd_kernel, y.shape, dtype, a, b, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        inputs, slots, leaves = saved_inputs(ctx), ctx.slots, ctx.leaves
        if dy is None:  # no gradient arrives: none leaves, as in eager
            return (None,) * 5
        needs_a, needs_b, needs_c, *_ = ctx.needs_input_grad
        if not kernels_can(dy):
            return *through_reference(MUL_SIN, inputs, (needs_a, needs_b), slots, leaves, dy), None, None
        a, b = _tiles.tensors(dy.dtype, *inputs)
        da, db = _tiles.Grad(a, dy.shape, needs_a), _tiles.Grad(b, dy.shape, needs_b)
        dc = _tiles.Kept("mul_sin", slots["c"], leaves["c"], dy.shape, dy.dtype, dy.device) if needs_c else None
        _tiles.launch(kernels.mul_sin_bwd_kernel, dy.shape, dy.dtype, a, b, dy, da, db, dc)
        return da.finish(), db.finish(), dc.finish() if dc else None, None, None


def _launch(inputs: tuple[Any, Any], slots: Mapping[str, Slot]) -> torch.Tensor:
    a, b = inputs
    dtype = torch.result_type(a, b)
    c = None
    if "c" in slots:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        c = slots["c"].bind("mul_sin", shape, dtype, tensors[0].device)
    return MulSin.apply(a, b, c, slots, dtype)


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in "ab")


def _traffic(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int]:
    c = torch.broadcast_shapes(a.shape, b.shape).numel() * torch.result_type(a, b).itemsize
    inputs = a.numel() * a.element_size() + b.numel() * b.element_size()
    return inputs + c, c + 2 * inputs, c  # read a, b, write y; read a, b, dy, write da, db; write dc


MUL_SIN = register(
    Op(
        name="mul_sin",
        call=mul_sin,
        formula="sin(a * b)",
        points=(PointInfo("c", "a * b", "broadcast of a and b"),),
        reference=mul_sin_reference,
        launch=_launch,
        refuses=refuses_dtypes,
        sample=_sample,
        traffic=_traffic,
    )
)
