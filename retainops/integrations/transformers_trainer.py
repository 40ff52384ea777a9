"""Watch interior gradients in a Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "retainops.integrations.transformers_trainer needs transformers and accelerate, which are not installed; "
        'pip install "transformers[torch]"'
    ) from error

from retainops.watcher import Watcher, watch


class WatchCallback(TrainerCallback):
    """`ro.watch` as a callback of `transformers.Trainer`: `Trainer(..., callbacks=[WatchCallback("layers.*")])`.

    A step is the Trainer's: an optimizer step, with the backward calls that it accumulates; its number is
    `state.global_step` before it. It is read before the weights change, so a gradient that is not finite leaves them as
    they were. An evaluation is in no step. Arguments and errors are those of `ro.watch`, raised when training begins.

    Args:
        *args, **kwargs: as of `ro.watch` after the model: patterns, stats, every, to, on_nonfinite, group.

    Attributes:
        watcher: the watcher while a model is trained, else None.

    Raises:
        ImportError: on import of this module, where transformers is not installed.

    Example:
        >>> watching = WatchCallback("layers.*", every=100, to=JsonLines("gradients.jsonl"))
        >>> Trainer(model, arguments, train_dataset=data, callbacks=[watching]).train()
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args, self._kwargs = args, kwargs
        self.watcher: Watcher | None = None

    def close(self) -> None:
        """Leave the model alone: after an exception, of which the Trainer tells its callbacks nothing."""
        if self.watcher is not None:
            self.watcher.close()
        self.watcher = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.close()
        self.watcher = watch(model, *self._args, **self._kwargs, start=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watcher is not None:
            self.watcher.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watcher is not None:
            self.watcher.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()
