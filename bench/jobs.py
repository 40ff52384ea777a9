"""What of an op can be timed, and at which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retainops.ops._plan import plan
from retainops.registry import Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = 4096  # elements in a row; row ops and pointwise ops are measured on the same shapes
MIB = 2**20


@dataclass(frozen=True)
class Job:
    """What of an op is timed: its forward, its backward or both, perhaps with something retained of a point's gradient.

    Attributes:
        direction: "forward", "backward", or "step": one after the other.
        point: the point, or None.
        form: what is retained: "" the gradient, "Into" it in a buffer of the caller's, "Stats" its l2 and amax.
    """

    direction: str
    point: str | None = None
    form: str = ""

    def __str__(self) -> str:
        return self.direction + (f" + {self.point}" if self.point else "") + (f" {self.form}" if self.form else "")

    def fewest_bytes(self, op: Op, inputs: Sequence[Any]) -> int:
        """The fewest bytes that any implementation of the job must move. Statistics have next to none of their own."""
        forward, backward, _ = op.traffic(*inputs)
        if self.direction == "forward":
            return forward
        more = 0
        if self.point and self.form != "Stats":
            shape, dtype = plan(op.reference, tuple(inputs)).points[self.point]  # those of an op may differ in size
            more = shape.numel() * dtype.itemsize
        return backward + more + (forward if self.direction == "step" else 0)


def jobs(op: Op, kind: str = "bandwidth") -> list[Job]:
    """Every job of an op at sizes of a kind: what retaining costs the device, and what a step costs the host."""
    first = op.points[0].name
    if kind == "host":
        return [Job("step"), Job("step", first)]
    forms = [Job("backward", first, "Stats")]
    if op.name == "mul_sin":  # a buffer of the caller's costs any op what a new one does
        forms.insert(0, Job("backward", first, "Into"))
    return [Job("forward"), Job("backward"), *(Job("backward", p.name) for p in op.points), *forms]


@dataclass(frozen=True)
class Size:
    """A shape, and what its time says: at "bandwidth" sizes the device's, at "host" sizes the host's cost of a call."""

    name: str
    kind: str
    rows: int
    width: int = WIDTH

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.width))


def sizes(device: str, dtype: torch.dtype, quick: bool = False) -> list[Size]:
    """The sizes for a device, the telling ones first: a run may be cut short. "host" sizes are in fp32 alone."""
    if quick:
        return [Size("64k", "bandwidth", 16), Size("1k", "host", 1, 1024)]
    names = (
        ("64 MiB", "1k", "256 MiB", "16 MiB", "256k", "1 MiB", "16k") if device == "cuda" else ("64 MiB", "1k", "1 MiB")
    )
    found = []
    for name in names:
        if name.endswith(" MiB"):
            found.append(Size(name, "bandwidth", int(name[:-4]) * MIB // dtype.itemsize // WIDTH))
        elif dtype == torch.float32:
            found.append(Size(name, "host", int(name[:-1]), 1024))
    return found
