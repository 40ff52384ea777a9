"""The end of a block of a transformer, with dropout whose mask is never stored. docs/ops/bias_dropout_add.md."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops._check import check_elementwise, check_tensor, refuses_dtypes
from retainops.ops._pointwise import DY, Pointwise, functions_of, normal, pointwise
from retainops.ops._random import new_seed, uniform
from retainops.registry import Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | float | None,
    residual: Tensor | float,
    p: float = 0.5,
    seed: Tensor | None = None,
    *,
    training: bool = True,
    retain: Retained | None = None,
) -> Tensor:
    """residual + dropout(x + bias) in one kernel. The mask is made again in backward and never stored.

    Args:
        x, bias, residual: tensors of any floating dtype, layout and device whose shapes broadcast. bias may be None.
        p: the probability of an element of x + bias to be dropped; the others are multiplied by 1 / (1 - p).
        seed: an int64 tensor of 0 dims on x's device, which decides the mask; default: drawn from PyTorch's generator
            of the device, so `torch.manual_seed` makes it reproducible. The mask depends on the seed and the shape
            alone: it is the same for the kernels and the reference, for any layout and dtype.
        training: False: nothing is dropped.
        retain: `Retained("biased", "dropped")` to keep the gradients with respect to these.

    Returns:
        residual + dropout(x + bias), of the broadcast shape and the promoted dtype.

    Raises:
        ValueError: p is not in [0, 1], or seed is not an int64 tensor of 0 dims.
        RuntimeError: seed is on another device than x; and as of `softcap`.
        TypeError, KeyError: as of `softcap`.

    Points:
        biased = x + bias and dropped = dropout(biased), of the broadcast shape of x and bias.

    Example:
        >>> x = ro.bias_dropout_add(linear(x), bias, x, p=0.1)

    Source: Srivastava et al. 2014; the fusion is Megatron-LM's (arXiv 2104.04473). Random numbers: Philox4x32-7.
    """
    if not isinstance(p, numbers.Real) or not 0 <= p <= 1:
        raise ValueError(f"bias_dropout_add: p is {p!r}; expected a probability, a number from 0 to 1")
    bias = 0.0 if bias is None else bias
    check_tensor("bias_dropout_add", x=x)
    check_elementwise("bias_dropout_add", x=x, bias=bias, residual=residual)
    if seed is not None:
        _check_seed(seed, x.device)
    if p == 0 or not training:
        return run(BIAS_DROPOUT_ADD, (x, bias, residual, 0.0, 0), retain)
    if seed is None:
        seed = new_seed(x.device)
    return run(BIAS_DROPOUT_ADD, (x, bias, residual, float(p), seed), retain)


def _check_seed(seed: Any, device: torch.device) -> None:
    expected = 'expected an int64 tensor of 0 dims on the device of x, such as torch.tensor(7, device="cuda")'
    if not isinstance(seed, torch.Tensor):
        raise ValueError(f"bias_dropout_add: seed is {seed!r}; {expected}")
    if seed.dtype != torch.int64 or seed.dim():
        raise ValueError(f"bias_dropout_add: seed is of shape {tuple(seed.shape)}, {seed.dtype}; {expected}")
    if seed.device != device:
        raise RuntimeError(f"bias_dropout_add: seed is on {seed.device} and x on {device}; {expected}")


def bias_dropout_add_reference(x: Any, bias: Any, residual: Any, p: float, seed: Any, point: Point) -> Tensor:
    """The definition."""
    biased = point("biased", x + bias)
    if not isinstance(seed, torch.Tensor):  # and not p == 0: a plan knows types and no values
        dropped = biased
    else:
        kept = biased * _scale(p)
        dropped = torch.where(_is_kept(uniform(seed, biased.shape), p), kept, torch.zeros_like(kept))
    return residual + point("dropped", dropped)


def _is_kept(numbers: Tensor, p: float) -> Tensor:
    if torch.compiler.is_compiling():  # a number that may change: Inductor keeps what math.ceil said of the first one
        # In float64 as at the next multiple of 2**-24; there is none on Apple's devices.
        return (numbers if numbers.device.type == "mps" else numbers.double()) >= p
    return numbers >= _threshold(p)


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _threshold(p: float) -> float:
    """p as the next multiple of 2**-24, as the uniform numbers are: the mask must not depend on how p is rounded."""
    return math.ceil(p * 2**24) / 2**24


class BiasDropoutAdd(Pointwise):
    """Its random numbers are an input that has no memory: they are made from the seed."""

    def operands(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        from retainops.ops._operands import Seed

        x, bias, residual, p, seed = inputs
        shape = torch.broadcast_shapes(*(t.shape for t in (x, bias) if not isinstance(t, numbers.Real)))
        return x, bias, residual, _threshold(p), _scale(p), Seed(seed, shape) if p else 1.0


def _sample_with_seed(*where: Any) -> tuple[Any, ...]:
    return *normal(3, 0.25)(*where), torch.tensor(20, device=where[2])


def _maths() -> tuple[Any, ...]:
    return functions_of("chains", "bias_dropout_add_forward", "bias_dropout_add_backward")


BIAS_DROPOUT_ADD = pointwise(
    bias_dropout_add,
    "residual + dropout(x + bias)",
    bias_dropout_add_reference,
    BiasDropoutAdd(_maths, grads=3, unread=(0, 1, 2), equal={1: 0, 2: DY}),
    name="bias_dropout_add",
    points=[
        PointInfo("biased", "x + bias", "of x and bias, broadcast", (0, 1)),
        PointInfo("dropped", "dropout(biased)", "of x and bias, broadcast", (0, 1)),
    ],
    sample=_sample_with_seed,
    refuses=lambda x, bias, residual, *_: refuses_dtypes(x, bias, residual),
)
