"""Write what was retained to TensorBoard."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from retainops.readings import Readings, read
from retainops.retained import Retained
from retainops.stats import HIST_BINS


class TensorBoard:
    """For `ro.watch(model, to=TensorBoard(writer))`: writes each step's readings as `log` does.

    Args:
        writer: as of `log`.
        prefix: goes before every tag.

    Raises:
        TypeError: `writer` has no method `add_scalar`: it is a folder, say.

    Example:
        >>> with ro.watch(model, to=TensorBoard(SummaryWriter())) as watcher:
        ...     train(model, watcher)
    """

    def __init__(self, writer: Any, prefix: str = "gradients/") -> None:
        if not hasattr(writer, "add_scalar"):  # here and not at the first step that is read
            given, folder = type(writer).__name__, ""
            if isinstance(writer, (str, PathLike)):
                given = folder = repr(str(writer))
            raise TypeError(
                f"TensorBoard: writer is {given}; expected a SummaryWriter: TensorBoard(SummaryWriter({folder}))"
            )
        self.writer, self.prefix = writer, prefix

    def __call__(self, step: int, readings: Readings) -> None:
        write(self.writer, readings, step, self.prefix)


def log(writer: Any, kept: Retained, step: int, prefix: str = "") -> None:
    """Write statistics as TensorBoard's scalars and histograms, under the tag "{prefix}{point}/{statistic}".

    One number is a scalar; of a gradient kept whole, its l2 is. "hist" is a histogram of |g| whose buckets end at
    powers of two (inf and nan are in the bucket above 2**128). Statistics over rows or channels are histograms of
    their finite values. It reads values, so it waits for the GPU, once for all of them. Points that no gradient
    has come to are left out.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` (`pip install "retainops[tensorboard]"`), or what has its
            methods `add_scalar`, `add_histogram` and `add_histogram_raw`.
        kept: what `ro.retain(model, ...)` gave, or a request of your own.
        step: the training step.
        prefix: goes before every tag, such as "gradients/".

    Raises:
        TypeError: `kept` is not a `Retained`.

    Example:
        >>> with ro.retain(model, "*", ro.Stats("l2", "amax", "hist")) as kept:
        ...     model(x).sum().backward()
        >>> log(writer, kept, step, prefix="gradients/")
    """
    if not isinstance(kept, Retained):
        raise TypeError(f"log: kept is {type(kept).__name__}; expected retainops.Retained")
    write(writer, read(kept), step, prefix)


def write(writer: Any, readings: Readings, step: int, prefix: str = "") -> None:
    """Write readings as TensorBoard's scalars and histograms; see `log`."""
    for name, of in readings.items():
        for what, value in of.items():
            tag = f"{prefix}{name}/{what}"
            if not isinstance(value, torch.Tensor):
                writer.add_scalar(tag, value, step)
            elif what == "hist":
                _add_powers_of_two(writer, tag, value.tolist(), step)
            elif (finite := value[value.isfinite()]).numel():
                writer.add_histogram(tag, finite, step)


def _add_powers_of_two(writer: Any, tag: str, counts: list[int], step: int) -> None:
    seen = [i for i in range(HIST_BINS) if counts[i]]
    if not seen:
        return
    bins = range(seen[0], seen[-1] + 1)
    # Only counts are known: sums are those of values in the middle of their buckets.
    middles = [(_start(i) + _end(i)) / 2 for i in bins]
    writer.add_histogram_raw(
        tag,
        min=_start(bins[0]),
        max=_end(bins[-1]),
        num=sum(counts),
        sum=sum(counts[i] * middle for i, middle in zip(bins, middles, strict=True)),
        sum_squares=sum(counts[i] * middle**2 for i, middle in zip(bins, middles, strict=True)),
        bucket_limits=[_end(i) for i in bins],
        bucket_counts=[counts[i] for i in bins],
        global_step=step,
    )


def _start(i: int) -> float:
    return 2.0 ** (i - 127) if i else 0.0


def _end(i: int) -> float:
    return 2.0 ** (i - 126)
