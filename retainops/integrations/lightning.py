"""Watch interior gradients in a Lightning Trainer."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError(
            "retainops.integrations.lightning needs lightning, which is not installed; pip install lightning"
        ) from error

from retainops.readings import Readings
from retainops.watcher import Watcher, watch


class WatchCallback(Callback):
    """`ro.watch` as a callback of Lightning: `Trainer(callbacks=[WatchCallback("net.layers.*")])`.

    A step is an optimizer step, with the backward calls that it accumulates. It is read before the weights change, so a
    gradient that is not finite leaves them as they were; under manual optimization it is read at the end of a batch in
    which an optimizer stepped, so that those of several optimizers are in one. A validation is in no step. Arguments
    and errors are those of `ro.watch`, raised when training begins.

    Args:
        *args, **kwargs: as of `ro.watch` after the model: patterns, stats, every, on_nonfinite, group, and `to`: where
            none is given, numbers go to the trainer's loggers, as "gradients/{point}/{statistic}".

    Attributes:
        watcher: the watcher while a model is trained, else None.

    Raises:
        ImportError: on import of this module, where neither lightning nor pytorch_lightning is installed.

    Example:
        >>> Trainer(callbacks=[WatchCallback("net.layers.*", every=100)]).fit(module, data)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._args, self._kwargs = args, kwargs
        self._steps = 0  # the trainer's count when the step began
        self._batches = 0  # those in which an optimizer stepped, under manual optimization
        self._pause = contextlib.ExitStack()
        self.watcher: Watcher | None = None

    def close(self) -> None:
        """Leave the model alone."""
        self._pause.close()
        if self.watcher is not None:
            self.watcher.close()
        self.watcher = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def to_loggers(step: int, readings: Readings) -> None:
            values = {f"gradients/{name}/{what}": x for name, of in readings.items() for what, x in of.items()}
            numbers = {tag: x for tag, x in values.items() if not isinstance(x, torch.Tensor)}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step)

        self.close()
        self._steps = trainer.global_step  # which counts those of each optimizer
        # A new trainer counts from 0 again; a checkpoint may be of a run without this callback.
        self._batches = min(self._batches, self._steps) or self._steps
        start = self._steps if pl_module.automatic_optimization else self._batches
        self.watcher = watch(pl_module, *self._args, **{"to": to_loggers, **self._kwargs}, start=start)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.watcher is not None:
            self.watcher.begin()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.watcher is not None and pl_module.automatic_optimization:
            self.watcher.end()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        if stepped and not pl_module.automatic_optimization:
            self._batches += 1
            if self.watcher is not None:
                self.watcher.end()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.watcher is not None:  # it may come between the micro-batches of a step
            self._pause.enter_context(self.watcher.paused())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._pause.close()

    @property
    def state_key(self) -> str:
        """A trainer may have several, of other arguments."""
        kwargs = {name: repr(value) for name, value in self._kwargs.items() if name not in ("to", "group")}
        return self._generate_state_key(args=repr(self._args), **kwargs)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict.get("batches", 0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()
