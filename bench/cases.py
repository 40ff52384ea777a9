"""What is measured: every op of the registry x dtype x size x job x variant. Adding an op adds its benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.jobs import DTYPES, Job, Size, jobs, sizes
from bench.peers import PEERS
from bench.variants import AUTOTUNED, VARIANTS, Prepare, plain
from retainops.dispatch import why_reference
from retainops.registry import Op

Sample = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        op, dtype, size, job: what.
        variant: whose: "retainops", "eager", "torch.compile", a peer, or "copy".
        label: in words, how the inputs differ from the op's own sample; "" where they do not.
        sample: makes the inputs; the op's own by default.
    """

    op: Op
    dtype: str
    size: Size
    job: Job
    variant: str
    label: str = ""
    sample: Sample | None = None

    def __str__(self) -> str:
        parts = (self.op.name, self.label, self.dtype, self.size.name, str(self.job), self.variant)
        return "-".join(part.replace(" ", "_") for part in parts if part)

    def inputs(self, device: str) -> list[Any]:
        """Random inputs, the same in every run."""
        generator = torch.Generator(device).manual_seed(0)
        return list((self.sample or self.op.sample)(self.size.shape, DTYPES[self.dtype], device, generator))

    def build(self) -> Prepare:
        """What makes, from inputs, the call to time. What there is to compile is compiled once for a case."""
        if self.variant in VARIANTS:
            return VARIANTS[self.variant](self.op, self.job, f"{self.label} {self.dtype} {self.size}")
        peer = PEERS[self.op.name][self.variant]()
        assert peer is not None, "cases() leaves out what is not installed"
        return partial(plain, peer, self.job)

    def path(self, inputs: Sequence[Any]) -> str:
        """Which code ran."""
        if self.variant == "retainops":
            return "Triton kernels" if why_reference(self.op, tuple(inputs)) is None else "reference"
        return self.variant


THOROUGHLY = (
    *("mul_sin", "add_gelu", "swiglu", "softcap", "bias_dropout_add"),
    *("rms_norm", "softmax", "cross_entropy", "rope"),
)
"""The ops measured at every size, and against eager PyTorch: one of each kind. The others at the first size alone.
At that size these are compared with max-autotune, too, which takes long to compile."""


def cases(op: Op, device: str, quick: bool = False, label: str = "", sample: Sample | None = None) -> Iterator[Case]:
    """The cases of an op. With a `label`, of special inputs: at the first size alone, retaining only the gradient."""
    peers = peers_of(op)
    grid = [(n, size, dtype) for dtype in DTYPES for n, size in enumerate(sizes(device, DTYPES[dtype], quick))]
    for n, size, dtype in sorted(grid, key=lambda place: place[0]):
        if n and (label or op.name not in THOROUGHLY) and not quick:
            return
        for job in jobs(op, size.kind):
            for variant in (*VARIANTS, *peers):
                if variant == "eager" and op.name not in THOROUGHLY:
                    continue
                if variant == AUTOTUNED and (n or op.name not in THOROUGHLY or device != "cuda"):
                    continue
                if _has(variant, job, size) and not (label and job.form):
                    yield Case(op, dtype, size, job, variant, label, sample)


def peers_of(op: Op) -> list[str]:
    """Names of the other libraries that have an op like it and are installed."""
    return [name for name, load in PEERS.get(op.name, {}).items() if load() is not None]


def _has(variant: str, job: Job, size: Size) -> bool:
    if variant == "copy":  # the yardstick of bandwidth; the forms move the bytes of another job
        return size.kind == "bandwidth" and not job.form
    if variant == "eager":
        return job.form != "Into"
    return variant == "retainops" or job.point is None
