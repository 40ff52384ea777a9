"""How elementwise ops run on the kernels of kernels/pointwise.py, and the record of one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from retainops.arrivals import last_first
from retainops.dispatch import HAS_TRITON
from retainops.ops import _fused
from retainops.ops._check import refuses_dtypes
from retainops.ops._plan import Plan, plan
from retainops.ops._saved import Unread
from retainops.ops._walk import Walk, walk
from retainops.registry import Op, PointInfo
from retainops.slots import Slot

if HAS_TRITON:
    from retainops.kernels import pointwise as kernels
    from retainops.ops._launch import launch
    from retainops.ops._operands import Grad, Kept, KeptSum, gradients

Maths = Callable[[], tuple[Any, Any]]
"""Makes the `@triton.jit` functions (FORWARD, BACKWARD) that kernels/pointwise.py describes."""


def functions_of(module: str, *names: str, narrow: bool = False) -> tuple[Any, ...]:
    """Functions of a module of kernels/, by name; narrow: those of kernels/narrow.py, as far as it has them."""
    wide = importlib.import_module(f"retainops.kernels.{module}")
    first = importlib.import_module("retainops.kernels.narrow") if narrow else wide
    return tuple(getattr(first, name, getattr(wide, name)) for name in names)


DY = -1
"""In the place of an input: the gradient that arrives."""


class Pointwise:
    """An elementwise op on its kernels.

    Args:
        maths: makes its functions; called where triton is installed, at the first launch.
        grads: how many of the inputs, from the first one, can have a gradient.
        unread: places of inputs that backward does not read.
        equal: from the place of an input to that of another one, or DY, which has the same gradient where none of them
            is broadcast: it is returned for both, as eager PyTorch does, and written once.
        narrow: makes those of its functions that are for results of 16 bits; default: `maths`.
        one_access: which of "forward" and "backward" do best with one 128-bit access a thread to tensors of 16 bits: on
            an H200 short functions that take 32 registers or fewer then, and more with two. (In backward that makes
            twice as many shares of statistics, which cost more than it gains.)
    """

    def __init__(
        self,
        maths: Maths,
        grads: int,
        unread: Sequence[int] = (),
        equal: Mapping[int, int] | None = None,
        narrow: Maths | None = None,
        one_access: Sequence[str] = (),
    ) -> None:
        self.maths = functools.cache(maths)
        self.narrow = functools.cache(narrow) if narrow else None
        self.grads = grads
        self.unread = unread
        self.equal = equal or {}
        self.one_access = one_access

    def keeps(self, inputs: Sequence[Any], outputs: Sequence[torch.Tensor | None], values: bool) -> Sequence[Any]:
        unread = () if values else self.unread
        if not unread:
            return inputs
        return [Unread(x) if i in unread and isinstance(x, torch.Tensor) else x for i, x in enumerate(inputs)]

    def operands(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What the kernels take for the inputs."""
        return tuple(inputs)

    def gradients(self, inputs: Sequence[Any], shape: torch.Size, needed: Sequence[bool]) -> tuple[Any, ...]:
        """What the backward kernel writes, one for each of its first GRADS inputs."""
        return gradients(inputs[: self.grads], shape, needed)

    def returned(self, grads: Sequence[Any], inputs: Sequence[Any]) -> list[torch.Tensor | None]:
        """The gradient of each input, once it is written."""
        found = [grad.finish() if isinstance(grad, Grad) else grad for grad in grads]
        return found + [None] * (len(inputs) - len(grads))

    def forward(self, inputs: Sequence[Any], layout: Plan) -> tuple[torch.Tensor, ...]:
        y, x = layout.empty(), self.operands(inputs)
        kernel, constants = self.forward_kernel(len(x), y.dtype)
        launch(kernel, y.shape, y.dtype, x, y, walked=self.walk("forward"), **constants)
        return (y,)

    def walk(self, direction: str) -> Callable[..., Walk] | None:
        """How its tensors are walked, if not by default."""
        return functools.partial(walk, accesses=1) if direction in self.one_access else None

    def functions(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """FORWARD and BACKWARD for results of this dtype."""
        return self.narrow() if self.narrow and dtype.itemsize == 2 else self.maths()

    def forward_kernel(self, inputs: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """The kernel, and what it takes besides operands and tiles."""
        forward, _ = self.functions(dtype)
        return kernels.pointwise_fwd_kernel, {"FORWARD": forward, "INPUTS": inputs}

    def backward_kernel(self, inputs: int, grads: int, points: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """The same for the backward kernel."""
        _, backward = self.functions(dtype)
        counts = {"INPUTS": inputs, "GRADS": grads, "POINTS": points}
        return kernels.pointwise_bwd_kernel, {"BACKWARD": backward, **counts}

    def backward(
        self,
        op: Op,
        inputs: Sequence[Any],
        dys: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        slots: Mapping[str, Slot],
        leaves: Mapping[str, torch.Tensor],
    ) -> list[torch.Tensor | None]:
        (dy,) = dys
        assert dy is not None
        shared = self._shared(inputs, dy, needed)
        written = [need and i not in shared for i, need in enumerate(needed)]
        x, dx = self.operands(inputs), self.gradients(inputs, dy.shape, written)
        kept = {name: _kept(op, inputs, slots, leaves[name], name, dy.shape) for name in last_first(leaves)}
        dc = tuple(kept.get(p.name) for p in op.points)
        # A kernel takes no empty tuple: one point that nobody asked for stands for none.
        kernel, constants = self.backward_kernel(len(x), len(dx), len(dc), dy.dtype)
        launch(kernel, dy.shape, dy.dtype, x, dy, dx, dc or (None,), walked=self.walk("backward"), **constants)
        grads = self.returned(dx, inputs)
        for i, j in shared.items():
            grads[i] = dy if j == DY else grads[j]
        found = {name: c.finish() for name, c in kept.items()}
        return grads + [found.get(p.name) for p in op.points]

    def _shared(self, inputs: Sequence[Any], dy: torch.Tensor, needed: Sequence[bool]) -> dict[int, int]:
        """Of `equal`, what holds for these inputs."""
        shared: dict[int, int] = {}
        for i, j in self.equal.items():
            if not (needed[i] and (j == DY or needed[j])):
                continue
            x, other = _layout(inputs[i]), _layout(dy if j == DY else inputs[j])
            alike = x.shape == other.shape == dy.shape and x.dtype == other.dtype
            if alike and (j == DY or x.stride() == other.stride()):
                shared[i] = j
        return shared


def _layout(x: torch.Tensor | Unread) -> torch.Tensor:
    return x.like if isinstance(x, Unread) else x


def _kept(
    op: Op,
    inputs: Sequence[Any],
    slots: Mapping[str, Slot],
    leaf: torch.Tensor,
    name: str,
    shape: torch.Size,
) -> Kept | KeptSum:
    slot = slots[name]
    if leaf.shape.numel() == shape.numel():
        return Kept(op.name, slot, leaf, shape)
    return KeptSum(op.name, slot, leaf, shape, lambda: _value(op, inputs, name))


def _value(op: Op, inputs: Sequence[Any], name: str) -> torch.Tensor:
    """The value of a point, as the kernels hold it."""
    values: dict[str, torch.Tensor] = {}

    def point(at: str, value: torch.Tensor) -> torch.Tensor:
        values[at] = value
        return value

    floats = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs]
    held = [x.to(torch.promote_types(x.dtype, torch.float32)) if f else x for x, f in zip(inputs, floats, strict=True)]
    op.reference(*held, point)
    return values[name]


def pointwise(
    call: Callable[..., torch.Tensor],
    formula: str,
    reference: Callable[..., torch.Tensor],
    on_kernels: Pointwise,
    *,
    name: str,
    points: Sequence[PointInfo],
    sample: Callable[..., tuple[Any, ...]],
    refuses: Callable[..., str | None] = refuses_dtypes,
) -> Op:
    """Register an elementwise op.

    Args:
        call, formula, reference, name, points, sample, refuses: as in `Op`.
        on_kernels: how it runs on the kernels.
    """
    return _fused.register(
        on_kernels,
        name=name,
        call=call,
        formula=formula,
        points=tuple(points),
        reference=reference,
        refuses=refuses,
        sample=sample,
        traffic=functools.partial(_traffic, reference, on_kernels),
    )


def _traffic(reference: Callable[..., torch.Tensor], on_kernels: Pointwise, *inputs: Any) -> tuple[int, int, int]:
    """Forward reads the inputs and writes y; backward reads inputs and dy, and writes the inputs' gradients."""
    layout = plan(reference, inputs)
    sizes = [x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0 for x in inputs]
    (out,) = layout.outputs
    y = out.shape.numel() * out.dtype.itemsize
    read = sum(size for i, size in enumerate(sizes) if i not in on_kernels.unread)
    whole = [isinstance(x, torch.Tensor) and x.shape == out.shape and x.dtype == out.dtype for x in inputs]
    shared = {i for i, j in on_kernels.equal.items() if whole[i] and (j == DY or whole[j])}
    point = max(shape.numel() * dtype.itemsize for shape, dtype in layout.points.values())
    written = sum(size for i, size in enumerate(sizes[: on_kernels.grads]) if i not in shared)
    return sum(sizes) + y, read + y + written, point


def normal(tensors: int, *others: Any) -> Callable[..., tuple[Any, ...]]:
    """The `sample` of an op that takes this many tensors of one shape, and then `others`."""

    def sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
        drawn = (
            torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
            for _ in range(tensors)
        )
        return *(x.to(device, dtype) for x in drawn), *others

    return sample
