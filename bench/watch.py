"""What watching costs: training steps not watched, between two that are read, and read; in turn, in one run.

python -m bench.watch            # a table, and bench/results/<device>/watch.json
python -m bench.watch --rounds 5 --tokens 256    # of other sizes: to --results, or a new folder
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import retainops as ro
from bench import options as shared
from bench import record
from retainops.slots import Slot

WIDTH, HEADS, HIDDEN, LAYERS, VOCABULARY = 512, 8, 1408, 4, 1024
POINTS = ("*.mlp.act", "*.attended", "*.after")  # three a layer
BASE, BETWEEN, OFF = "not watched", "between two that are read", "of that, the watcher"
ADDED = "of that, statistics and reading"  # eager: in compiled code they are part of fused loops
READ, READ_MORE = "read: l2, nonfinite", "read: l2, amax, nonfinite, hist"


class Block(nn.Module):
    """A layer of LLaMA's kind, of modules of retainops and PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_of_mlp = ro.nn.RMSNorm(WIDTH), ro.nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = ro.nn.GatedMLP(WIDTH, HIDDEN)
        self.attended, self.after = ro.nn.Point(), ro.nn.Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(self.attended(attended))
        return self.after(x + self.mlp(self.norm_of_mlp(x)))


class Transformer(nn.Module):
    """Embedding, layers, and the loss."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Kind:
    """A kind of step: what comes before training and after it."""

    def __init__(self, model: nn.Module, *stats: str) -> None:
        # A step of an odd number is one between two that are read.
        self.watcher = ro.watch(model, POINTS, ro.Stats(*stats or ("l2",)), every=2, start=1)
        self.reads = bool(stats)

    def before(self) -> None:
        if self.reads:
            self.watcher.number = 2
            self.watcher.begin()

    def after(self) -> None:
        self.watcher.end()
        if not self.reads:
            self.watcher.number = 1
            self.watcher.begin()


def measure(rounds: int, tokens: int, compiled: bool, layers: int = LAYERS) -> dict[str, list[float]]:
    """Seconds of each kind of step, round by round, and of what watching itself does in one.

    The kinds take turns, in another order each round, so that a busy moment falls on all of them. On a CPU the seconds
    are those that this process computed, not those that it waited while others did.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = Transformer(layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(VOCABULARY, (4, tokens // 4), device=device)
    call: Callable[..., torch.Tensor] = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    kinds: dict[str, Kind | None] = {
        BASE: None,
        BETWEEN: Kind(model),
        READ: Kind(model, "l2", "nonfinite"),
        READ_MORE: Kind(model, "l2", "amax", "nonfinite", "hist"),
    }
    own = {OFF: BETWEEN} if compiled else {OFF: BETWEEN, ADDED: READ}
    times: dict[str, list[float]] = {name: [] for name in (*kinds, *own)}
    clock = time.perf_counter if device == "cuda" else time.process_time
    order = random.Random(0)
    for n in track(range(-2, rounds), description="steps, in turn"):
        for name in order.sample(list(kinds), len(kinds)):
            kind = kinds[name]
            gc.collect()
            _wait(device)
            start = clock()
            spent = Spent(clock)
            if kind:
                spent.on(kind.before)
            with spent.on_deposits():
                call(data).backward()
            optimizer.step()
            optimizer.zero_grad()
            if kind:
                spent.on(kind.after)
            _wait(device)
            if n >= 0:  # the first two rounds compile and warm up
                times[name].append(clock() - start)
                for part, of in own.items():
                    times[part] += [spent.seconds] if name == of else []
    return times


class Spent:
    """Seconds spent on what watching adds to a step, as they are spent."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0

    def on(self, f: Callable[..., Any], *args: Any) -> Any:
        start = self.clock()
        result = f(*args)
        self.seconds += self.clock() - start
        return result

    @contextlib.contextmanager
    def on_deposits(self) -> Iterator[None]:
        """Inside, what slots do with gradients that come out of eager code counts."""
        deposit = Slot.deposit
        Slot.deposit = lambda *args: self.on(deposit, *args)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Slot.deposit = deposit  # type: ignore[method-assign]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Of each kind of step to one that is not watched: the median over the rounds of the ratio within a round."""
    pairs = {name: zip(seconds, times[BASE], strict=True) for name, seconds in times.items()}
    return {name: statistics.median(s / base for s, base in pair) for name, pair in pairs.items()}


def table(times: dict[str, list[float]], title: str) -> Table:
    """The figures, with the ratios that matter and their spread."""
    shown = Table(title=title)
    for column in ("", "ms", "of a step that is not watched", "middle half of the rounds", "fastest of each"):
        shown.add_column(column, justify="left" if not column else "right")
    half = {name: quartiles(times, name) for name in times}
    for name, s in medians(times).items():
        low, high = half[name]
        of_step, fastest = f"{ratios(times)[name]:.2%}", f"{min(times[name]) / min(times[BASE]):.2%}"
        shown.add_row(name, f"{s * 1e3:.3f}", of_step, f"{low:.2%} to {high:.2%}", fastest)
    return shown


def quartiles(times: dict[str, list[float]], name: str) -> tuple[float, float]:
    """The first and third quartile of the ratios within a round."""
    found = sorted(s / base for s, base in zip(times[name], times[BASE], strict=True))
    if len(found) < 2:
        return found[0], found[0]
    low, _, high = statistics.quantiles(found, n=4)
    return low, high


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=shared.positive, default=512, help="of a batch of 4 sequences (default: 512)")
    rounds = "timed rounds, of which the median counts (default: 11)"
    parser.add_argument("--rounds", type=shared.positive, default=11, help=rounds)
    parser.add_argument(
        "--threads",
        type=shared.positive,
        default=1,
        help="of PyTorch on a CPU (default: 1, so that none waits for another)",
    )
    shared.add_results(parser)
    options = parser.parse_args(argv)
    folder = shared.results_folder(options.results, shared.as_it_comes(parser, options))
    torch.set_num_threads(options.threads)
    kept: dict[str, object] = {
        "metadata": {**record.metadata(""), "statistic": "median", "threads": torch.get_num_threads()},
        "model": {"width": WIDTH, "hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY, "points": POINTS},
        "tokens": options.tokens,
        "rounds": options.rounds,
    }
    for how in ("eager", "compiled"):
        times = measure(options.rounds, options.tokens, how == "compiled")
        Console().print(
            table(times, f"a training step, {LAYERS} layers of width {WIDTH}, {options.tokens} tokens, {how}")
        )
        kept[how] = {
            "seconds": medians(times),
            "ratio": ratios(times),
            "middle_half": {name: quartiles(times, name) for name in times},
            "fastest": {name: min(seconds) for name, seconds in times.items()},
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "watch.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
