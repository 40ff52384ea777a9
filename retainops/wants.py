"""In what form a point's gradient can be wanted, and what that makes of one backward."""

from __future__ import annotations

from typing import NamedTuple

import torch

from retainops.buffers import Into
from retainops.part import Part
from retainops.relevance import Relevance
from retainops.stats import OVER_OF_ATTENTION, Stats

Want = Into | Stats | Part | Relevance | None
"""In what form a point's gradient is wanted; None: as it is."""


def is_of_attention(want: Want) -> bool:
    """Whether no point but one of attention can be wanted in this form."""
    return isinstance(want, (Part, Relevance)) or getattr(want, "over", "") in OVER_OF_ATTENTION


class Answer(NamedTuple):
    """What one backward call is to do for a slot.

    Attributes:
        tensor: where the gradient goes; None if only statistics are wanted.
        accumulate: add to what is there.
        returned: what backward returns to autograd for the slot.
        stats: statistics to take and hand to `Slot.merge`.
    """

    tensor: torch.Tensor | None
    accumulate: bool
    returned: torch.Tensor | None
    stats: Stats | None
