"""What there is to show of a request: single numbers, vectors and histograms."""

from __future__ import annotations

import torch

from retainops.retained import Retained
from retainops.stats import Stats


def numbers(kept: Retained) -> dict[str, dict[str, float]]:
    """Name of a point -> statistic -> value, of those that are one number each; of a gradient kept whole, its l2.

    The values of a device are read together: one wait for a GPU, however many points there are.
    """
    found = {(name, what): t for name in kept for what, t in _scalars(kept, name).items()}
    read: dict[tuple[str, str], float] = {}
    for device in {t.device for t in found.values()}:
        here = {key: t.double() for key, t in found.items() if t.device == device}
        read.update(zip(here, torch.stack(list(here.values())).tolist(), strict=True))
    values: dict[str, dict[str, float]] = {name: {} for name in kept}
    for name, what in found:
        values[name][what] = read[name, what]
    return values


def _scalars(kept: Retained, name: str) -> dict[str, torch.Tensor]:
    slot = kept[name]
    found = {what: t for what, t in statistics(kept, name).items() if t.dim() == 0}
    if "l2" not in found and slot.grad is not None:
        grad = slot.grad.detach()
        wide = torch.promote_types(grad.dtype, torch.float32)
        found["l2"] = torch.linalg.vector_norm(grad, dtype=wide)
    return found


def statistics(kept: Retained, name: str) -> dict[str, torch.Tensor]:
    """A point's statistics that have come, detached."""
    want = kept[name].want
    names = want.names if isinstance(want, Stats) else ()
    found = {what: getattr(kept[name], what) for what in names}
    return {what: t.detach() for what, t in found.items() if t is not None}
