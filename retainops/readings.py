"""What a request has to show, on the host: numbers, vectors and histograms, all read in one go."""

from __future__ import annotations

import torch

from retainops.retained import Retained
from retainops.slots import Slot
from retainops.stats import Stats, parts_of, total

Reading = int | float | torch.Tensor
Readings = dict[str, dict[str, Reading]]
"""Name of a point -> statistic -> its value: a Python number, or a tensor on the CPU where it is more than one."""


def read(kept: Retained) -> Readings:
    """The statistics that have come, point by point; of a gradient kept whole, its l2. Points without any are left out.

    The values of a device are read together: one wait for a GPU, however many points there are. (Statistics of a
    DTensor are put together from all ranks of its mesh first, so all of them must read.)
    """
    found = {(name, what): t for name in kept for what, t in _of(kept[name]).items()}
    values: dict[tuple[str, str], Reading] = {}
    for device in {t.device for t in found.values()}:
        here = {key: t for key, t in found.items() if t.device == device}
        flat = torch.cat([t.reshape(-1).double() for t in here.values()]).cpu()
        for (key, t), own in zip(here.items(), flat.split([t.numel() for t in here.values()]), strict=True):
            own = own.to(t.dtype)  # back to what it was: counts are whole numbers
            values[key] = own.view(t.shape) if t.dim() else own.item()
    readings: Readings = {}
    for name, what in found:
        readings.setdefault(name, {})[what] = values[name, what]
    return readings


def numbers(readings: Readings) -> dict[str, dict[str, float]]:
    """Of readings, those that are one number each."""
    return {name: {what: x for what, x in of.items() if isinstance(x, (int, float))} for name, of in readings.items()}


def _of(slot: Slot) -> dict[str, torch.Tensor]:
    names = slot.want.names if isinstance(slot.want, Stats) else ()
    read = {what: getattr(slot, what) for what in names}
    found = {what: t.detach() for what, t in read.items() if t is not None}
    if "l2" not in names and slot.grad is not None:
        grad = slot.grad.detach()
        (sum_of_squares,) = parts_of(("sumsq",), "tensor", grad.abs() if grad.is_complex() else grad, None)
        found["l2"] = total(sum_of_squares).sqrt()
    return found
