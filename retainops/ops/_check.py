"""Checks of inputs that ops share. Each message names the op, the argument, what it was, and what to do."""

from __future__ import annotations

import numbers
from typing import Any

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_stand_in(x: Any) -> bool:
    """Whether it stands for a tensor, as torch.fx's proxies do: PyTorch's own operations know what to say of it."""
    # In compiled code there are none, and Dynamo of torch 2.11 cannot ask the class of None.
    return not (isinstance(x, torch.Tensor) or torch.compiler.is_compiling()) and hasattr(type(x), "__torch_function__")


def is_number(x: Any, kind: type = numbers.Real) -> bool:
    """Whether it is a number; one of numpy is an array to Dynamo, and of no value that can be asked for."""
    return isinstance(x, kind) or (torch.compiler.is_compiling() and type(x).__name__ == "ndarray")


def check_elementwise(op: str, /, **inputs: Any) -> None:
    """Inputs of an elementwise op: tensors that broadcast, on one device; Python numbers among them.

    Raises:
        TypeError: an input is neither a tensor nor a number, or none is a tensor.
        RuntimeError: shapes that do not broadcast, or devices that differ.
    """
    if torch.compiler.is_compiling():
        return  # shapes may be symbolic here, and eager's own errors come out of the trace
    tensors = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            tensors[name] = x
        elif is_stand_in(x):
            return
        elif not isinstance(x, numbers.Number):
            raise TypeError(f"{op}: {name} is {type(x).__name__}; expected a torch.Tensor or a Python number")
    if not tensors:
        raise TypeError(f"{op}: {' and '.join(inputs)} are all numbers; expected a torch.Tensor among them")
    first, *others = tensors.values()
    for t in others:
        if t.shape != first.shape:
            _check_broadcast(op, tensors)
        # A 0-dim CPU tensor goes with any device, as in eager PyTorch.
        if t.device != first.device and not (_is_cpu_scalar(t) or _is_cpu_scalar(first)):
            where = ", ".join(f"{name} is on {t.device}" for name, t in tensors.items())
            raise RuntimeError(f"{op}: {where}; expected all on one device: move them with .to(device)")


def check_tensor(op: str, /, **inputs: Any) -> None:
    """Inputs in whose place a Python number will not do.

    Raises:
        TypeError: one is not a tensor.
    """
    for name, x in inputs.items():
        # While compiling nothing is checked.
        if not (isinstance(x, torch.Tensor) or torch.compiler.is_compiling() or is_stand_in(x)):
            raise TypeError(f"{op}: {name} is {type(x).__name__}; expected a torch.Tensor")


def _is_cpu_scalar(t: torch.Tensor) -> bool:
    return t.dim() == 0 and t.device.type == "cpu"


def _check_broadcast(op: str, tensors: dict[str, torch.Tensor]) -> None:
    try:
        torch.broadcast_shapes(*(t.shape for t in tensors.values()))
    except RuntimeError:
        shapes = " and ".join(f"{name} of shape {tuple(t.shape)}" for name, t in tensors.items())
        raise RuntimeError(
            f"{op}: {shapes} do not broadcast: aligned from the right, sizes must be equal or 1; "
            "reshape one of them, or unsqueeze() a dim"
        ) from None


def refuses_dtypes(*inputs: Any) -> str | None:
    """Why kernels for floating-point tensors cannot take these inputs, or None."""
    for x in inputs:
        if isinstance(x, torch.Tensor):
            if x.dtype not in KERNEL_DTYPES:
                return f"an input is {x.dtype}, and the kernels take float16, bfloat16, float32 and float64"
        elif isinstance(x, complex):
            return "an input is a complex number"
    devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
    return f"the inputs are on {' and '.join(map(str, devices))}" if len(devices) > 1 else None


def refuses_rows(x: torch.Tensor) -> str | None:
    """Why kernels that go along the last dim of x, or over its rows, in steps cannot take it, or None."""
    columns = x.shape[-1] if x.dim() else 1
    for what, size in (("columns", columns), ("rows", x.numel() // max(columns, 1))):
        if 2**31 - 2**16 < size < 2**31:  # larger ones count in int64
            return f"x has {size} {what}, and a step beyond the last is no int32"
    return None


def check_norm(op: str, x: Any, eps: Any, offset: Any = 0.0, /, **others: Any) -> None:
    """Inputs of a norm over the last dim of x: weight and bias of its size, a residual that broadcasts with x.

    It holds in compiled code too: the definition, traced, would broadcast what does not go together.

    Raises:
        TypeError: an input is not a tensor (or None, of `others`), eps or offset is not a number, or x is of an
            integer dtype.
        ValueError: eps is not above 0.
        RuntimeError: x has no last dim or nothing in it, or a shape or device that does not go with x's.
    """
    tensors = {"x": x, **{name: t for name, t in others.items() if t is not None or name == "residual"}}
    for name, t in tensors.items():
        if is_stand_in(t):
            return
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}; expected a torch.Tensor")
    for name, number in (("eps", eps), ("offset", offset)):
        if not is_number(number):
            raise TypeError(f"{op}: {name} is {type(number).__name__}; expected a number, such as 1e-6")
    if isinstance(eps, numbers.Real) and not float(eps) > 0:
        raise ValueError(f"{op}: eps is {eps}; expected a number above 0, such as 1e-6")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"{op}: x is {x.dtype}; expected a floating-point dtype: convert it with .to(torch.float32)")
    shape = x.shape if "residual" not in tensors else _shape_of_sum(op, x, tensors["residual"])
    # In compiled code a size may be unknown, and a row without elements is left as it is.
    if not shape or (not torch.compiler.is_compiling() and not shape[-1]):
        raise RuntimeError(f"{op}: x has shape {tuple(shape)}; expected (..., n) with n above 0: there is no row")
    for name, t in tensors.items():
        if name not in ("x", "residual") and t.shape != shape[-1:]:
            raise RuntimeError(
                f"{op}: {name} has shape {tuple(t.shape)}; expected {tuple(shape[-1:])}, since x has {tuple(shape)}"
            )
        if t.device != x.device:
            raise RuntimeError(f"{op}: {name} is on {t.device} and x on {x.device}; move one of them with .to(device)")


def _shape_of_sum(op: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Size:
    _check_broadcast(op, {"x": x, "residual": residual})
    return torch.broadcast_shapes(x.shape, residual.shape)
