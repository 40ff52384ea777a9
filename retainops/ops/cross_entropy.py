"""Cross entropy of logits against class indices. docs/ops/cross_entropy.md derives it."""

from __future__ import annotations

from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops import _fused
from retainops.ops._check import refuses_dtypes, refuses_rows
from retainops.ops._check_classes import (
    check_class_weight,
    check_options,
    check_target,
    check_targets_in_range,
    check_tensor,
)
from retainops.ops._cross_entropy import CrossEntropy, Options, reduced
from retainops.points import unretained
from retainops.registry import Point, PointInfo
from retainops.retained import Retained
from retainops.shards import is_dtensor, replicated

Tensor = torch.Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    *,
    retain: Retained | None = None,
) -> Tensor:
    """-log softmax(logits)[target] of each row, in one kernel each way: one read of the logits, and one and a write.

    As `torch.nn.functional.cross_entropy` with class indices, but classes are always the last dim (there they are dim
    1), and everything is computed in float32 (float64 for float64) and rounded once. The logits are never overwritten.

    Args:
        logits: (..., V), of any floating dtype, layout and device.
        target: (...), integers: the class of each row, or `ignore_index`.
        weight: (V,), a constant weight for each class, or None for 1.
        ignore_index: the target of rows that count for nothing.
        reduction: "none", "sum", or "mean": the sum divided by the sum of the targets' weights.
        label_smoothing: in [0, 1]: this part of each target is spread over all classes.
        z_loss: of 0 or above: z_loss * lse^2 is added for each row, lse = log(sum(exp(logits))).
        softcap: above 0: logits become softcap * tanh(logits / softcap) first. None: they stay.
        retain: `Retained("logits", "p")` to keep the gradients with respect to what enters the softmax, and to what
            leaves it.

    Returns:
        (...) for "none", else no dims; of the logits' dtype (float32 under autocast).

    Raises:
        TypeError: logits or weight is no floating-point tensor, target no tensor of integers, an option no number, or
            `retain` is not a `Retained`.
        ValueError: an option out of its range, an unknown reduction.
        RuntimeError: shapes or devices that do not go together, no classes, a weight that requires grad, a point
            retained that no gradient reaches.
        KeyError: `retain` names another point than those below.
        IndexError: a target that is no class, in a CPU tensor. On a GPU nobody waits to look: such a row's loss is
            NaN, and so is its gradient. With RETAINOPS_CHECK_TARGETS=1 in the environment it is an error there too.

    Points:
        logits = softcap(logits), (..., V), of the logits' dtype.
        p = softmax(logits), (..., V), in float32 (float64 for float64).

    Example:
        >>> kept = ro.Retained(logits=ro.Stats("l2", over="rows"))
        >>> ro.cross_entropy(logits, target, label_smoothing=0.1, retain=kept).backward()

    Source: z_loss, Chowdhery et al. 2022 (arXiv 2204.02311); softcap, Gemma Team 2024 (arXiv 2408.00118); label
        smoothing, Szegedy et al. 2016 (arXiv 1512.00567); online softmax, Milakov and Gimelshein 2018 (arXiv
        1805.02867).
    """
    options = Options(ignore_index, reduction, label_smoothing, z_loss, softcap)
    _check(logits, target, weight, options)
    return run(CROSS_ENTROPY, (logits, target, weight, *options), retain)


def _check(logits: Any, target: Any, weight: Any, options: Options) -> None:
    op = "cross_entropy"
    check_options(op, *options)
    check_tensor(op, "logits", logits)
    if not logits.dim() or not logits.shape[-1]:
        raise RuntimeError(f"{op}: logits has shape {tuple(logits.shape)}; expected (..., V), V classes, V above 0")
    *before, classes = logits.shape
    check_target(op, target, torch.Size(before), logits.device, f"logits has shape {tuple(logits.shape)}")
    check_class_weight(op, "weight", weight, classes, logits.device)
    check_targets_in_range(op, target, classes, options.ignore_index)


def cross_entropy_reference(logits: Any, target: Any, weight: Any, *rest: Any) -> Tensor:
    """The definition."""
    *options, point = rest
    given = Options(*options)
    return loss_reference(point("logits", softcapped(logits, given.softcap)), target, weight, given, point)


def softcapped(z: Tensor, cap: float | None) -> Tensor:
    """What enters the softmax."""
    return z if cap is None else cap * torch.tanh(z / cap)


def loss_reference(z: Tensor, target: Tensor, weight: Tensor | None, given: Options, point: Point) -> Tensor:
    """The definition, from there."""
    dtype, z = loss_dtype(z.dtype, z.device), z.to(torch.promote_types(z.dtype, torch.float32))
    if is_dtensor(z):
        # Not PyTorch's log_softmax: inside its `loss_parallel` that has the gradient of a whole cross entropy.
        target, weight = replicated(target, z), None if weight is None else replicated(weight, z)
        logp = z - torch.logsumexp(z, -1, keepdim=True)
    else:
        logp = torch.log_softmax(z, -1)
    if point is not unretained:
        logp = _by_way_of_p(logp, point)
    share, kept, at = shares(target, weight, given.ignore_index, z.shape[-1], z.dtype)
    loss = (1 - given.label_smoothing) * torch.where(kept, -share * pick(logp, at), 0)
    if given.label_smoothing:
        each = logp if weight is None else weight.to(logp.dtype) * logp
        loss = loss - given.label_smoothing / max(z.shape[-1], 1) * torch.where(kept, each.sum(-1), 0)
    if given.z_loss:
        loss = loss + given.z_loss * torch.where(kept, torch.logsumexp(z, -1).square(), 0)
    if given.reduction == "none":
        return loss.to(dtype)
    return reduced(loss, share.sum() if given.reduction == "mean" else None, given).to(dtype)


def loss_dtype(logits: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the loss: that of the logits, but under autocast float32 where they are narrower."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.promote_types(logits, torch.float32)
    return logits


def shares(
    target: Tensor, weight: Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's weight, which rows are not ignored, and a place to look up: the target's, or else 0.

    What is no class weighs NaN, and with it the loss and the gradient: no silent wrong value.
    """
    target = target.long()  # in 8 bits -100 is 156, and no class is above 255
    kept, known = target != ignore_index, (target >= 0) & (target < classes)
    at = torch.where(kept & known, target, 0)
    if weight is None:
        own = torch.ones_like(target, dtype=dtype)
    else:
        own = pick(weight.to(dtype).expand((*target.shape, classes)), at)
    share = torch.where(known, own, float("nan"))
    return torch.where(kept, share, 0), kept, at


def pick(x: Tensor, at: Tensor) -> Tensor:
    """One element of each row."""
    # To find an op's dtypes its definition is run on tensors of no elements: no class to pick.
    if not x.shape[-1]:
        return x.sum(-1)
    if is_dtensor(x):  # PyTorch's gather fails where the classes are split
        classes = replicated(torch.arange(x.shape[-1], device=x.device), x)
        return torch.where(classes == at.unsqueeze(-1), x, 0).sum(-1)
    return x.gather(-1, at.unsqueeze(-1)).squeeze(-1)


def _by_way_of_p(logp: Tensor, point: Point) -> Tensor:
    """logp, as log(p) at a point p: the point's gradient is that of log(p), while the logits' stays that of logp.

    By the chain rule through p it would be p * (1 / p), which is 0 * inf where p underflows. So p branches off: with e
    added to p this is log(p + e), derivatives of every order included.
    """
    p = logp.exp()
    no = torch.zeros((), dtype=torch.bool, device=p.device)
    apart = torch.where(no, logp, p.detach())  # requires grad, and passes on none
    change = point("p", apart) - apart.detach()
    return logp + torch.log1p(change / p.clamp_min(torch.finfo(p.dtype).tiny))


def _refuses(logits: Any, target: Any, weight: Any = None, *_options: Any) -> str | None:
    why = refuses_rows(logits) or refuses_dtypes(*(x for x in (logits, weight) if x is not None))
    return why or (None if target.device == logits.device else "the inputs are on different devices")


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    logits = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(device, dtype)
    before, classes = (shape[:-1], shape[-1]) if shape else (shape, 1)
    target = torch.randint(-1, classes, before, generator=generator, device=generator.device)
    return logits, target.to(device), None, -1, "mean", 0.1, 1e-2, None


def _traffic(logits: Tensor, target: Tensor, *_others: Any) -> tuple[int, int, int]:
    """Forward reads the logits; backward reads them and writes their gradient; targets and losses are a row each."""
    size, small = logits.numel() * logits.element_size(), target.numel() * target.element_size()
    return size + small, 2 * size + small, logits.numel() * max(logits.element_size(), 4)


CROSS_ENTROPY = _fused.register(
    CrossEntropy(),
    name="cross_entropy",
    call=cross_entropy,
    formula="-log softmax(logits)[target]",
    points=(
        PointInfo("logits", "softcap(logits)", "of logits", inputs=(0,)),
        PointInfo("p", "softmax(logits)", "of logits", inputs=(0,)),
    ),
    reference=cross_entropy_reference,
    refuses=_refuses,
    sample=_sample,
    traffic=_traffic,
    kind="row",
)
