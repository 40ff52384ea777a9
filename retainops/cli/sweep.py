"""The checks behind `retainops check`: an op in a dtype, in every layout, down one path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from retainops import dispatch
from retainops.points import unretained
from retainops.registry import Op
from retainops.testing.check import Report, check_layouts, check_op

KERNELS, REFERENCE = "kernels", "reference"


@dataclass(frozen=True)
class Path:
    """A way through the library.

    Attributes:
        name: `KERNELS` or `REFERENCE`.
        description: what it runs on, in a line.
        device: where its tensors are.
        entered: `with path.entered():` makes calls take it.
    """

    name: str
    description: str
    device: str
    entered: Callable[[], contextlib.AbstractContextManager[Any]]


def paths() -> list[Path]:
    """The paths of this machine: the kernels on a GPU, real or simulated, where triton is installed; the reference."""
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    reference = Path(REFERENCE, f"reference: on {device}", device, lambda: dispatch.backend(REFERENCE))
    if not dispatch.HAS_TRITON:
        return [reference]
    if has_gpu:
        name = torch.cuda.get_device_name()
        return [Path(KERNELS, f"kernels: on {name}", device, lambda: dispatch.backend("auto")), reference]
    from retainops.testing.simulated import simulated_gpu

    name = "a simulated GPU (sm_90, in Triton's interpreter): no real one here"
    return [Path(KERNELS, f"kernels: on {name}", device, simulated_gpu), reference]


@dataclass(frozen=True)
class Outcome:
    """One check: what was checked, and the report, or what was raised in its place."""

    op: str
    dtype: str
    path: str
    layout: str
    report: Report | None
    raised: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return self.report is not None and self.report.ok

    @property
    def sound(self) -> bool:
        """Whether it ran to its end, with the right bits and its inputs untouched, whatever its errors are."""
        return self.report is not None and not self.report.problems

    def __str__(self) -> str:
        what = self.raised if self.report is None else str(self.report)
        return f"{self.op}, {self.dtype}, {self.layout}, {self.path} path: {what}"


def sweep(op: Op, dtype: torch.dtype, size: torch.Size, path: Path) -> Iterator[Outcome]:
    """Check an op in a dtype in every layout that eager PyTorch takes, down a path that has been entered.

    Args:
        op: the op.
        dtype: of its inputs.
        size: what its sample inputs are made for.
        path: the path; a call that its kernels refuse is left to the reference path's turn.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = op.sample(size, dtype, path.device, generator)
    for layout, laid_out in check_layouts(*inputs).items():
        if path.name == KERNELS and dispatch.why_reference(op, laid_out) is not None:
            continue
        if layout != "contiguous" and not _eager_takes(op, laid_out):
            continue
        yield _outcome(op, dtype, path, layout, laid_out)


def _eager_takes(op: Op, inputs: tuple[Any, ...]) -> bool:
    try:
        op.reference(*inputs, unretained)
    except (RuntimeError, ValueError, IndexError):
        return False
    return True


def _outcome(op: Op, dtype: torch.dtype, path: Path, layout: str, inputs: tuple[Any, ...]) -> Outcome:
    what = op.name, str(dtype).removeprefix("torch."), path.name, layout
    try:
        return Outcome(*what, check_op(op.call, *inputs, reference=op.reference))
    except Exception as e:  # the other checks are worth having whatever this one raised
        return Outcome(*what, None, f"raised {type(e).__name__}: {e}")
