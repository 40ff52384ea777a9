"""What asking attention takes of backward on a GPU, over the number of tokens; and eager PyTorch, in time and memory.

    python -m bench.attention_time    # a table, and attention_time.json in bench/results/

Backward with over backward without, at 32 heads of 128 in bfloat16, not causal and causal: medians of device time, in
turn with a backward without. At 8192 tokens a step (forward and backward) of eager PyTorch with `p.retain_grad()` too.
Without a GPU: `python -m bench.attention_forecast`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

import retainops as ro
from bench import options as shared
from bench import record, timing

Tensor = torch.Tensor
ASKED: dict[str, Callable[[], ro.Retained]] = {
    "chefer": lambda: ro.Retained(p=ro.Relevance("chefer")),
    "legrad": lambda: ro.Retained(p=ro.Relevance("legrad")),
    "the gradient of p": lambda: ro.Retained("p"),
    "the gradient of s": lambda: ro.Retained("s"),
    "l2 of s, by head": lambda: ro.Retained(s=ro.Stats("l2", over="heads")),
}
BOUNDS = {"chefer": 1.6, "legrad": 1.25}
"""What issue 6 asks for."""
HEADS, WIDTH, EAGER_AT = 32, 128, 8192
ROUNDS = 7


def leaves(tokens: int) -> list[Tensor]:
    shape = (1, HEADS, tokens, WIDTH)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]


def backward(tokens: int, causal: bool, kept: ro.Retained | None) -> Callable[[], Any]:
    """A backward of one graph, again and again."""
    q, k, v = leaves(tokens)
    o = ro.attention(q, k, v, is_causal=causal, retain=kept)
    wanted = [q, k, v] + ([] if kept is None else [slot.tensor for slot in kept.values()])
    do = torch.randn_like(o)

    def call() -> None:
        if kept is not None:
            kept.reset()  # or it would be added to
        torch.autograd.grad(o, wanted, do, retain_graph=True, allow_unused=True)

    return call


def eager(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    p = torch.softmax(q @ k.mT * WIDTH**-0.5, -1)
    p.retain_grad()
    return [p @ v, p]


def asking(name: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    kept = ASKED[name]()
    return [ro.attention(q, k, v, retain=kept), next(iter(kept.values())).tensor]


def step(way: Callable[..., list[Tensor]], inputs: list[Tensor]) -> None:
    o, p = way(*inputs)
    torch.autograd.grad(o, [*inputs, p], torch.ones_like(o), allow_unused=True)


def seconds(*calls: Callable[[], Any]) -> list[float]:
    """Of each call, in turns: the median of device time."""
    found: list[list[float]] = [[] for _ in calls]
    watches = []
    for call in calls:
        call()  # compiles
        watches.append(
            timing.DeviceStopwatch(torch.cuda, timing.HostStopwatch(torch.cuda.synchronize).seconds(_once(call), 1))
        )
    for _ in range(ROUNDS):
        for times, call, watch in zip(found, calls, watches, strict=True):
            times.append(watch.seconds(_once(call), 3))
    return [statistics.median(times) for times in found]


def _once(call: Callable[[], Any]) -> timing.Batch:
    return timing.rotation([call])


def peak(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ratios(tokens: list[int]) -> list[dict[str, Any]]:
    rows = []
    for n in tokens:
        for causal in (False, True):
            for name, ask in ASKED.items():
                without, asked = seconds(backward(n, causal, None), backward(n, causal, ask()))
                row = {"tokens": n, "causal": causal, "asked": name, "without": without, "with": asked}
                rows.append(row)
                bound = BOUNDS.get(name)
                verdict = "" if bound is None else f", at most {bound}: {'yes' if asked <= bound * without else 'NO'}"
                print(f"{n} tokens{', causal' * causal}, {name}: {asked / without:.2f}{verdict}", flush=True)
                torch.cuda.empty_cache()
    return rows


def against_eager(tokens: int) -> list[dict[str, Any]]:
    inputs, rows = leaves(tokens), []
    ways = {"eager": eager} | {
        name: functools.partial(asking, name) for name in ("chefer", "legrad", "the gradient of p")
    }
    for name, way in ways.items():
        call = functools.partial(step, way, inputs)
        rows.append({"tokens": tokens, "way": name, "seconds": seconds(call)[0], "bytes": peak(call)})
        first, row = rows[0], rows[-1]
        times, less = first["seconds"] / row["seconds"], first["bytes"] / row["bytes"]
        print(f"{tokens} tokens, {name}: {row['seconds'] * 1e3:.1f} ms, {row['bytes'] / 2**20:.0f} MiB", end="; ")
        print(f"{times:.1f} times as fast as eager, {less:.1f} times less memory", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention_time", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    shared.add_results(parser)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attention_time: there is no GPU; a forecast: python -m bench.attention_forecast", file=sys.stderr)
        return 2
    folder = shared.results_folder(options.results, shared.as_it_comes(parser, options))
    torch.manual_seed(0)
    found = {"metadata": record.metadata(""), "eager": against_eager(EAGER_AT), "ratios": ratios(options.tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention_time.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
