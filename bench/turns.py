"""Steps of several ways that share one model's weights: what each computes, its memory, and times taken in turn.

A way that fails has the reason as its result, and the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import model_ways
from bench.model_ways import EAGER, Step, Way

Result = dict[str, Any]
Save = Callable[[dict[str, Result]], None]
BARS = {"loss": 5e-3, "gradient_norm": 2e-2, "read_l2": 2e-2}
"""How far from eager's, relatively: a loss of bfloat16 is rounded by up to 2^-9, a gradient at each step of its way."""


class Steps:
    """Measures steps on one model's weights.

    Args:
        model: whose weights the ways share.
        tokens: the batch, which is also its labels.
    """

    def __init__(self, model: Any, tokens: torch.Tensor) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.tokens, self.on_gpu = tokens, tokens.is_cuda

    def first(self, step: Step) -> Result:
        """Warm a way up: what its first step took, what it computed, its peak memory, and a first time."""
        start = time.perf_counter()
        self._clear()
        loss, read = step(self.tokens)
        found: Result = {"loss": loss.item()}
        found["first_seconds"] = time.perf_counter() - start
        found["gradient_norm"] = self._gradient_norm()
        if read is not None:
            found["read"] = len(read)
            found["read_l2"] = sum(of["l2"] ** 2 for of in read.values()) ** 0.5
        found["peak_bytes"] = self._peak(step)
        found["alone_seconds"] = min(self.time(step)[0] for _ in range(2))
        return found

    def time(self, step: Step) -> tuple[float, float]:
        """Seconds of a step, and how long the device worked on when the host had queued all of it.

        If it hardly did, it waited for the host before, and the seconds are the host's. (After a step that reads from
        the device nothing is left to do, which says nothing.)
        """
        self._clear()
        gc.collect()
        if not self.on_gpu:
            start = time.perf_counter()
            step(self.tokens)
            return time.perf_counter() - start, 0.0
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step(self.tokens)
        end.record()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3, time.perf_counter() - queued

    def _peak(self, step: Step) -> int | None:
        """What a step adds to weights and gradients, which are there from the step before, as when they accumulate."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(self.tokens)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _gradient_norm(self) -> float:
        grads = [p.grad for p in self.weights if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        return torch.linalg.vector_norm(torch.stack(norms)).item()

    def _clear(self) -> None:
        for p in self.weights:
            p.grad = None


class Turns:
    """Runs the ways: each is warmed up, then they take turns.

    Args:
        ways: by name; what of them is compared is compared with the first that has it.
        model: each way gets a copy that shares its weights.
        steps: what measures.
        late: whether no new way and no further round may start.
        save: called with the results so far, after each way and each round.

    Attributes:
        found: the result of each way; of one that failed, with the reason under "error".
    """

    def __init__(self, ways: dict[str, Way], model: Any, steps: Steps, late: Callable[[], bool], save: Save) -> None:
        self.ways, self.model, self.steps, self.late, self.save = ways, model, steps, late, save
        self.found: dict[str, Result] = {}
        self.ready: dict[str, Step] = {}

    def run(self, names: list[str], rounds: int) -> None:
        """Warm up, and time in turn. Eager takes part each time, so that ratios are of the same rounds."""
        for name in names:
            self._warm(name)
        if any(name in self.ready for name in names):
            self._take(names, rounds)

    def _warm(self, name: str) -> None:
        self.found[name] = {"what": self.ways[name].what}
        if self.late():
            self.found[name]["error"] = "not started: the time given by --seconds was over"
        else:
            print(f"model_step: {name}: {self.ways[name].what}", flush=True)
            with self._failing(name):
                step = self.ways[name].prepare(model_ways.sharing(self.model))
                self.found[name] |= self.steps.first(step)
                self.found[name] |= {"seconds": self.found[name]["alone_seconds"], **self._differences(name)}
                self.ready[name] = step
        self.save(self.found)

    def _take(self, names: list[str], rounds: int) -> None:
        times: dict[str, list[float]] = {name: [] for name in dict.fromkeys([EAGER, *names]) if name in self.ready}
        lefts: dict[str, list[float]] = {name: [] for name in times}
        order = random.Random(0)
        for n in range(rounds):
            if n and self.late():
                break
            for name in order.sample(list(times), len(times)):
                if name in self.ready:
                    with self._failing(name):
                        seconds, left = self.steps.time(self.ready[name])
                        times[name].append(seconds)
                        lefts[name].append(left)
            for name in filter(times.get, names):
                self._keep(name, times[name], lefts[name], times.get(EAGER))
            self.save(self.found)

    def _keep(self, name: str, times: list[float], lefts: list[float], eager: list[float] | None) -> None:
        row: Result = {"seconds": statistics.median(times), "times": times}
        if self.steps.on_gpu and "read" not in self.found[name]:
            row["host_limited"] = statistics.median(lefts) < 0.05 * row["seconds"]
        if eager:  # of the same rounds
            row["of_eager"] = row["seconds"] / statistics.median(eager)
        self.found[name] |= row

    def _differences(self, name: str) -> Result:
        """Which numbers are further from those of eager code than the dtype explains."""
        mine, far = self.found[name], []
        for what, bar in BARS.items():
            first, other = next(((name, r[what]) for name, r in self.found.items() if what in r), ("", 0.0))
            if what in mine and not abs(mine[what] - other) <= bar * abs(other):  # so nan differs, too
                far.append(f"{what} is {mine[what]:.6g}, of {first} {other:.6g}")
        return {"differs": far}

    @contextlib.contextmanager
    def _failing(self, name: str) -> Iterator[None]:
        """What fails inside is the result of this way, and no other way's."""
        try:
            yield
        except Exception as error:
            self.found[name]["error"] = reason(error)
            print(f"model_step: {name} failed: {reason(error)}", file=sys.stderr, flush=True)
            if not isinstance(error, ImportError):  # not installed, which needs no more words
                traceback.print_exc(limit=-5)
            self.ready.pop(name, None)
        gc.collect()  # a graph that was cut off holds its activations in cycles
        if self.steps.on_gpu and name not in self.ready:
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
