"""The checks behind `retainops check`: ops in dtypes and layouts, down each path, in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from retainops import dispatch, registry
from retainops.points import unretained
from retainops.registry import Op
from retainops.testing.check import Report, Row, check_layouts, check_op

KERNELS, REFERENCE = "kernels", "reference"
SPREAD = 2
"""How many layouts besides contiguous an op is checked in whose like is checked in all."""


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

    name = "a simulated GPU (Triton's interpreter): no real one here"
    return [Path(KERNELS, f"kernels: on {name}", device, lambda: simulated_gpu(compiles=False)), reference]


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

    def same_bits(self, row: Row | None) -> bool:
        """Whether this quantity had the same bits in every run."""
        return self.report is None or row is None or row.name not in self.report.differing

    def passed(self, row: Row | None) -> bool:
        """Whether this quantity is right: its error, its bits, and inputs that are untouched."""
        return self.report is not None and row is not None and row.ok and self.same_bits(row) and self.report.intact

    def __str__(self) -> str:
        what = self.raised if self.report is None else str(self.report)
        return f"{self.op}, {self.dtype}, {self.layout}, {self.path} path: {what}"


@dataclass(frozen=True)
class Task:
    """What one process does in one go: an op in a dtype down a path, in all layouts or some of them.

    Attributes:
        op, dtype, path: by name.
        size: what the op's sample inputs are made for.
        turn: which layouts, if not all: other ones for each number.
    """

    op: str
    dtype: torch.dtype
    path: str
    size: torch.Size
    turn: int | None = None


def tasks(ops: Sequence[Op], dtypes: Sequence[torch.dtype], size: torch.Size, every_layout: bool) -> list[Task]:
    """What there is to do: all layouts for one op of each kind, or for every op; a spread of them for the others."""
    every = {op.name for op in ops} if every_layout else _one_of_each_kind(ops)
    found = [
        Task(op.name, dtype, path.name, size, None if op.name in every else i * len(dtypes) + j)
        for path in paths()
        for i, op in enumerate(ops)
        for j, dtype in enumerate(dtypes)
    ]
    return sorted(found, key=lambda task: task.turn is not None)  # the long ones first


def _one_of_each_kind(ops: Sequence[Op]) -> set[str]:
    """The first op of each kind: of so many inputs of these types, and points of these shapes."""
    first: dict[Any, str] = {}
    for op in ops:
        inputs = op.sample(torch.Size((2, 2)), torch.float32, "cpu", torch.Generator())
        kind = op.kind, tuple(map(type, inputs)), tuple(p.shape for p in op.points)
        first.setdefault(kind, op.name)
    return set(first.values())


def outcomes(work: Sequence[Task], jobs: int) -> Iterator[list[Outcome]]:
    """Do the tasks, the results of each as they come: in this process, or in so many others."""
    if jobs == 1 or len(work) == 1:
        yield from map(run, work)
        return
    # Not forked: PyTorch has threads of its own by now, and a CUDA context may not be inherited.
    spawned = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(min(jobs, len(work)), spawned, torch.set_num_threads, (1,)) as pool:
        try:
            with _uninterrupted():  # which the others inherit, for as long as they live
                submitted = [pool.submit(run, task) for task in work]
            for done in as_completed(submitted):
                yield done.result()
        except BaseException:  # at an interrupt, say, nobody waits for the rest
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in before:
                    process.terminate()
            raise


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def cores() -> int:
    """How many processes this machine can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Task) -> list[Outcome]:
    """Do a task."""
    path = next(path for path in paths() if path.name == task.path)
    with path.entered():
        return list(sweep(registry.find(task.op), task.dtype, task.size, path, task.turn))


def sweep(op: Op, dtype: torch.dtype, size: torch.Size, path: Path, turn: int | None = None) -> Iterator[Outcome]:
    """Check an op in a dtype in the layouts that eager PyTorch takes, down a path that has been entered.

    Args:
        op: the op.
        dtype: of its inputs.
        size: what its sample inputs are made for.
        path: the path; a call that its kernels refuse is left to the reference path's turn.
        turn: None: all layouts; otherwise contiguous and `SPREAD` others, other ones for each number.
    """
    try:
        made = check_layouts(*_inputs(op, dtype, size, path.device))
        two = torch.Size(max(n, 2) for n in size)  # by broadcasting, eager takes one row beside none: is it so for two?
        wider = check_layouts(*_inputs(op, dtype, two, path.device)) if two != size else {}
    except Exception as e:  # more than there is memory for, or fewer elements than the op's sample can be made of
        what = op.name, str(dtype).removeprefix("torch."), path.name, "inputs"
        yield Outcome(*what, None, f"could not be made of shape {'x'.join(map(str, size))}: {type(e).__name__}: {e}")
        return
    taken = [name for name, x in made.items() if _eager_takes(op, x)]
    taken = [name for name in taken if name not in wider or _eager_takes(op, wider[name])]
    layouts = {name: x for name, x in made.items() if name == "contiguous" or name in taken}
    chosen = list(layouts)
    if turn is not None:
        others = chosen[1:]
        chosen = ["contiguous", *(others[(turn * SPREAD + i) % len(others)] for i in range(min(SPREAD, len(others))))]
    for layout in chosen:
        if path.name != KERNELS or dispatch.why_reference(op, layouts[layout]) is None:
            yield _outcome(op, dtype, path, layout, layouts[layout])


def _inputs(op: Op, dtype: torch.dtype, size: torch.Size, device: str) -> tuple[Any, ...]:
    """Sample inputs, twice as wide where that is what the op takes: halves, of which one column has none."""
    given, wider = (
        op.sample(shape, dtype, device, torch.Generator().manual_seed(0))
        for shape in (size, torch.Size((*size[:-1], 2 * size[-1])))
    )
    takes = _eager_takes(op, given) and all(x.numel() for x in given if isinstance(x, torch.Tensor))
    chosen = wider if not takes and _eager_takes(op, wider) else given
    if op.constants:  # what has no gradient on the kernels must not ask for one, or the reference would be checked
        for i, x in enumerate(chosen):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and i not in op.constants:
                x.requires_grad_()
    return chosen


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
