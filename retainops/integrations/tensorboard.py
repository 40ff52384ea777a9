"""Write what was retained to TensorBoard."""

from __future__ import annotations

from typing import Any

from retainops.integrations._readings import numbers, statistics
from retainops.retained import Retained
from retainops.stats import HIST_BINS


def log(writer: Any, kept: Retained, step: int, prefix: str = "") -> None:
    """Write statistics as TensorBoard's scalars and histograms, under the tag "{prefix}{point}/{statistic}".

    One number is a scalar; of a gradient kept whole, its l2 is. "hist" is a histogram of |g| whose buckets end at
    powers of two (inf and nan are in the bucket above 2**128). Statistics over rows or channels are histograms of
    their finite values. It reads values, so it waits for the GPU, once for all the scalars. Points that no gradient
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
    for name, values in numbers(kept).items():
        for what, value in values.items():
            writer.add_scalar(f"{prefix}{name}/{what}", value, step)
        for what, t in statistics(kept, name).items():
            tag = f"{prefix}{name}/{what}"
            if what == "hist":
                _add_powers_of_two(writer, tag, t.tolist(), step)
            elif t.dim() and (finite := t[t.isfinite()]).numel():
                writer.add_histogram(tag, finite.cpu(), step)


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
