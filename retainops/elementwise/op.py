"""A traced function as an op: its reference, its kernels and its record, which is in no registry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from retainops.elementwise import cache
from retainops.elementwise.codegen import Generated, generate
from retainops.elementwise.comparisons import comparisons, refuses_bounds, refuses_comparisons, shared_bounds
from retainops.elementwise.hoist import rest
from retainops.elementwise.reference import reference_of
from retainops.elementwise.trace import Traced, sources
from retainops.ops import _fused
from retainops.ops._check import KERNEL_DTYPES, refuses_dtypes
from retainops.ops._plan import plan
from retainops.ops._pointwise import Pointwise
from retainops.registry import Op, PointInfo
from retainops.slots import Slot


class OnKernels(Pointwise):
    """A generated pair of kernels: they take the inputs that the output depends on."""

    def __init__(self, traced: Traced, generated: Generated) -> None:
        super().__init__(
            lambda: _kernels(generated),
            grads=len(generated.graded),
            unread=[i for i in range(len(traced.parameters)) if i not in generated.read],
        )
        self._generated = generated

    def operands(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(inputs[i] for i in self._generated.inputs)

    def gradients(self, inputs: Sequence[Any], shape: torch.Size, needed: Sequence[bool]) -> tuple[Any, ...]:
        from retainops.ops._operands import gradients

        graded = self._generated.graded
        return gradients([inputs[i] for i in graded], shape, [needed[i] for i in graded])

    def returned(self, grads: Sequence[Any], inputs: Sequence[Any]) -> list[torch.Tensor | None]:
        found = dict(zip(self._generated.graded, super().returned(grads, grads), strict=True))
        return [found.get(i) for i in range(len(inputs))]

    def forward_kernel(self, inputs: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        return self.maths()[0], {}

    def backward_kernel(self, inputs: int, grads: int, points: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        return self.maths()[1], {}


def _kernels(generated: Generated) -> tuple[Any, Any]:
    module = cache.load(generated.name, generated.source)
    return getattr(module, f"{generated.name}_fwd_kernel"), getattr(module, f"{generated.name}_bwd_kernel")


def record(call: Callable[..., torch.Tensor], traced: Traced, generated: Generated) -> Op:
    """The op of a traced function."""
    reference = reference_of(traced)
    on_kernels = OnKernels(traced, generated)
    compared, bounds = comparisons(traced), shared_bounds(traced)

    @functools.cache
    def without(*numbered: bool) -> tuple[Op, Callable[..., tuple[Any, ...]]] | None:
        found = rest(traced, numbered)
        return found and (record(call, found.traced, generate(found.traced)), found.arguments)

    def hoisted(inputs: Sequence[Any]) -> tuple[Op, tuple[Any, ...]] | None:
        found = without(*[not isinstance(x, torch.Tensor) for x in inputs])
        return found and (found[0], found[1](inputs))

    def launch(inputs: tuple[Any, ...], slots: Mapping[str, Slot]) -> Any:
        if found := hoisted(inputs):
            return found[0].launch(found[1], slots)
        # What has no gradient must not make the output require one.
        own = (x.detach() if _is_idle(x, i, generated) else x for i, x in enumerate(inputs))
        return _fused.launch(op, on_kernels, tuple(own), slots)

    def refuses(*given: Any) -> str | None:
        inputs = given if len(given) == len(traced.parameters) else _completed(traced, given)
        if found := hoisted(inputs):
            return found[0].refuses(*found[1])
        return (
            _refuses(traced, generated, reference, inputs)
            or refuses_comparisons(compared, inputs)
            or refuses_bounds(bounds, inputs)
        )

    def traffic(*inputs: Any) -> tuple[int, int, int]:
        if found := hoisted(inputs):
            return found[0].traffic(*found[1])
        layout = plan(reference, inputs)
        sizes = [x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0 for x in inputs]
        (y,) = (out.shape.numel() * out.dtype.itemsize for out in layout.outputs)
        read, written = (sum(sizes[i] for i in places) for places in (generated.read, generated.graded))
        point = max((shape.numel() * dtype.itemsize for shape, dtype in layout.points.values()), default=0)
        return sum(sizes[i] for i in generated.inputs) + y, read + y + written, point

    op = Op(
        name=traced.name,
        call=call,
        formula=generated.formulas[""],
        points=tuple(
            PointInfo(name, generated.formulas[name], _shape(traced, node), inputs=tuple(sources(traced, node)))
            for name, node in traced.names.items()
        ),
        reference=reference,
        launch=launch,
        refuses=refuses,
        sample=lambda *where: tuple(_sample(traced, i, *where) for i in range(len(traced.parameters))),
        traffic=traffic,
    )
    return op


def _completed(traced: Traced, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs with the defaults of those that `ro.explain` was not given."""
    left = traced.parameters[len(inputs) :]
    if len(inputs) > len(traced.parameters) or any(p.default is p.empty for p in left):
        names = ", ".join(p.name for p in traced.parameters)
        raise TypeError(f"{traced.name}: {len(inputs)} inputs were given; expected {names}, or those without a default")
    return (*inputs, *(p.default for p in left))


def _is_idle(x: Any, place: int, generated: Generated) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad and place not in generated.graded


def _shape(traced: Traced, node: Node) -> str:
    """The shape of a node, in words."""
    *names, last = (traced.parameters[i].name for i in sources(traced, node, differentiably=False))
    return f"broadcast of {', '.join(names)} and {last}" if names else f"of {last}"


def _refuses(
    traced: Traced, generated: Generated, reference: Callable[..., torch.Tensor], inputs: tuple[Any, ...]
) -> str | None:
    nodes = traced.inputs
    conditions = [inputs[i] for i in generated.inputs if nodes[i] in traced.conditions]
    values = [inputs[i] for i in generated.inputs if nodes[i] not in traced.conditions]
    for x in conditions:
        if type(x) is not bool and _dtype(x) != torch.bool:
            return f"a condition is {getattr(x, 'dtype', type(x).__name__)}, and the kernels take torch.bool"
    if why := refuses_dtypes(*values):
        return why
    if not any(isinstance(inputs[i], (float, torch.Tensor)) for i in generated.graded):
        return "the result is made of integers, and the kernels compute in floating point"
    devices = {x.device for x in (*values, *conditions) if isinstance(x, torch.Tensor)}
    if len(devices) > 1:
        return f"the inputs are on {' and '.join(map(str, devices))}"
    return _refuses_float64(traced, reference, inputs) if any(_dtype(x) == torch.float64 for x in values) else None


def _refuses_float64(traced: Traced, reference: Callable[..., torch.Tensor], inputs: tuple[Any, ...]) -> str | None:
    """Interiors are held in the dtype of the result: float64 ones must not be less than that, nor others more."""
    if plan(reference, inputs).outputs[0].dtype != torch.float64:
        return "an input is float64 and the result is not, and the kernels hold interiors in one dtype"
    floats = {node for node, x in zip(traced.inputs, inputs, strict=True) if _dtype(x) in KERNEL_DTYPES}
    for node in traced.steps:
        operands = [x for x in node.meta["step"].operands if isinstance(x, Node)]
        if node in traced.conditions:
            continue
        if floats.intersection(operands):
            floats.add(node)
        elif traced.conditions.intersection(operands):
            return "a value made of conditions and numbers has PyTorch's default dtype, and the result is float64"
    return None


def _dtype(x: Any) -> torch.dtype | None:
    return x.dtype if isinstance(x, torch.Tensor) else None


def _sample(
    traced: Traced, i: int, shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Any:
    default = traced.parameters[i].default
    if default is not traced.parameters[i].empty:
        return default
    x = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(device)
    return x > 0 if traced.inputs[i] in traced.conditions else x.to(dtype)
