"""Peak memory of linear_cross_entropy beside the eager pair: forward and backward, each in a process of its own.

    python -m bench.linear_cross_entropy_memory    # a table, and linear_cross_entropy_memory.json in bench/results/
    python -m bench.linear_cross_entropy_memory --tokens 2048      # of other sizes: to --results, or a new folder

8192 tokens and 131072 classes: eager needs 13 GB. On a GPU the peak is what PyTorch's allocator handed out, on a CPU
the resident memory of the process (getrusage). In both it is what the step adds to inputs, parameters, their gradients,
and a step on two tokens, which loads and compiles whatever there is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import retainops as ro
from bench import options as shared
from bench import record

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
EAGER, TORCHS = "eager: cross_entropy of linear", "torch's own linear_cross_entropy, in blocks"


def torchs(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # its own blocks; new in torch 2.13
    return F.linear_cross_entropy(x, weight, target, options=options)


def with_statistics(x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    kept = ro.Retained(logits=ro.Stats("l2", "amax", over="rows"))
    return ro.linear_cross_entropy(x, weight, target, retain=kept)


def ways() -> dict[str, Step]:
    """Each makes one loss."""
    found = {
        EAGER: lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
        TORCHS: torchs,
        "ro.linear_cross_entropy": ro.linear_cross_entropy,
        "with l2 and amax of each row's dlogits": with_statistics,
        "inside torch.compile": torch.compile(ro.linear_cross_entropy, fullgraph=True),
    }
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        del found[TORCHS]
    return found


def peak(device: str) -> int:
    """Bytes, so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, sizes: dict[str, Any], results: Any) -> None:
    """In a process of its own: the bytes that a step adds, and its loss."""
    warnings.simplefilter("ignore")  # what the compiler says of the machine
    device, like = sizes["device"], {"dtype": getattr(torch, sizes["dtype"]), "device": sizes["device"]}
    torch.manual_seed(0)
    x = torch.randn(sizes["tokens"], sizes["width"], **like, requires_grad=True)
    weight = torch.randn(sizes["classes"], sizes["width"], **like).mul_(sizes["width"] ** -0.5).requires_grad_()
    target = torch.randint(0, sizes["classes"], (sizes["tokens"],), device=device)
    x.grad, weight.grad = torch.zeros_like(x), torch.zeros_like(weight)
    step = ways()[way]
    step(x[:2], weight, target[:2]).backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    loss = step(x, weight, target)
    loss.backward()
    results.put({"bytes": peak(device) - before, "loss": loss.item()})


def table(found: dict[str, dict[str, Any]], sizes: dict[str, Any]) -> Table:
    """The figures, and the share of eager's memory."""
    shown = Table(title="{tokens} tokens, {classes} classes, width {width}, {dtype}, {device}".format(**sizes))
    for column in ("", "MiB", "of eager", "loss"):
        shown.add_column(column, justify="left" if not column else "right")
    for way, row in found.items():
        share = f"{row['bytes'] / found[EAGER]['bytes']:.3f}" if EAGER in found else ""
        shown.add_row(way, f"{row['bytes'] / 2**20:.0f}", share, f"{row['loss']:.5f}")
    return shown


def main() -> None:
    """Measure, print, keep."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="default: 8192")
    parser.add_argument("--classes", type=int, default=131072, help="default: 131072")
    parser.add_argument("--width", type=int, default=4096 if on_gpu else 64, help="default: 4096, on a CPU 64")
    parser.add_argument(
        "--dtype", default="bfloat16" if on_gpu else "float32", help="default: bfloat16, on a CPU float32"
    )
    shared.add_results(parser)
    options = parser.parse_args()
    folder = shared.results_folder(options.results, shared.as_it_comes(parser, options))
    sizes = {**vars(options), "device": "cuda" if on_gpu else "cpu"}
    del sizes["results"]
    context, found = multiprocessing.get_context("spawn"), {}
    for way in ways():
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(way, sizes, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{way}: the process ended with {process.exitcode}; is there memory enough?")
        found[way] = results.get()
    Console().print(table(found, sizes))
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"metadata": {**record.metadata(""), "statistic": "peak"}, "sizes": sizes, "ways": found}
    (folder / "linear_cross_entropy_memory.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
