"""What is measured: every op of the registry x dtype x size x job x variant. Adding an op adds its benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import torch

from bench.peers import PEERS
from retainops import Into, Retained, Stats
from retainops.dispatch import why_reference
from retainops.ops._plan import several
from retainops.points import unretained
from retainops.registry import Op

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDTH = 4096  # elements in a row; row ops and pointwise ops are measured on the same shapes
MIB = 2**20

Call = Callable[[], Any]
Prepare = Callable[[Sequence[Any]], Call]
Sample = Callable[..., tuple[Any, ...]]


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
        forward, backward, point = op.traffic(*inputs)
        if self.direction == "forward":
            return forward
        more = point if self.point and self.form != "Stats" else 0
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
            return VARIANTS[self.variant](self)
        peer = PEERS[self.op.name][self.variant]()
        assert peer is not None, "cases() leaves out what is not installed"
        return partial(_plain, peer, self.job)

    def path(self, inputs: Sequence[Any]) -> str:
        """Which code ran."""
        if self.variant == "retainops":
            return "Triton kernels" if why_reference(self.op, tuple(inputs)) is None else "reference"
        return self.variant


AUTOTUNED = "torch.compile, max-autotune"
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


def backward(y: torch.Tensor | tuple[torch.Tensor, ...], inputs: Sequence[Any], *slots: torch.Tensor) -> Call:
    """A backward of the graph behind y (one output, or several), again and again.

    retain_graph=True is what lets one graph be timed many times. It is fair here: no op of retainops overwrites its
    saved tensors, and autograd neither copies nor recomputes because of it. What is timed on the host is autograd's
    engine, the op's backward and the allocation of the gradients; accumulating them into `.grad` is left out for all.
    """
    outputs = several(y)
    dys = [random_like(y) for y in outputs]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad] + list(slots)
    # What is retained in another form than the gradient itself is returned as None, which "unused" is to autograd.
    return partial(torch.autograd.grad, outputs, wanted, dys, retain_graph=True, allow_unused=True)


def random_like(y: torch.Tensor) -> torch.Tensor:
    """A gradient for y."""
    return torch.randn_like(y)


def _retainops(case: Case) -> Prepare:
    op, job = case.op, case.job

    def prepare(inputs: Sequence[Any]) -> Call:
        if job.point is None:
            return _plain(op.call, job, inputs)
        if job.form == "Stats":
            kept = Retained(**{job.point: Stats("l2", "amax")})
        elif job.form == "Into":
            kept = Retained(**{job.point: Into(_buffer(op, job.point, inputs))})
        else:
            kept = Retained(job.point)
        slot = kept[job.point]
        if job.direction == "step":
            return partial(_step, lambda: op.call(*inputs, retain=kept), inputs, lambda: [slot.tensor])
        y = op.call(*inputs, retain=kept)
        grads = backward(y, inputs, slot.tensor)
        if not job.form:
            return grads

        def call() -> Any:
            slot.reset()  # or it would be added to: one more read of a buffer
            return *grads(), slot.grad if job.form == "Into" else slot

        return call

    return prepare


def _buffer(op: Op, point: str, inputs: Sequence[Any]) -> torch.Tensor:
    """One for a point's gradient: its shape is known after a call."""
    probe = Retained(point)
    op.call(*inputs, retain=probe)
    leaf = probe[point].tensor
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _eager(case: Case) -> Prepare:
    op, job = case.op, case.job

    def prepare(inputs: Sequence[Any]) -> Call:
        if job.point is None:
            return _plain(_reference(op), job, inputs)
        interior: list[torch.Tensor] = []

        def point(name: str, value: torch.Tensor) -> torch.Tensor:
            if name == job.point:
                value.retain_grad()
                interior.append(value)
            return value

        if job.direction == "step":

            def forward() -> Any:
                interior.clear()
                return op.reference(*inputs, point)

            return partial(_step, forward, inputs, lambda: interior)
        y = op.reference(*inputs, point)
        # On an input retain_grad() does nothing, and an output's gradient comes from outside.
        is_outer = interior[0].is_leaf or any(interior[0] is output for output in several(y))
        grads = backward(y, inputs, *(interior if is_outer else ()))

        def call() -> Any:
            if not is_outer:
                interior[0].grad = None  # or it would be added to
            found = grads() if is_outer else (*grads(), interior[0].grad)
            norms = (torch.linalg.vector_norm(found[-1], ord) for ord in (2, inf))  # each a single pass
            return (*found, *norms) if job.form == "Stats" else found

        return call

    return prepare


def _compiled(case: Case) -> Prepare:
    return partial(_plain, _compile(case.op, None, case.label, case.dtype, case.size), case.job)


def _autotuned(case: Case) -> Prepare:
    mode = "max-autotune-no-cudagraphs"
    return partial(_plain, _compile(case.op, mode, case.label, case.dtype, case.size), case.job)


@functools.lru_cache(maxsize=1)
def _compile(op: Op, mode: str | None, *tensors: Any) -> Callable[..., torch.Tensor]:
    """The reference, compiled for tensors of one shape and dtype; forward and backward share it."""
    # As in a program of fixed shapes. Without a reset dynamo gives up after a few of them.
    torch.compiler.reset()
    return torch.compile(_reference(op), fullgraph=True, dynamic=False, mode=mode)


def _reference(op: Op) -> Callable[..., torch.Tensor]:
    def function(*inputs: Any) -> torch.Tensor:
        return op.reference(*inputs, unretained)

    return function


def _step(forward: Call, inputs: Sequence[Any], kept: Callable[[], Sequence[torch.Tensor]] = list) -> Any:
    """Forward and backward; the gradient that arrives is all ones, of one stored element."""
    outputs = several(forward())
    dys = [torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape) for y in outputs]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(outputs, [*wanted, *kept()], dys, allow_unused=True)


def _plain(function: Callable[..., torch.Tensor], job: Job, inputs: Sequence[Any]) -> Call:
    if job.direction == "forward":
        return partial(function, *inputs)  # as in training: autograd records it
    if job.direction == "step":
        return partial(_step, partial(function, *inputs), inputs)
    return backward(function(*inputs), inputs)


def _copy(case: Case) -> Prepare:
    op, job = case.op, case.job

    def prepare(inputs: Sequence[Any]) -> Call:
        device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        elements = job.fewest_bytes(op, inputs) // 2 // 4  # half of the bytes are read, half are written
        return torch.randn(elements, device=device).clone

    return prepare


VARIANTS: Mapping[str, Callable[[Case], Prepare]] = {
    "retainops": _retainops,
    "eager": _eager,
    "torch.compile": _compiled,
    AUTOTUNED: _autotuned,
    "copy": _copy,
}
