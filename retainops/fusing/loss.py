"""The loss of Hugging Face's language models, in one kernel each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from retainops.nn.point import HoldsPoints
from retainops.ops.cross_entropy import CROSS_ENTROPY

PATH = "lm_loss"
"""The child of a fused model that is its loss."""


class LMLoss(HoldsPoints):
    """The cross entropy of a language model's logits; its points are logits and p.

    It is called as transformers calls a `loss_function`, which flattens the batch; the points have the shape of the
    logits as the model gives them, (batch, tokens, V), where the labels are (batch, tokens). The logits are not copied
    to float32 first; the loss is of that dtype all the same.

    Attributes:
        replaces: the function.
        shifts: whether position i predicts the label of i + 1.
        was_set: what the model had in its `_loss_function`; None: nothing.
    """

    op = CROSS_ENTROPY

    def __init__(self, replaces: Callable[..., Any], shifts: bool, was_set: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.replaces, self.shifts, self.was_set = replaces, shifts, was_set

    def forward(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.shifts:
            labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        labels = labels.to(logits.device).contiguous()
        if logits.shape != (*labels.shape, vocab_size):  # else the points keep the batch apart, for norms of samples
            labels, logits = labels.reshape(-1), logits.reshape(-1, vocab_size)
        logits = logits.float() if logits.dtype is torch.float64 else logits
        reduction = "mean" if num_items_in_batch is None else "sum"
        # Under autocast the op's loss is float32, whatever the logits are; it holds no product that would be narrowed.
        device = "cpu" if logits.is_meta else logits.device.type
        with torch.autocast(device, torch.bfloat16, enabled=logits.dtype is not torch.float32):
            loss = self.call(logits, labels, None, ignore_index, reduction, 0.0, 0.0, None)
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
