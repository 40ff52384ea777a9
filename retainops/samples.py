"""Gradient norms of samples, from statistics of rows."""

from __future__ import annotations

from typing import overload

import torch

from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import Stats
from retainops.wants import Want


@overload
def per_sample_norms(kept: Slot) -> torch.Tensor: ...
@overload
def per_sample_norms(kept: Retained) -> dict[str, torch.Tensor]: ...
def per_sample_norms(kept: Slot | Retained) -> torch.Tensor | dict[str, torch.Tensor]:
    """The l2 norm of each sample's gradient, at a point where `Stats("l2", over="rows")` was asked for.

    No gradient is stored for it: a backward kernel leaves one number a row, and a sample's are put together here.

    Args:
        kept: a slot of shape (samples, ..., n) whose backward has run; or a request, for all its slots. The first dim
            is taken for that of the samples: of a point of (batch * tokens, n) each token would be one, so give the op
            a tensor of (batch, tokens, n). Gradients of several backward calls are put together, row by row: call
            `reset()` between micro-batches of other samples.

    Returns:
        (samples,), float32 (float64 for float64 gradients): sqrt(sum of the squares of a sample's gradient). It is of
        the loss that was differentiated: where that is a mean over samples, multiply by their number. Of a request: a
        dict from each point's name to that, without those that no gradient came to.

    Raises:
        TypeError: `kept` is neither a slot nor a request.
        ValueError: of a slot no l2 over rows (or queries) was asked for, or its interior has no dim for samples.
        RuntimeError: no gradient has come to it, of a request to any of its points, yet.

    Example:
        >>> with ro.retain(model, "layers.*.norm.summed", ro.Stats("l2", over="rows")) as kept:
        ...     model(x).loss.backward()
        >>> ro.per_sample_norms(kept)["layers.3.norm.summed"]  # (batch,)

    Source: what it is good for: Gray et al. 2024 (arXiv 2411.00999); see examples/gradient_noise_scale.py.
    """
    if isinstance(kept, Retained):
        came = {name: slot for name, slot in kept.items() if not (_is_of_rows(slot.want) and slot.l2 is None)}
        return {name: per_sample_norms(slot) for name, slot in (came or kept).items()}
    if not isinstance(kept, Slot):
        raise TypeError(
            f"per_sample_norms: kept is {type(kept).__name__}; expected a Slot such as kept.c, or a Retained"
        )
    want = kept.want
    if not _is_of_rows(want):
        raise ValueError(
            f"per_sample_norms: point '{kept.name}' was asked for {want or 'its gradient'}; expected "
            'Stats("l2", over="rows")'
        )
    if kept.l2 is None:
        raise RuntimeError(f"per_sample_norms: no gradient has come to point '{kept.name}'; call backward() first")
    if not kept.l2.dim():
        raise ValueError(f"per_sample_norms: point '{kept.name}' is one row; expected (samples, ..., n)")
    return torch.linalg.vector_norm(kept.l2.flatten(1) if kept.l2.dim() > 1 else kept.l2[:, None], dim=1)


def _is_of_rows(want: Want) -> bool:
    return isinstance(want, Stats) and "l2" in want.names and want.over in ("rows", "queries")
