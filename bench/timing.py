"""How a call is timed: batches of calls, on the host's clock or between two events on the device.

Nothing here knows an op, and the device is passed in, so the tests run the asynchronous branch on a made-up one.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Batch = Callable[[int], None]
"""Makes that many calls, one after the other."""

SPIN_CYCLES_PER_SECOND = 2e9  # what torch.cuda._sleep counts; the clock of current GPUs, or a little above it


class Clock:
    """The timer that pytest-benchmark reads: it stands still, except for what `advance` adds.

    pytest-benchmark takes the difference of two readings around a round. A round here is a batch of calls with a spin
    and a synchronisation around it, so the round itself says how long one of its calls took.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let the round in progress have lasted this long."""
        self.now += seconds


def rotation(calls: Sequence[Callable[[], Any]]) -> Batch:
    """A batch that takes the calls in turn, from batch to batch.

    As many results as there are calls stay alive, so the allocator hands out fresh memory for them too: neither what
    is read nor what is written is still in the cache from the call before.
    """
    turn = itertools.cycle(calls)
    results: deque[Any] = deque(maxlen=len(calls))

    def batch(n: int) -> None:
        for _ in range(n):
            results.append(next(turn)())

    return batch


class Stopwatch(Protocol):
    """Seconds a call takes, as the mean over a batch of n."""

    def seconds(self, batch: Batch, n: int) -> float: ...


class HostStopwatch:
    """Wall clock around a batch and the device's catching up: what a caller waits, host and device overlapped."""

    def __init__(self, synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter):
        self.synchronize, self.clock = synchronize, clock

    def seconds(self, batch: Batch, n: int) -> float:
        self.synchronize()
        start = self.clock()
        batch(n)
        self.synchronize()
        return (self.clock() - start) / n


class DeviceStopwatch:
    """Device time of a batch, between two events behind a spin kernel.

    The spin keeps the device busy while the host queues the whole batch, so the launches run back to back and the
    host's speed is not in the figure. It was long enough if the device had not reached the first event when the last
    call was queued; if it was not, the batch is timed again behind a longer one.

    Args:
        device: `torch.cuda`, or what has its `Event`, `_sleep` and `synchronize`.
        host_seconds: what the host takes for one call, at most.

    Attributes:
        host_limited: some batch outran the longest spin: the host's speed may be in its figure.
    """

    LONGEST_SPIN = 0.2

    def __init__(self, device: Any, host_seconds: float) -> None:
        self.device = device
        self.host_seconds = host_seconds
        self.stretch = 1.5
        self.host_limited = False

    def seconds(self, batch: Batch, n: int) -> float:
        while True:
            spin = min(self.stretch * self.host_seconds * n + 1e-3, self.LONGEST_SPIN)
            seconds, queued_in_time = self._behind_spin(batch, n, spin)
            if queued_in_time:
                return seconds
            if spin >= self.LONGEST_SPIN:
                self.host_limited = True
                return seconds
            self.stretch *= 2

    def _behind_spin(self, batch: Batch, n: int, spin: float) -> tuple[float, bool]:
        start, end = (self.device.Event(enable_timing=True) for _ in range(2))
        self.device.synchronize()
        self.device._sleep(int(spin * SPIN_CYCLES_PER_SECOND))
        start.record()
        batch(n)
        end.record()
        queued_in_time = not start.query()
        self.device.synchronize()
        return start.elapsed_time(end) * 1e-3 / n, queued_in_time


@dataclass(frozen=True)
class Pace:
    """How much time to spend.

    Attributes:
        batch: seconds that a batch should last.
        case: seconds that all rounds of a case should last.
        rounds: fewest and most rounds.
        calls: most calls in a batch.
    """

    batch: float
    case: float
    rounds: tuple[int, int]
    calls: int


QUICK = Pace(batch=0.0, case=0.0, rounds=(1, 1), calls=2)
# On a CPU many short rounds: where others use it too, their time slices fall into few of them, and not into the median.
CPU = Pace(batch=2e-4, case=0.7, rounds=(7, 301), calls=100)
HOST = Pace(batch=5e-3, case=0.06, rounds=(7, 41), calls=1000)
# 100 calls of a few kernels each stay below the 1024 launches that a CUDA stream queues before the host must wait.
DEVICE = Pace(batch=1e-3, case=1e-2, rounds=(5, 11), calls=100)


def plan(seconds: float, pace: Pace) -> tuple[int, int]:
    """(calls in a batch, rounds) for a call that takes this long."""
    calls = min(max(round(pace.batch / seconds), 1), pace.calls)
    fewest, most = pace.rounds
    return calls, min(max(round(pace.case / (calls * seconds)), fewest), most)


def prepare(batch: Batch, warm: int, gpu: Any | None, bandwidth: bool, quick: bool) -> tuple[Stopwatch, int, int]:
    """Warm up, and choose how to time.

    Args:
        batch: the calls to time.
        warm: calls to make first, which compile and take the memory that the rotation will use.
        gpu: `torch.cuda`, or None on a CPU.
        bandwidth: time the device alone, where there is one, and not the host.
        quick: one round, as short as it can be.

    Returns:
        (what times a batch, calls in a batch, rounds).
    """
    host = HostStopwatch(gpu.synchronize) if gpu else HostStopwatch()
    batch(warm)
    wall = host.seconds(batch, 1)
    if wall < 0.05 and not quick:
        wall = min(host.seconds(batch, 3) for _ in range(3))
    if gpu and bandwidth:
        return DeviceStopwatch(gpu, wall), *plan(wall, QUICK if quick else DEVICE)
    return host, *plan(wall, QUICK if quick else HOST if gpu else CPU)
