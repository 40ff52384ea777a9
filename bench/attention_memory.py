"""Peak memory of attention whose probabilities are asked for, over the number of tokens, beside eager PyTorch.

    python -m bench.attention_memory    # a table, and attention_memory.json and .png in bench/results/
    python -m bench.attention_memory --tokens 512 1024    # of other sizes: to --results, or a new folder

Forward and backward, each in a process of its own. On a GPU the peak is what PyTorch's allocator handed out, on a CPU
the resident memory of the process (getrusage). In both it is what the step adds to inputs, their gradients, and a step
on a few tokens, which loads and compiles whatever there is. A way is measured up to the tokens at which what it holds
would pass --most.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import retainops as ro
from bench import options as shared
from bench import record
from bench.linear_cross_entropy_memory import peak

Tensor = torch.Tensor
EAGER, FULL = "eager, p.retain_grad()", "the gradient of p"
NOTHING, CHEFER, LEGRAD = "nothing asked", 'Relevance("chefer")', 'Relevance("legrad")'
COLOURS = {EAGER: "#9aa5b1", FULL: "#e0952f", CHEFER: "#1b6ca8", LEGRAD: "#4f9d69", NOTHING: "#222222"}
MATRICES = {EAGER: 6, FULL: 1}
"""How many matrices of (heads, tokens, tokens) each holds at its peak."""


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    p.retain_grad()
    return p @ v


def asking(*names: str, **wants: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: ro.attention(q, k, v, retain=ro.Retained(*names, **wants))


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    EAGER: eager,
    FULL: asking("p"),
    CHEFER: asking(p=ro.Relevance("chefer")),
    LEGRAD: asking(p=ro.Relevance("legrad")),
    NOTHING: F.scaled_dot_product_attention,
}


def measure(way: str, tokens: int, sizes: dict[str, Any], results: Any) -> None:
    """In a process of its own: the bytes that a step adds, and its time."""
    warnings.simplefilter("ignore")  # what the compiler says of the machine
    device, dtype = sizes["device"], getattr(torch, sizes["dtype"])
    torch.manual_seed(0)
    shape = (1, sizes["heads"], tokens, sizes["width"])
    leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"]
    do = torch.randn(shape, device=device, dtype=dtype)
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    few = [leaf.detach()[..., :16, :].requires_grad_() for leaf in leaves]
    WAYS[way](*few).backward(do[..., :16, :])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, start = peak(device), time.perf_counter()
    WAYS[way](*leaves).backward(do)
    if device == "cuda":
        torch.cuda.synchronize()
    results.put({"bytes": peak(device) - before, "seconds": time.perf_counter() - start})


def fits(way: str, tokens: int, sizes: dict[str, Any]) -> bool:
    """Whether the matrices that a way holds do."""
    matrix = sizes["heads"] * tokens**2 * getattr(torch, sizes["dtype"]).itemsize
    return MATRICES.get(way, 0) * matrix <= sizes["most"] * 2**30


def table(found: dict[str, dict[int, dict[str, float]]], sizes: dict[str, Any]) -> Table:
    """MiB of each way, and the share of eager's."""
    shown = Table(title="MiB: {heads} heads of {width}, {dtype}, {device}".format(**sizes))
    shown.add_column("tokens", justify="right")
    for way in found:
        shown.add_column(way, justify="right")
    for tokens in sizes["tokens"]:
        cells = []
        for rows in found.values():
            row, of = rows.get(tokens), found[EAGER].get(tokens)
            share = f" (1/{of['bytes'] / max(row['bytes'], 1):.0f})" if row and of and rows is not found[EAGER] else ""
            cells.append(f"{row['bytes'] / 2**20:.0f}{share}" if row else "")
        shown.add_row(str(tokens), *cells)
    return shown


def draw(found: dict[str, dict[int, dict[str, float]]], sizes: dict[str, Any], path: Path) -> None:
    """A line for each way, both axes logarithmic: the slope is the power of the tokens."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    lines = {way: ([*rows], [max(row["bytes"] / 2**20, 1.0) for row in rows.values()]) for way, rows in found.items()}
    taken = 0.0
    for way, (tokens, mib) in sorted(lines.items(), key=lambda line: line[1][1][-1]):
        axes.loglog(tokens, mib, marker="o", markersize=4, color=COLOURS[way], base=2)
        taken = max(mib[-1], 1.45 * taken)  # a label stands above the one before
        axes.annotate(f"  {way}", (tokens[-1], taken), va="center", color=COLOURS[way], fontsize=9)
    axes.set_xticks(sizes["tokens"], [str(n) for n in sizes["tokens"]])
    ticks = [2**i for i in range(0, 18, 2)]
    axes.set_yticks(ticks, [f"{t} MiB" if t < 1024 else f"{t // 1024} GiB" for t in ticks])
    every = [mib for _, line in lines.values() for mib in line]
    axes.set_ylim(min(every) / 2, max(every) * 2)
    axes.set_xlim(right=max(sizes["tokens"]) * 2.6)
    axes.set_xlabel("tokens")
    axes.set_title(
        "peak memory of attention, forward and backward\n{heads} heads of {width}, {dtype}, {device}".format(**sizes),
        loc="left",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="default: 512 ... 4096")
    parser.add_argument("--heads", type=int, default=32, help="default: 32")
    parser.add_argument("--width", type=int, default=128 if on_gpu else 64, help="default: 128, on a CPU 64")
    parser.add_argument(
        "--dtype", default="bfloat16" if on_gpu else "float32", help="default: bfloat16, on a CPU float32"
    )
    parser.add_argument("--most", type=float, default=64 if on_gpu else 13, help="GiB; default: 64, on a CPU 13")
    shared.add_results(parser)
    options = parser.parse_args(argv)
    folder = shared.results_folder(options.results, shared.as_it_comes(parser, options))
    sizes = {**vars(options), "device": "cuda" if on_gpu else "cpu"}
    del sizes["results"]
    context, found = multiprocessing.get_context("spawn"), {way: {} for way in WAYS}
    cases = [(way, tokens) for way in WAYS for tokens in sizes["tokens"] if fits(way, tokens, sizes)]
    for way, tokens in track(cases, "measuring"):
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(way, tokens, sizes, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(
                f"{way}, {tokens} tokens: the process ended with {process.exitcode}; is there memory enough?"
            )
        found[way][tokens] = results.get()
    Console().print(table(found, sizes))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"metadata": {**record.metadata(""), "statistic": "peak"}, "sizes": sizes, "ways": found}
    (folder / "attention_memory.json").write_text(json.dumps(kept, indent=1) + "\n")
    draw(found, sizes, folder / "attention_memory.png")


if __name__ == "__main__":
    main()
