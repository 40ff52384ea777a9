"""Cross entropy of a linear layer's outputs, which never exist as a whole. docs/ops/linear_cross_entropy.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retainops.dispatch import ambient, backend_name, dense, requested, run, why_reference
from retainops.ops import _blocks_compiled, _fused
from retainops.ops._check import refuses_dtypes
from retainops.ops._check_classes import (
    check_chunk,
    check_class_weight,
    check_device,
    check_options,
    check_shape,
    check_target,
    check_targets_in_range,
    check_tensor,
)
from retainops.ops._cross_entropy import Options
from retainops.ops._linear_cross_entropy import LinearCrossEntropy
from retainops.ops.cross_entropy import loss_reference, softcapped
from retainops.points import unretained
from retainops.registry import PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor
IN_TORCH = LinearCrossEntropy(kernels=False)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """`cross_entropy(linear(x, weight, bias), target)`, of whose logits only a block exists at a time.

    Forward makes the logits of some rows after the other and keeps three numbers a row; backward makes them again. So
    memory is that of one block, for a fourth matrix product beside the usual three. It is so on every device, and
    inside torch.compile.

    Args:
        x: (..., H), of any floating dtype and layout.
        weight: (V, H), of x's dtype.
        target: (...), integers: the class of each row, or `ignore_index`.
        bias: (V,), of x's dtype, or None for none.
        class_weight: (V,), a constant weight for each class, or None for 1.
        ignore_index, reduction, label_smoothing, z_loss, softcap: as of `cross_entropy`.
        chunk: how many rows' logits exist at a time. None: as many as make 2^27 numbers, on a CPU 2^22.

    Returns:
        (...) for reduction="none", else no dims; of x's dtype (float32 under autocast).

    Raises:
        TypeError, ValueError, RuntimeError, IndexError, KeyError: as of `cross_entropy`; a chunk that is no integer
            above 0, or a weight or bias whose shape or dtype does not go with x.

    Points:
        x, (..., H): its gradient is also that of the input.
        logits = softcap(linear(x, weight, bias)), (..., V), of the product's dtype. Of statistics nothing is as large;
            the full gradient, if it is asked for, is.

    Example:
        >>> kept = ro.Retained(logits=ro.Stats("l2", "amax", over="rows"))
        >>> ro.linear_cross_entropy(hidden, lm_head.weight, target, retain=kept).backward()

    Source: Wijmans et al. 2024 (arXiv 2411.09009) and Hsu et al. 2024 (arXiv 2410.10989) for the idea.
    """
    options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    _check(x, weight, target, bias, class_weight, options, chunk)
    inputs = (x, weight, target, bias, class_weight, *options, chunk)
    if torch.compiler.is_compiling():
        return _blocks_compiled.call(LINEAR_CROSS_ENTROPY, *inputs[:5], options, chunk, retain)
    if backend_name() != "triton" and why_reference(LINEAR_CROSS_ENTROPY, inputs) and _in_blocks(inputs):
        slots = {} if retain is None else requested(LINEAR_CROSS_ENTROPY, inputs, retain)
        return _fused.launch(LINEAR_CROSS_ENTROPY, IN_TORCH, inputs, slots)
    return run(LINEAR_CROSS_ENTROPY, inputs, retain)


def _in_blocks(inputs: Sequence[Any]) -> bool:
    """Whether the blocks may be plain PyTorch's, where they are not the kernels'."""
    tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
    return ambient() is None and all(dense(t) for t in tensors) and _refuses(*inputs) is None


def _check(x: Any, weight: Any, target: Any, bias: Any, class_weight: Any, options: Options, chunk: Any) -> None:
    op = "linear_cross_entropy"
    check_options(op, *options)
    check_chunk(op, chunk)
    check_tensor(op, "x", x)
    check_tensor(op, "weight", weight)
    if not x.dim() or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[0]:
        raise RuntimeError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., H) and (V, H), as of "
            "torch.nn.Linear, with V above 0"
        )
    classes, device = weight.shape[0], x.device
    check_device(op, "weight", weight, device)
    if bias is not None:
        check_tensor(op, "bias", bias)
        check_shape(op, "bias", bias, weight.shape[:1], f"there are {classes} classes", device)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not torch.is_autocast_enabled(device.type):
            raise RuntimeError(f"{op}: {name} is {t.dtype} and x {x.dtype}; expected one dtype: use .to(dtype)")
    check_target(op, target, x.shape[:-1], device, f"x has shape {tuple(x.shape)}")
    check_class_weight(op, "class_weight", class_weight, classes, device)
    check_targets_in_range(op, target, classes, options.ignore_index)


def linear_cross_entropy_reference(
    x: Any, weight: Any, target: Any, bias: Any, class_weight: Any, *rest: Any
) -> Tensor:
    """The definition. (Its logits exist as a whole; `chunk` is no part of it.)"""
    *options, _chunk, point = rest
    given = Options(*options)
    z = softcapped(torch.nn.functional.linear(point("x", x), weight, bias), given.softcap)
    return loss_reference(point("logits", z), target, class_weight, given, unretained)


def _refuses(x: Any, weight: Any, target: Any, *others: Any) -> str | None:
    tensors = [t for t in others if isinstance(t, torch.Tensor)]
    if target.device != x.device:
        return "the inputs are on different devices"
    return refuses_dtypes(x, weight, *tensors)


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).to(device, dtype)

    classes = 11
    target = torch.randint(-1, classes, shape[:-1], generator=generator, device=generator.device).to(device)
    width = shape[-1:] or (1,)
    return drawn(*shape), drawn(classes, *width), target, drawn(classes), None, -1, "mean", 0.1, 1e-2, None, 4


def _traffic(x: Tensor, weight: Tensor, target: Tensor, *others: Any) -> tuple[int, int, int]:
    """The logits of every block, once written by the product and read, or (dlogits) read, written and read twice.

    No bound of an implementation in one kernel, of which this is none.
    """
    n, classes = target.numel(), weight.shape[0]
    logits = n * classes * x.element_size()
    operands = x.numel() * x.element_size() + weight.numel() * weight.element_size()
    return operands + 2 * logits, 2 * operands + 5 * logits, logits


LINEAR_CROSS_ENTROPY = _fused.register(
    LinearCrossEntropy(kernels=True),
    name="linear_cross_entropy",
    call=linear_cross_entropy,
    formula="cross_entropy(x @ weight.T + bias, target)",
    points=(
        PointInfo("x", "x", "of x", inputs=(0,)),
        PointInfo("logits", "softcap(x @ weight.T + bias)", "(..., V)", inputs=(0, 1, 3)),
    ),
    reference=linear_cross_entropy_reference,
    refuses=_refuses,
    sample=_sample,
    traffic=_traffic,
    kind="row",
)
