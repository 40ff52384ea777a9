"""Checks of losses over classes: logits whose last dim is the classes, and targets that name one each.

They hold in compiled code too, where a shape that does not go together would otherwise be broadcast, or cut short.
"""

from __future__ import annotations

import numbers
import os
from typing import Any

import torch

from retainops.dispatch import ambient, dense, plain

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(op: str, name: str, x: Any) -> None:
    """A floating-point tensor.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}; expected a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {x.dtype}; expected a floating-point dtype, as of {name}.float()")


def check_shape(op: str, name: str, x: torch.Tensor, shape: torch.Size, because: str, device: torch.device) -> None:
    """A shape, and a device.

    Raises:
        RuntimeError: another one; the message says why this one was expected.
    """
    if x.shape != shape:
        raise RuntimeError(f"{op}: {name} has shape {tuple(x.shape)}; expected {tuple(shape)}, since {because}")
    check_device(op, name, x, device)


def check_device(op: str, name: str, x: torch.Tensor, device: torch.device) -> None:
    """A device.

    Raises:
        RuntimeError: another one.
    """
    if x.device != device:
        raise RuntimeError(f"{op}: {name} is on {x.device}; expected {device}: move it with .to(device)")


def check_class_weight(op: str, name: str, weight: Any, classes: int, device: torch.device) -> None:
    """A constant weight for each class, or None.

    Raises:
        TypeError, RuntimeError: as above; it requires grad.
    """
    if weight is None:
        return
    check_tensor(op, name, weight)
    because = f"there are {classes} classes"
    check_shape(op, name, weight, torch.Size([classes]), because, device)
    if weight.requires_grad:
        raise RuntimeError(
            f"{op}: not differentiable with respect to {name}, which requires grad; pass {name}.detach()"
        )


def check_target(op: str, target: Any, before: torch.Size, device: torch.device, given: str) -> None:
    """One class for each row.

    Raises:
        TypeError: it is not a tensor of integers.
        RuntimeError: its shape or device is another one.
    """
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{op}: target is {type(target).__name__}; expected a torch.Tensor of class indices")
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{op}: target is {target.dtype}; expected class indices, of dtype torch.int64 (class probabilities are "
            "not supported: torch.nn.functional.cross_entropy takes them)"
        )
    check_shape(op, "target", target, before, f"{given}: one class for each row, and classes are the last dim", device)


def check_options(op: str, ignore_index: Any, reduction: Any, label_smoothing: Any, z_loss: Any, softcap: Any) -> None:
    """What is no tensor.

    Raises:
        TypeError: a number is expected, and it is none.
        ValueError: a number out of its range, or an unknown reduction.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, numbers.Integral):
        raise TypeError(f"{op}: ignore_index is {type(ignore_index).__name__}; expected an integer, such as -100")
    if not -(2**63) <= int(ignore_index) < 2**63:
        raise ValueError(f"{op}: ignore_index is {ignore_index}; expected an integer that int64 holds")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    _check_number(op, "label_smoothing", label_smoothing, 0.0, 1.0, "between 0 and 1, such as 0.1")
    _check_number(op, "z_loss", z_loss, 0.0, float("inf"), "of 0 or above, such as 1e-4")
    if softcap is not None:
        _check_number(op, "softcap", softcap, 0.0, float("inf"), "above 0, such as 30.0, or None")
        if softcap == 0:
            raise ValueError(f"{op}: softcap is {softcap}; expected a number above 0, such as 30.0, or None")


def check_chunk(op: str, chunk: Any) -> None:
    """A number of rows, or None.

    Raises:
        ValueError: it is neither.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"{op}: chunk is {chunk!r}; expected a number of rows, 1 or more, or None")


def _check_number(op: str, name: str, x: Any, low: float, high: float, expected: str) -> None:
    if not isinstance(x, numbers.Real):
        raise TypeError(f"{op}: {name} is {type(x).__name__}; expected a number {expected}")
    if not low <= float(x) <= high:
        raise ValueError(f"{op}: {name} is {x}; expected a number {expected}")


def check_targets_in_range(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Each target is a class, or ignored: looked at where that makes no GPU wait, or RETAINOPS_CHECK_TARGETS is 1.

    Raises:
        IndexError: in eager PyTorch's words.
    """
    if torch.compiler.is_compiling() or ambient() is not None or not dense(target):
        return
    on_host = target.device.type == "cpu" and not plain(target)
    if on_host or os.environ.get("RETAINOPS_CHECK_TARGETS") == "1":
        target = target.long()  # a comparison takes the numbers to the target's dtype
        wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if wrong.numel():
            raise IndexError(
                f"{op}: Target {int(wrong[0])} is out of bounds: {wrong.numel()} of {target.numel()} targets name none "
                f"of the {classes} classes and are not ignore_index, {ignore_index}"
            )
