"""What a call costs the host, forward and backward, on tensors so small that a device would wait for it.

    python -m bench.host_time           # a table
    python -m bench.host_time --json    # the same in microseconds, for machines

Where there is a GPU it is the wall clock of calls one after the other. Elsewhere launches do nothing (they are prepared
for a simulated GPU, and compiled), so that Python alone is timed: processor time, the least of several rounds. Eager
operations compute there, on tensors of a few hundred elements, so both are near to what the host does and no more.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import retainops as ro

Tensor = torch.Tensor
Call = Callable[[], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH = 8, 64


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def step(forward: Callable[[], Tensor], *inputs: Tensor) -> Call:
    """Forward, and the gradients of these inputs."""
    dy = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, dy)


def rms_in_parts(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def layer_norm_in_parts(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * w + b


def softmax_in_parts(x: Tensor) -> Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def loss_in_parts(x: Tensor, target: Tensor) -> Tensor:
    return (torch.logsumexp(x, -1) - x.gather(-1, target[:, None])[:, 0]).mean()


def calls() -> dict[str, dict[str, Call]]:
    """By op: the expression in eager operations, PyTorch's own function if there is one, and ours."""
    a, b = drawn(ROWS * WIDTH), drawn(ROWS * WIDTH)
    x, w, bias = drawn(ROWS, WIDTH), drawn(WIDTH), drawn(WIDTH)
    target = torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
    same, dy = ro.Retained("c"), torch.ones_like(a)

    def eager_kept() -> None:  # as ours, below: `backward` would add to the `.grad` of the call before
        c = a * b
        torch.autograd.grad(torch.sin(c), [a, b, c], dy)

    def kept(request: Callable[[], ro.Retained]) -> Call:
        def call() -> None:
            retained = request()
            y = ro.mul_sin(a, b, retain=retained)
            torch.autograd.grad(y, [a, b, retained.c.tensor], dy, allow_unused=True)

        return call

    return {
        "mul_sin": {"eager": step(lambda: torch.sin(a * b), a, b), "ours": step(lambda: ro.mul_sin(a, b), a, b)},
        "mul_sin, c retained": {"eager": eager_kept, "ours": kept(lambda: same)},
        "mul_sin, in a new Retained": {"eager": eager_kept, "ours": kept(lambda: ro.Retained("c"))},
        "mul_sin, l2 of c": {"ours": kept(lambda: ro.Retained(c=ro.Stats("l2")))},
        "swiglu": {"eager": step(lambda: F.silu(a) * b, a, b), "ours": step(lambda: ro.swiglu(a, b), a, b)},
        "rms_norm": {
            "eager": step(lambda: rms_in_parts(x, w), x, w),
            "torch": step(lambda: F.rms_norm(x, (WIDTH,), w), x, w),
            "ours": step(lambda: ro.rms_norm(x, w), x, w),
        },
        "layer_norm": {
            "eager": step(lambda: layer_norm_in_parts(x, w, bias), x, w, bias),
            "torch": step(lambda: F.layer_norm(x, (WIDTH,), w, bias), x, w, bias),
            "ours": step(lambda: ro.layer_norm(x, w, bias), x, w, bias),
        },
        "softmax": {
            "eager": step(lambda: softmax_in_parts(x), x),
            "torch": step(lambda: torch.softmax(x, -1), x),
            "ours": step(lambda: ro.softmax(x), x),
        },
        "cross_entropy": {
            "eager": step(lambda: loss_in_parts(x, target), x),
            "torch": step(lambda: F.cross_entropy(x, target), x),
            "ours": step(lambda: ro.cross_entropy(x, target), x),
        },
    }


@contextlib.contextmanager
def launches_that_do_nothing() -> Iterator[None]:
    """Inside the `with` the kernels' path is taken; each launch is compiled, and from the second time on skipped."""
    from retainops.ops import _launch
    from retainops.testing.driver import driver

    starter, _launch._starter = _launch._starter, lambda compiled, grid: lambda *arguments: None
    _launch.forget()
    try:
        with driver():
            yield
    finally:
        _launch._starter = starter
        _launch.forget()


def seconds_of(call: Call, rounds: int, number: int) -> float:
    """Of one call: the least of several rounds."""
    on_gpu = DEVICE == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    for _ in range(5):  # the first calls compile, and are noted
        call()
    found = []
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(number):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        found.append((clock() - start) / number)
    return min(found)


def measure(rounds: int = 7, number: int = 300) -> dict[str, dict[str, float]]:
    """Microseconds, by op and way. What several rows are compared with is timed once."""
    torch.set_num_threads(1)
    with contextlib.nullcontext() if DEVICE == "cuda" else launches_that_do_nothing():
        timed = functools.cache(lambda call: seconds_of(call, rounds, number) * 1e6)
        return {op: {way: timed(call) for way, call in ways.items()} for op, ways in calls().items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="microseconds, by op and way")
    parser.add_argument("--number", type=int, default=300, help="calls of a round (default 300)")
    options = parser.parse_args(argv)
    found = measure(number=options.number)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    on = "a GPU, wall clock" if DEVICE == "cuda" else "no GPU: launches do nothing, processor time"
    table = Table(title=f"µs of a call, forward and backward ({on})")
    for i, name in enumerate(("op", "eager, in parts", "PyTorch's own", "retainops", "of eager")):
        table.add_column(name, justify="right" if i else "left")
    for op, of in found.items():
        ratio = f"{of['ours'] / of['eager']:.2f}" if "eager" in of else ""
        cells = (f"{of[way]:.0f}" if way in of else "" for way in ("eager", "torch", "ours"))
        table.add_row(op, *cells, ratio)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
