"""Which path a call takes, and why.

There are two: the Triton kernels, and the reference (the op's definition in plain PyTorch, with the same semantics
and points). The kernels take dense floating-point tensors on a GPU; whatever they cannot take goes to the reference,
so an op accepts all that eager PyTorch accepts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from retainops.buffers import Into, check_apart, share_memory
from retainops.names import near
from retainops.points import check_no_transform, check_not_recorded, no_grad, reader, records
from retainops.registry import Op, find
from retainops.retained import Retained
from retainops.shards import is_dtensor
from retainops.slots import Slot
from retainops.wants import is_of_attention

BACKENDS = ("auto", "triton", "reference")
HAS_TRITON = importlib.util.find_spec("triton") is not None

_PLAIN = {type(None), bool, int, float, str}  # to ask whether something is a `Number` takes ten times as long
_kernel_devices = {"cuda"}
_chosen: ContextVar[str | None] = ContextVar("retainops_backend", default=None)


def backend_name() -> str:
    """The backend in force here: "auto", "triton" or "reference"."""
    return _chosen.get() or _default or _of_environment()


def _named(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    return backend


def _of_environment() -> str:
    return _named(os.environ.get("RETAINOPS_BACKEND", "auto"), "RETAINOPS_BACKEND")


try:
    _default = _of_environment()
except ValueError:  # the first call says so: at import, the command line could not say it in one line
    _default = ""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the path of every call in this thread inside the `with`.

    Backward on a GPU runs in a thread of its own. So a checkpoint, which calls ops in backward again, needs the `with`
    inside the function that is checkpointed, or the environment variable.

    Args:
        name: "auto" (the kernels where they can, else the reference), "triton" (the kernels, or an error that
            says why not), "reference". The environment variable RETAINOPS_BACKEND sets the default; where
            that is unknown, the first eager call of an op raises.

    Raises:
        ValueError: an unknown name.
        RuntimeError: "triton" where triton is not installed or there is no device for it.

    Example:
        >>> with ro.backend("reference"):
        ...     y = ro.mul_sin(a, b)
    """
    if _named(name, "backend") == "triton":
        if not HAS_TRITON:
            raise RuntimeError('backend: "triton" was asked for and triton is not installed; pip install triton')
        if _kernel_devices == {"cuda"} and not torch.cuda.is_available():
            raise RuntimeError(
                'backend: "triton" was asked for and there is no GPU; use "auto" or "reference", or simulate one '
                "with retainops.testing.simulated_gpu()"
            )
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextlib.contextmanager
def kernels_on(device_type: str) -> Iterator[None]:
    """Inside the `with`, tensors on this type of device take the kernels too (a simulated GPU's are "cpu")."""
    added = device_type not in _kernel_devices
    _kernel_devices.add(device_type)
    try:
        yield
    finally:
        if added:
            _kernel_devices.discard(device_type)


def ambient() -> str | None:
    """What is going on around this call that must see PyTorch's own operations, or None."""
    if torch._C._len_torch_dispatch_stack() and torch._C._functorch.peek_interpreter_stack() is None:
        return "a dispatch mode (fake tensors, tracing, counting) is active"
    return transformed()


def transformed() -> str | None:
    """What is going on around this call for which an operation must have all its derivatives, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.jit.is_tracing():
        return "torch.jit is tracing"
    return None


def plain(t: torch.Tensor) -> bool:
    """Whether a kernel can read this tensor's memory as it stands."""
    return (t.is_cuda or t.device.type in _kernel_devices) and dense(t)  # to ask for the device's type takes longest


def dense(t: torch.Tensor) -> bool:
    """Whether this tensor, on any device, is its memory read by its strides, and nothing else."""
    return (
        (type(t) is torch.Tensor or type(t) is torch.nn.Parameter)
        and t.layout is torch.strided
        and not t.is_meta
        and not t.is_neg()
        and not t._is_zerotensor()
        and torch._C._has_storage(t)  # a batched tensor (is_grads_batched, vmap) has none
    )


def why_reference(op: Op, inputs: tuple[Any, ...]) -> str | None:
    """Why this call takes the reference path; None: it takes the kernels."""
    if backend_name() == "reference":
        return 'the backend is "reference"'
    if not HAS_TRITON:
        return "triton is not installed"
    if around := ambient():
        return around
    for x in inputs:
        if isinstance(x, torch.Tensor):
            if not plain(x):
                return _not_plain(x)
        elif type(x) not in _PLAIN and not isinstance(x, (numbers.Number, str)):
            return f"an input is a {type(x).__name__}, which stands for a tensor"
    return op.refuses(*inputs)


def _not_plain(t: torch.Tensor) -> str:
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"an input is a {type(t).__name__}, a subclass of Tensor"
    if t.device.type not in _kernel_devices:
        return f"an input is on {t.device}, and the kernels run on {' and '.join(sorted(_kernel_devices))}"
    if t.layout != torch.strided:
        return f"an input has the layout {t.layout}"
    return "an input is a lazily negated view" if t.is_neg() else "an input is a batched tensor"


def arrived(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs, once collectives that are to bring some of them are through: a row-wise layer's output is such a one."""
    if not any(hasattr(type(x), "trigger_wait") for x in inputs):
        return inputs
    return tuple(_Arrived.apply(x) if hasattr(type(x), "trigger_wait") else x for x in inputs)


class _Arrived(torch.autograd.Function):
    """The tensor inside an AsyncCollectiveTensor, which no kernel can read."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        return x.trigger_wait().detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def run(op: Op, inputs: tuple[Any, ...], retain: Retained | None) -> Any:
    """Call an op: check the request, choose the path, take it."""
    slots = {} if retain is None else requested(op, inputs, retain)
    if torch.compiler.is_compiling():  # first, and alone: all that follows is nothing Dynamo can trace
        return op.reference(*inputs, reader(op.name, slots))
    why = why_reference(op, inputs)
    if why is not None and (there := arrived(inputs)) is not inputs:
        inputs, why = there, why_reference(op, there)
    if why is None:
        return op.launch(inputs, slots)
    if backend_name() == "triton":
        raise RuntimeError(
            f'{op.name}: the backend is "triton", and the kernels cannot take this call: {why}; '
            'use backend("auto") to let it take the reference path'
        )
    return op.reference(*inputs, reader(op.name, slots))


def requested(op: Op, inputs: tuple[Any, ...], retain: Retained) -> Mapping[str, Slot]:
    """The slots of a request, once it is known to be one that this call can answer.

    Raises:
        TypeError: `retain` is not a `Retained`.
        KeyError: it names a point that the op does not have.
        RuntimeError: no gradient will reach the points, or none could be kept (torch.func, torch.export).
        ValueError: an `Into` buffer shares memory with an input, or is a DTensor where no input is, or what is wanted
            is for points of attention.
    """
    if not isinstance(retain, Retained):
        raise TypeError(
            f"{op.name}: retain is {type(retain).__name__}; expected retainops.Retained, "
            f'such as Retained("{op.points[0].name}")'
        )
    names = [p.name for p in op.points]
    for name in retain:
        if name not in names:
            there = f"its points are: {', '.join(names)}{_meant(op, name, names)}"
            raise KeyError(f"{op.name}: unknown point '{name}'; {there}")
    if op.kind != "attention":
        for slot in retain.values():
            want = slot.want
            if want is None:
                continue
            if is_of_attention(want):
                raise ValueError(
                    f"{op.name}: point '{slot.name}' was asked for {want}, which is for points of attention; ask "
                    "for the gradient, or for Stats over the tensor, rows or channels"
                )
    check_not_recorded(op.name, next(iter(retain)))
    check_no_transform(op.name)
    if torch.compiler.is_compiling():
        return retain  # what is left to check is nothing Dynamo can trace; taps check what they can
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    if not (records() and any(t.requires_grad for t in tensors)):
        raise no_grad(op.name, next(iter(retain)))
    for p in op.points:
        if p.inputs is not None and p.name in retain and not p.requires_grad(inputs):
            raise no_grad(op.name, p.name, _named_inputs(op, p.inputs))
    check_apart(op.name, {name: slot.want for name, slot in retain.items()})
    for slot in retain.values():
        if not isinstance(slot.want, Into):
            continue
        if not any(map(is_dtensor, tensors)):
            slot.want.check_kind(op.name, slot.name, of_dtensor=False)
        if any(share_memory(slot.want.buffer, t) for t in tensors):
            raise ValueError(
                f"{op.name}: the Into buffer for point '{slot.name}' shares memory with an input, which backward "
                "still reads; pass a buffer of its own"
            )
    return retain


def _meant(op: Op, name: str, names: list[str]) -> str:
    if torch.compiler.is_compiling():  # signatures are nothing Dynamo can trace
        return ""
    if name in inspect.signature(op.reference).parameters:
        return f"; {name} is an input: after backward its gradient is {name}.grad, if it requires grad"
    return near(name, names)


def _named_inputs(op: Op, places: Sequence[int]) -> str:
    names = list(inspect.signature(op.reference).parameters)
    return ", ".join(names[i] for i in places)


def explain(op: Callable[..., Any] | str, *inputs: Any) -> str:
    """Say in a sentence which path a call takes, and why.

    Args:
        op: a function of retainops, or its name.
        *inputs: what it would be called with; those that have a default may be left out.

    Raises:
        KeyError: not an op of retainops; the message lists them.
        TypeError: an input without a default is left out, or none is a tensor.

    Example:
        >>> ro.explain(ro.mul_sin, torch.ones(3), 2.0)
        'mul_sin takes the reference path: an input is on cpu, and the kernels run on cuda.'
    """
    record, inputs = find(op), arrived(inputs)
    _check_given(op, record, inputs)
    why = why_reference(record, inputs)
    if record.kind == "attention":
        path = "the Triton kernels" if why is None else f"the reference path: {why}"
        return f"{record.name}'s output and its gradients are PyTorch's own; its scores, if asked for, take {path}."
    if why is None:
        where = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        return f"{record.name} takes the Triton kernels: every input is a dense floating-point tensor on {where}."
    return f"{record.name} takes the reference path: {why}."


def _check_given(op: Callable[..., Any] | str, record: Op, inputs: tuple[Any, ...]) -> None:
    """Raise if an input without a default is missing, or none is a tensor, so that there is no path to speak of."""
    # Another name of an op has other defaults than the record knows.
    if not isinstance(op, str) or op == record.name:
        call = op if callable(op) and not isinstance(op, torch.nn.Module) else record.call
        fused = getattr(call, "op", None) is record  # of those all parameters are inputs
        parameters = [p for p in inspect.signature(call).parameters.values() if p.name != "retain"]
        expected = [p for p in parameters if fused or p.kind is not p.KEYWORD_ONLY]
        if any(p.default is p.empty for p in expected[len(inputs) :]):
            raise TypeError(
                f"{record.name}: {len(inputs)} inputs were given; expected {', '.join(p.name for p in expected)}, or "
                "those without a default"
            )
    if not any(hasattr(type(x), "__torch_function__") for x in inputs):
        given = ", ".join(type(x).__name__ for x in inputs) or "none"
        raise TypeError(f"{record.name}: the inputs given are {given}; expected a torch.Tensor among them")
