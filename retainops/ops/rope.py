"""rope: rotary position embedding of queries and keys. docs/ops/rope.md derives it."""

from __future__ import annotations

from typing import Any

import torch

from retainops.dispatch import run
from retainops.ops import _fused
from retainops.ops._check import refuses_dtypes
from retainops.ops._rope import WIDEST, Rope, check
from retainops.registry import Point, PointInfo
from retainops.retained import Retained

Tensor = torch.Tensor


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    half_tables: bool = False,
    *,
    retain: Retained | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k, in one kernel each way.

    Args:
        q: (batch, heads, seq, dim), of any floating dtype, layout and device.
        k: (batch, heads of its own, seq, dim).
        cos, sin: (seq, rot), (batch, seq, rot) as Hugging Face's models pass them, or (batch, 1, seq, rot); a batch of
            1 goes with any. The leading rot elements of each head are turned, the others passed through, so rot is
            even and at most dim. Elementwise: column j belongs to element j.
        interleaved: whether elements (2j, 2j + 1) are a pair (GPT-J, the original paper), or (j, j + rot / 2) (LLaMA,
            GPT-NeoX).
        half_tables: cos and sin are of rot / 2 columns, column j for both elements of pair j.
        retain: `Retained("q_rot", "k_rot")` to keep the gradients of the loss with respect to these.

    Returns:
        (q_rot, k_rot), of the shapes and dtypes of q and k. All is computed in float32 (float64 if an input is).

    Raises:
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: a shape or device that does not go with q's, or a point is retained that no gradient reaches.
        KeyError: `retain` names another point than those below.

    Points:
        q_rot, k_rot: the outputs.

    Example:
        >>> kept = ro.Retained(k_rot=ro.Stats("l2", over="rows"))
        >>> q, k = ro.rope(q, k, cos, sin, retain=kept)

    Source: Su et al. 2021, RoFormer (arXiv 2104.09864).
    """
    check(q, k, cos, sin, interleaved=interleaved, half_tables=half_tables)
    return run(ROPE, (q, k, cos, sin, interleaved, half_tables), retain)


def rope_reference(
    q: Any, k: Any, cos: Any, sin: Any, interleaved: bool, half_tables: bool, point: Point
) -> tuple[Tensor, Tensor]:
    """The definition."""
    cos, sin = _table(cos, interleaved, half_tables), _table(sin, interleaved, half_tables)
    q_rot = point("q_rot", _turned(q, cos, sin, interleaved))
    return q_rot, point("k_rot", _turned(k, cos, sin, interleaved))


def _table(table: Tensor, interleaved: bool, half_tables: bool) -> Tensor:
    if half_tables:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
    return table.unsqueeze(1) if table.dim() == 3 else table


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    y = (turned * cos + _quarter(turned, interleaved) * sin).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


def _quarter(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b), turned by a right angle: (-b, a)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _refuses(q: Any, k: Any, cos: Any, sin: Any, *_: Any) -> str | None:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos or sin requires grad, and the kernels give gradients of q and k alone"
    if q.shape[-1] > WIDEST:
        return f"heads are of {q.shape[-1]} elements, and the kernels take up to {WIDEST}"
    return refuses_dtypes(q, k, cos, sin)


def _sample(shape: torch.Size, dtype: torch.dtype, device: str, generator: torch.Generator) -> tuple[Any, ...]:
    """Of the last four dims of a shape; k has one head."""
    batch, heads, seq, dim = (1, 1, 1, 2, *shape)[-4:]
    angles = torch.rand(seq, dim - dim % 2, generator=generator, device=generator.device, dtype=torch.float64) * 6
    q = torch.randn(batch, heads, seq, dim, generator=generator, device=generator.device, dtype=torch.float64)
    k = torch.randn(batch, 1, seq, dim, generator=generator, device=generator.device, dtype=torch.float64)
    return *(t.to(device, dtype) for t in (q, k, angles.cos(), angles.sin())), False, False


def _traffic(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any) -> tuple[int, int, int]:
    """Forward reads q and k and writes as much; backward the same of gradients. Both read the tables."""
    sizes = [t.numel() * t.element_size() for t in (q, k, cos, sin)]
    once = 2 * sum(sizes[:2]) + sum(sizes[2:])
    return once, once, max(sizes[:2])


ROPE = _fused.register(
    Rope(),
    name="rope",
    call=rope,
    formula="q and k, each pair (a, b) turned: (a cos - b sin, b cos + a sin)",
    points=(
        PointInfo("q_rot", "q, turned", "of q", inputs=(0, 2, 3)),
        PointInfo("k_rot", "k, turned", "of k", inputs=(1, 2, 3)),
    ),
    reference=rope_reference,
    refuses=_refuses,
    sample=_sample,
    traffic=_traffic,
    outputs=("q_rot", "k_rot"),
    constants=(2, 3),
    kind="row",
)
