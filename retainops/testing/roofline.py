"""The roofline model: a predicted time for the kernels of a call, from bytes and machine code. Not a measurement.

A launch takes as long as the slowest of what it needs: its bytes through memory, its instructions through the issue
slots, and those of each kind through the units that execute them:

    seconds = max(bytes / (bandwidth * 0.86), instructions / (issue slots * 0.77), instructions / lanes of each pipe)

The two factors are calibrated on an H200 (docs/performance.md). Launch overhead, latency, occupancy, the L2
cache and the last, partly filled wave of programs are not modelled: it is for tensors much larger than the L2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from retainops.testing import sass
from retainops.testing.driver import Launch, driver
from retainops.testing.flow import Step, whole_tile
from retainops.testing.sass import Instruction

BANDWIDTH_EFFICIENCY = 0.86  # what kernels without arithmetic reached of an H200's datasheet: 4.1 of 4.8 TB/s
ISSUE_EFFICIENCY = 0.77  # the share of issue slots that an H200 filled where nothing else was short: gelu in bf16
ISSUE_LANES = 128  # a clock and SM: 4 schedulers, each one instruction of a warp of 32 (compute capability 8.0, 9.0)
TABLE_TRIPS = 6  # of the loop in the slow path of sin and cos: one for each word of the table of 2/pi


@dataclass(frozen=True)
class GPU:
    """What the model knows of a GPU.

    Attributes:
        name: as in `GPUS`.
        target: the architecture to compile for.
        sms: streaming multiprocessors.
        clock: boost clock in Hz.
        bandwidth: of its memory, in bytes a second.
        lanes: results a clock and SM, by pipe.
    """

    name: str
    target: str
    sms: int
    clock: float
    bandwidth: float
    lanes: Mapping[str, float]


# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", columns 8.0 and 9.0: fp32 add, multiply
# and fma; packed half (two results a lane, so half the table's 256); 32-bit integer multiply-add; integer add, logic,
# shift and compare; fp64; reciprocal, sin, ex2 (MUFU, and the conversions that SASS gives to the same unit); warp
# shuffle, the rate of the load/store units also, in 32-bit words. Tensor cores: fused multiply-adds of 16-bit values,
# from the datasheets' dense figures (312 and 989 TFLOPS).
_LANES_80 = {"fp32": 64, "half": 128, "imad": 64, "alu": 64, "fp64": 32, "xu": 16, "lsu": 32, "tensor": 1024}
_LANES_90 = {"fp32": 128, "half": 128, "imad": 64, "alu": 64, "fp64": 64, "xu": 16, "lsu": 32, "tensor": 2048}
GPUS = {
    # NVIDIA A100 80GB SXM datasheet: 2,039 GB/s, 19.5 TFLOPS fp32 = 108 SMs x 64 lanes x 2 x 1.41 GHz.
    "A100": GPU("A100", "sm_80", 108, 1.41e9, 2.039e12, _LANES_80),
    # NVIDIA H100 SXM datasheet: 3.35 TB/s, 67 TFLOPS fp32 = 132 SMs x 128 lanes x 2 x 1.98 GHz.
    "H100": GPU("H100", "sm_90", 132, 1.98e9, 3.35e12, _LANES_90),
    # NVIDIA H200 SXM datasheet: 4.8 TB/s, 67 TFLOPS fp32: the H100's chip.
    "H200": GPU("H200", "sm_90", 132, 1.98e9, 4.8e12, _LANES_90),
}

# Opcodes by pipe. The rest is integer and logic ("alu"); those under "" only take an issue slot.
_PIPES = {
    "fp32": r"FFMA|FMUL|FADD",
    "half": r"HFMA2|HMUL2|HADD2",
    "imad": r"IMAD|IMUL",
    "fp64": r"DFMA|DMUL|DADD|DSETP",
    "xu": r"MUFU|F2I|I2F|F2F|FRND|POPC|FLO|BREV",
    "lsu": r"SHFL|LDSM|STSM|REDUX",
    "tensor": r"HMMA|HGMMA",
    "": r"U[A-Z].*|R2UR|S2R|S2UR|CS2R|LDC|ULDC|NOP|BRA|EXIT|CALL|RET|BSSY|BSYNC|BAR|WARPSYNC|DEPBAR|WARPGROUP",
}


@dataclass(frozen=True)
class LaunchTime:
    """The model's time for one launch.

    Attributes:
        name: the kernel's.
        bytes_accessed: what the accesses of all its tiles add up to, each taken as whole. More than what it must move
            where it reads something twice.
        parts: seconds that each resource needs: "memory", "issue" and the pipes.
    """

    name: str
    bytes_accessed: float
    parts: Mapping[str, float]

    @property
    def bound(self) -> str:
        """What it waits for: "memory", "issue", or a pipe."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def seconds(self) -> float:
        """The time of the bound."""
        return self.parts[self.bound]


@dataclass(frozen=True)
class Prediction:
    """What the model says of a call.

    Attributes:
        gpu: for which GPU.
        seconds: of all its launches.
        bound: "memory", "issue", or the busiest pipe ("xu": sin, reciprocal; "fp32"; "lsu"; ...): that of most time.
        bytes_per_second: the bytes that were stated, over the seconds.
        instructions_per_element: executed by threads, over the elements that were stated.
        launches: each launch's part.
    """

    gpu: str
    seconds: float
    bound: str
    bytes_per_second: float
    instructions_per_element: float
    launches: tuple[LaunchTime, ...]

    def __str__(self) -> str:
        return (
            f"predicted by a model, not measured, for one {self.gpu}: {self.seconds * 1e6:.3g} us, "
            f"{self.bytes_per_second / 1e12:.2f} TB/s, bound by {self.bound}, "
            f"{self.instructions_per_element:.1f} instructions an element"
        )


def predict(
    call: Callable[[], Any],
    bytes_moved: float,
    elements: int,
    gpu: str = "H200",
    target: str | None = None,
    slow: bool = False,
    trips: float | None = None,
) -> Prediction:
    """Predict the time of a call's kernels on a GPU that need not be there.

    Args:
        call: as for `static_report`: runs an op on CPU tensors, of the real size (their memory is not touched).
        bytes_moved: the bytes that all its launches must move. Launches share them in proportion to their accesses.
        elements: what `instructions_per_element` is over.
        gpu: one of `GPUS`.
        target: the architecture to compile for; None: the GPU's own.
        slow: every element takes the slow paths (arguments of sin beyond 105615).
        trips: of each loop that walks tensors, which machine code does not tell; None: as many as it takes to move
            bytes_moved. State them for a kernel that reads data again from a cache, such as a matrix product.

    Raises:
        ValueError: an unknown GPU, a target that is not NVIDIA's, nothing to move, or a call that launches nothing.

    Example:
        >>> print(predict(lambda: ro.mul_sin(a, b), bytes_moved=3 * a.nbytes, elements=a.numel()))
        predicted by a model, not measured, for one H200: ...
    """
    if gpu not in GPUS:
        raise ValueError(f"predict: unknown GPU {gpu!r}; expected one of {', '.join(GPUS)}")
    target = target or GPUS[gpu].target
    if not target.startswith("sm_"):
        raise ValueError(f"predict: target is {target!r}; the model knows NVIDIA's machine code only, such as 'sm_90'")
    if bytes_moved <= 0 or elements <= 0:
        raise ValueError(f"predict: bytes_moved is {bytes_moved} and elements is {elements}; both must be positive")
    with driver(target) as launches:
        call()
    if not launches:
        raise ValueError("predict: the call launched no kernel; retainops.explain says which path a call takes")
    walks = [_Walk(launch, slow) for launch in launches]
    times = tuple(_times(walks, bytes_moved, GPUS[gpu], trips))
    bounds = {t.bound: sum(o.seconds for o in times if o.bound == t.bound) for t in times}
    seconds = sum(bounds.values())
    executed = 32 * sum(walk.warps * walk.work["issue"] for walk in walks)
    bound = max(bounds, key=lambda name: bounds[name])
    return Prediction(gpu, seconds, bound, bytes_moved / seconds, executed / elements, times)


class _Walk:
    """What one launch does: for each warp, instructions by pipe; for all threads, bytes outside and inside loops."""

    def __init__(self, launch: Launch, slow: bool) -> None:
        self.name = launch.name
        self.programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
        self.warps = self.programs * launch.kernel.metadata.num_warps
        self.steps = whole_tile(sass.parse(sass.disassemble(launch.kernel.asm["cubin"])), slow)
        self.bytes_once, self.bytes_looped = self._bytes(looped=False), self._bytes(looped=True)
        self.moved = 0.0
        self.work: Counter[str] = Counter()

    def _bytes(self, looped: bool) -> int:
        moving = (s for s in self.steps if s.active and s.instruction.is_global)
        return 32 * self.warps * sum(s.instruction.bits // 8 for s in moving if (s.loop == "memory") == looped)

    def run(self, trips: float) -> None:
        """Count, with so many trips of the loops that walk tensors."""
        self.moved = self.bytes_once + trips * self.bytes_looped
        self.work = work(self.steps, trips)


def work(steps: Iterable[Step], trips: float) -> Counter[str]:
    """What a warp asks of the issue slots and of each pipe, for each of its threads: see `_cost`."""
    times = {"memory": trips, "table": TABLE_TRIPS, "other": 1, "": 1}
    total: Counter[str] = Counter()
    for step in steps:
        total["issue"] += times[step.loop]  # type: ignore[assignment]
        if step.active and (pipe := _pipe(step.instruction)):
            total[pipe] += times[step.loop] * _cost(step.instruction)  # type: ignore[assignment]
    return total


def _times(walks: list[_Walk], bytes_moved: float, gpu: GPU, trips: float | None) -> Iterator[LaunchTime]:
    if trips is None:
        once, looped = sum(w.bytes_once for w in walks), sum(w.bytes_looped for w in walks)
        trips = max(1.0, (bytes_moved - once) / looped) if looped else 1.0
    for walk in walks:
        walk.run(trips)
    moved = sum(walk.moved for walk in walks)
    if not moved:
        raise ValueError("predict: none of the kernels launched reads or writes global memory by LDG or STG")
    for walk in walks:
        clocks = gpu.clock * min(gpu.sms, walk.programs)
        parts = {"memory": bytes_moved * walk.moved / moved / (gpu.bandwidth * BANDWIDTH_EFFICIENCY)}
        for pipe, work in walk.work.items():
            lanes = ISSUE_LANES * ISSUE_EFFICIENCY if pipe == "issue" else gpu.lanes[pipe]
            parts[pipe] = 32 * walk.warps * work / (lanes * clocks)
        yield LaunchTime(walk.name, walk.moved, parts)


def _pipe(i: Instruction) -> str | None:
    """The units that execute an instruction; None: it takes an issue slot and no unit that the model counts."""
    if i.bits:
        return "lsu"
    return next((pipe for pipe, names in _PIPES.items() if re.fullmatch(names, i.base)), "alu") or None


def _cost(i: Instruction) -> float:
    """Results a thread: 32-bit words of an access, multiply-adds of a tensor core, 1 for the rest."""
    if i.bits:
        return max(1, i.bits // 32)
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", i.opcode):  # by a warp group: 128 threads
        return int(shape[1]) * int(shape[2]) * int(shape[3]) / 128
    if shape := re.search(r"HMMA\.(16816|1688)\b", i.opcode):
        return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}[shape[1]] / 32 * (1 + (".TF32" in i.opcode))
    return 1
