"""A training step of a LLaMA of a billion parameters: eager, fused, watched, by Liger-Kernel, compiled.

    python -m bench.model_step                            # on a GPU: a table, and model_step.json in bench/results/
    python -m bench.model_step --seconds 300              # start no new way after 5 minutes
    python -m bench.model_step --no-compile --only fuse   # eager, and the ways whose name has the word
    python -m bench.model_step --layers 2 --hidden 64 --vocabulary 128 --tokens 16 --batch 2    # tiny: on a CPU, too

A step is forward, loss and backward; the optimizer is left out, since it does the same in each way. The model has the
configuration of Llama-3.2-1B, random weights, and is in bfloat16 (float32 on a CPU). All ways share its weights, and
take turns. Those with "blocks" never hold all logits: compare them with each other, and the rest with each other.
Memory is the peak beyond weights and gradients, which are there from a step before, as when they accumulate.

A way that fails, or is not installed, is shown with the reason, and the others go on. The file is written after each:
with any option to a new folder, if --results names none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import retainops as ro
from bench import model_ways, record
from bench import options as shared
from bench.model_ways import EAGER, WAYS
from bench.turns import Result, Steps, Turns, reason

MOST_ON_A_CPU = 1e12
"""Operations of a step: a minute of a slow CPU."""


def show(console: Console, found: dict[str, Result], title: str) -> None:
    """The figures, and below them what failed or computed something else."""
    shown = Table(title=title, caption="* the host may have been what took the time, and not the device")
    for column in ("", "ms", "of eager", "peak, GiB", "loss"):
        shown.add_column(column, justify="right" if column else "left")
    notes = []
    for name, row in found.items():
        peak = row.get("peak_bytes")
        limited = "*" * row.get("host_limited", False)
        shown.add_row(
            name,
            f"{row['seconds'] * 1e3:.1f}{limited}" if "seconds" in row else "",
            f"{row['of_eager']:.3f}" if "of_eager" in row else "",
            "" if peak is None else f"{peak / 2**30:.2f}",
            f"{row['loss']:.4f}" if "loss" in row else "",
        )
        notes += [f"{name}: {text}" for text in ([row["error"]] if "error" in row else []) + row.get("differs", [])]
    console.print(shown)
    for text in notes:
        console.print(text, markup=False, highlight=False)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.model_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("layers", 16, "of the model"),
        ("hidden", 2048, "width of the model: heads of 64, a quarter as many of keys and values, an MLP of 4 times it"),
        ("vocabulary", 128256, "tokens that there are"),
        ("batch", 4, "sequences of a step"),
        ("tokens", 2048, "of a sequence"),
        ("rounds", 7, "timed steps of each way, of which the median counts"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    dtype = "bfloat16" if on_gpu else "float32"
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=dtype, help=f"default here: {dtype}")
    parser.add_argument("--only", metavar="WORD", help=f"eager, and ways with this in their name: {' | '.join(WAYS)}")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the ways by torch.compile"
    )
    parser.add_argument("--seconds", type=float, default=480, help="after which no new way starts (default: 480)")
    shared.add_results(parser)
    options = parser.parse_args(argv)
    options.whole = shared.as_it_comes(parser, options)
    if options.hidden <= 0 or (options.hidden % 256 and (options.hidden % 8 or options.hidden > 256)):
        parser.error(f"--hidden {options.hidden}: heads need a multiple of 256, or one of 8 below it")
    return options


def operations(o: argparse.Namespace) -> float:
    """Of a step, but for attention's: 6 a weight and token."""
    return 6.0 * o.batch * o.tokens * (o.layers * o.hidden**2 * 14.5 + o.hidden * o.vocabulary)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, keep."""
    begun = time.monotonic()
    options = options_of(argv)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and operations(options) > MOST_ON_A_CPU:
        tiny = "--layers 2 --hidden 64 --vocabulary 128 --tokens 16 --batch 2"
        print(f"model_step: there is no GPU, and a step of this size takes a CPU minutes; try {tiny}", file=sys.stderr)
        return 2
    try:
        from transformers import LlamaForCausalLM  # noqa: F401 - whether it can be
    except Exception as error:  # not there, or at odds with another package
        print(f"model_step: its model is of transformers, which cannot be imported: {reason(error)}", file=sys.stderr)
        return 2
    sizes = {name: getattr(options, name) for name in ("layers", "hidden", "vocabulary", "batch", "tokens", "dtype")}
    folder = shared.results_folder(options.results, options.whole)
    folder.mkdir(parents=True, exist_ok=True)
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    model = model_ways.llama(sizes, device)
    tokens = torch.randint(sizes["vocabulary"], (sizes["batch"], sizes["tokens"]), device=device)
    parameters = list(model.parameters())
    numbers = sum(p.numel() for p in parameters)
    kept = {
        "metadata": {**record.metadata(""), "statistic": "median", "rounds": options.rounds},
        "versions": {name: version(name) for name in ("transformers", "liger-kernel")},
        "sizes": {**sizes, "parameters": numbers, "weight_bytes": numbers * parameters[0].element_size()},
        "step": "forward, loss, backward; no optimizer",
        "fuse": what_fuse_does(model),
        "read": {"points": list(model_ways.READ), "stats": model_ways.STATS},
    }
    print("\n".join(kept["fuse"]), flush=True)

    def save(found: dict[str, Result]) -> None:
        (folder / "model_step.json").write_text(json.dumps({**kept, "ways": found}, indent=1) + "\n")

    title = f"a step of {numbers / 1e9:.3g} G parameters, {tokens.numel()} tokens, {sizes['dtype']}"
    turns = Turns(WAYS, model, Steps(model, tokens), lambda: time.monotonic() - begun > options.seconds, save)
    names = [name for name in WAYS if name == EAGER or (options.only or "") in name]
    # Compiling takes minutes, so it comes when the rest is known and shown.
    for compiles in (False, True) if options.compile else (False,):
        if group := [name for name in names if WAYS[name].compiles is compiles]:
            turns.run(group, options.rounds)
            show(Console(), turns.found, title)
    return 0 if any("times" in row for row in turns.found.values()) else 1


def what_fuse_does(model: Any) -> list[str]:
    """Line by line; another version of transformers may leave other parts unfused."""
    try:
        return str(ro.fuse(model_ways.sharing(model))).splitlines()
    except Exception as error:  # the ways that need it say so, each
        return [reason(error)]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
