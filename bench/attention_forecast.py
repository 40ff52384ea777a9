"""What a model says of the time that asking attention takes of backward, on a GPU that need not be there.

    python -m bench.attention_forecast    # a table in Markdown, for docs/ops/attention.md

From the machine code of each kernel: what a chunk of a product takes of the tensor cores and of the L2, and what the
rest of a tile takes of issue slots and of the units for exponentials. Where registers leave room for one program on a
multiprocessor these come one after the other. Rates beyond `retainops.testing.roofline` are assumptions, named below.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from retainops.ops import _scores_kernels as kernels
from retainops.ops._scores import Scores, Wanted
from retainops.ops._scores_launch import Tiles
from retainops.testing import sass
from retainops.testing.driver import driver
from retainops.testing.flow import Step
from retainops.testing.roofline import BANDWIDTH_EFFICIENCY, GPUS, ISSUE_EFFICIENCY, ISSUE_LANES, work
from retainops.testing.static import report

BACKWARD = 600e12
"""Operations a second of PyTorch's fused backward, which takes 10 B H N^2 D of them: cuDNN's on an H200, measured."""
TENSOR_EFFICIENCY = 0.7
"""Assumed: what of the tensor cores' rate a loop of products reaches."""
L2 = 5.5e12
"""Assumed: bytes a second from the L2."""
REGISTERS, SHARED = 65536, 227 * 1024
"""Of a multiprocessor, compute capability 9.0."""
TOKENS = 2048, 4096, 8192, 16384
ASKED = {
    "the gradient of p": ("grad", 2, lambda t: (None, Wanted(t))),
    "the gradient of s": ("grad", 2, lambda t: (Wanted(t), None)),
    "`chefer`": ("relevance", 0, lambda t: (None, Wanted(relevance=("chefer",)))),
    "`legrad`": ("legrad", 0, lambda t: (None, Wanted(relevance=("legrad",)))),
}
"""What is asked: the kind of its tiles, the bytes of an element that it stores for each head, and how to ask."""


@dataclass(frozen=True)
class Tile:
    """What a tile of one head takes of a multiprocessor, in seconds; `resident` programs share one."""

    chunks: float
    rest: float
    resident: int

    @property
    def seconds(self) -> float:
        return self.chunks + self.rest if self.resident == 1 else max(self.chunks, self.rest) * self.resident


def forecast(asked: str, tokens: int, heads: int, width: int, gpu: str) -> float:
    """Seconds, in bfloat16, not causal."""
    kind, stored, ask = ASKED[asked]
    n, t = 1024, torch.empty(1, 4, 1024, 1024, dtype=torch.bfloat16)
    q, lse = torch.empty(1, 4, n, width, dtype=torch.bfloat16), torch.empty(1, 4, n)
    scores = Scores(q, q, q, None, q, None, lse, 0.1, False, (None, None), None, None, None, lse)
    with driver(GPUS[gpu].target) as launches:
        cut = kernels.tiles_of(scores, kind)
        kernels.answer(scores, *ask(t))
    tile = _tile(launches[-1], cut, width, 1 if asked in ("the gradient of p", "`legrad`") else 2, gpu)
    rows, columns = math.ceil(tokens / cut.rows), math.ceil(tokens / cut.columns)
    if kind == "relevance":
        parts = next((i for i in range(1, heads) if not heads % i and i * rows * columns >= kernels.PROGRAMS), heads)
        programs, each = rows * columns * parts, heads // parts
    else:
        programs, each = rows * heads, columns
    waves = math.ceil(programs / (GPUS[gpu].sms * tile.resident))
    computed = waves * each * tile.seconds
    written = stored * heads * tokens**2 + (4 * tokens**2 if kind == "relevance" else 0)
    return max(computed, written / (GPUS[gpu].bandwidth * BANDWIDTH_EFFICIENCY))


def _tile(launch: Any, cut: Tiles, width: int, products: int, gpu: str) -> Tile:
    of, metadata = GPUS[gpu], launch.kernel.metadata
    found = report(launch, of.target)
    chunk, rest = _split(sass.parse(found.sass))
    chunks = products * math.ceil(width / cut.chunk)
    tensor = 2 * cut.rows * cut.columns * cut.chunk / (2 * of.lanes["tensor"] * of.clock * TENSOR_EFFICIENCY)
    read = 2 * (cut.rows + cut.columns) * cut.chunk / (L2 / of.sms)
    threads = 32 * metadata.num_warps

    def seconds(counts: Counter[str]) -> float:
        lanes = {"issue": ISSUE_LANES * ISSUE_EFFICIENCY, **of.lanes}
        times = (threads * n / (lanes[pipe] * of.clock) for pipe, n in counts.items() if pipe != "tensor")
        return max(times, default=0.0)

    resident = min(REGISTERS // (found.registers * threads), SHARED // found.shared)
    return Tile(chunks * max(tensor, read, seconds(chunk)), seconds(rest), max(min(resident, 2), 1))


def _split(code: Sequence[sass.Instruction]) -> tuple[Counter[str], Counter[str]]:
    """Of the loop that holds the products: what a chunk executes beside them, and what else a tile does.

    Where a trip is a chunk, the latter is skipped but at a tile's end. Where nothing is skipped, a trip is a whole
    tile, and a chunk is its products alone.
    """
    products = [i.address for i in code if i.base == "HGMMA"]
    jumps = [i for i in code if i.base == "BRA" and i.guard is not None and i.opcode == "BRA"]
    back = min((i for i in jumps if i.target <= products[0] and i.address > products[-1]), key=lambda i: i.address)
    loop = [i for i in code if back.target <= i.address <= back.address]
    skips = [(i.address, i.target) for i in loop if i.base == "BRA" and i.guard and i.target > i.address]
    always = [i for i in loop if not any(a < i.address < b for a, b in skips)]
    once = [i for i in loop if any(a < i.address < b for a, b in skips)]
    chunk, rest = (always, once) if once else ([], always)
    return work(map(Step, chunk), 1), work(map(Step, rest), 1)


def table(heads: int = 32, width: int = 128, gpu: str = "H200") -> str:
    """Backward with over backward without."""
    without: Callable[[int], float] = lambda n: 10 * heads * n**2 * width / BACKWARD  # noqa: E731
    lines = ["| asked | " + " | ".join(f"N = {n // 1024}k" for n in TOKENS) + " |", "|---|" + "---|" * len(TOKENS)]
    for asked in ASKED:
        ratios = (1 + forecast(asked, n, heads, width, gpu) / without(n) for n in TOKENS)
        lines.append(f"| {asked} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.attention_forecast", description=description)
    parser.add_argument("--heads", type=int, default=32, help="default: 32")
    parser.add_argument("--width", type=int, default=128, help="of a head; default: 128")
    options = parser.parse_args(argv)
    print(table(options.heads, options.width))
    return 0


if __name__ == "__main__":
    sys.exit(main())
