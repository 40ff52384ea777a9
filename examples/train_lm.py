"""Train a small LLaMA on bytes, fused by one call and watched, and draw where in it gradients are large.

    python examples/train_lm.py                               # about a minute on a CPU core; draws train_lm.png
    torchrun --nproc-per-node 2 examples/train_lm.py          # the same on two ranks
    python examples/train_lm.py --compare --compile           # fused against unfused, step by step in turn

The model is LlamaForCausalLM of transformers, its code unchanged, with random weights. `ro.fuse` exchanges what it
computes for fused ops, and `ro.watch` asks for the norm of interior gradients every few steps: of values that the fused
ops never store. With --compile all of it is compiled, and asked for all the same.

The text is that of Python's own documentation topics, which every Python ships, as bytes.
"""

from __future__ import annotations

import copy
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed as dist

import retainops as ro
from retainops.readings import Readings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the weights are random

BYTES, LENGTH, RATE = 256, 96, 2e-3
# One panel of the picture each: a point, as `ro.points(model)` names it within a layer.
WATCHED = {
    "input_layernorm.xhat": "normalised input",
    "self_attn.q_rot": "query, turned by rope",
    "mlp.act": "silu(gate) of the MLP",
}
Step = Callable[[torch.Tensor], torch.Tensor]


def main(
    steps: Annotated[int, typer.Option(min=2, help="How many steps of AdamW.")] = 300,
    layers: Annotated[int, typer.Option(min=1, help="How many layers the model has.")] = 6,
    width: Annotated[int, typer.Option(min=8, help="The width of its residual stream; a multiple of 8.")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="Pieces of text a step, of 96 bytes each, of all ranks.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="Ask for gradients' norms in every n-th step.")] = 5,
    fused: Annotated[
        bool, typer.Option("--fused/--unfused", help="Fuse the model with ro.fuse. Unfused it has no points to watch.")
    ] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Run the model under torch.compile.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train fused and unfused models in turn, on the same text, and draw both.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the text.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The picture: .png, .pdf or .svg.", metavar="FILE")] = None,
) -> None:
    """Train a small byte-level LLaMA on Python's documentation, fused and watched; draw its gradient flow.

    The picture shows the norm of interior gradients, layer x step. On several ranks (torchrun) the model is wrapped
    by DistributedDataParallel, and the norms are those of all ranks. With --compare it shows two loss curves instead.

    Example: python examples/train_lm.py --steps 100 --layers 8 --compile
    """
    out = out or Path("train_lm_fused_unfused.png" if compare else "train_lm.png")
    check(out, width, batch, compare)
    torch.manual_seed(seed)
    model = llama(layers, width)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        model = model.cuda()
    if compare:
        return compare_both(model, steps, batch, compiled, seed, out)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        return train(model, steps, batch, every, fused, compiled, seed, out)
    dist.init_process_group()
    try:
        train(model, steps, batch, every, fused, compiled, seed, out)
    finally:
        dist.destroy_process_group()


def train(
    model: torch.nn.Module, steps: int, batch: int, every: int, fused: bool, compiled: bool, seed: int, out: Path
) -> None:
    """Train one model, on this rank's share of each batch, and draw what was watched."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = next(model.parameters()).device
    console = Console(quiet=rank > 0)
    if fused:
        console.print(ro.fuse(model), soft_wrap=True)
    run = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    step = step_of(run, steps, compiled)
    found: dict[int, dict[str, float]] = {}

    def keep(number: int, readings: Readings) -> None:
        # Each rank's loss is a mean over its own share of the batch; that of the whole batch is the mean of those.
        found[number] = {name: float(of["l2"]) / ranks for name, of in readings.items()}

    losses: list[torch.Tensor] = []
    patterns = [f"model.layers.*.{point}" for point in WATCHED]
    watcher = ro.watch(run, patterns, every=every, to=keep, group="world" if ranks > 1 else None) if fused else None
    with progress(console) as bar:
        task = bar.add_task("training", total=steps, loss="")
        for number, text in enumerate(batches(batch, steps, seed)):
            losses.append(step(text[rank::ranks].to(device)))
            if watcher:
                watcher.step()
            if number % 10 == 0 or number == steps - 1:  # reading a loss makes a GPU wait
                bar.update(task, completed=number + 1, loss=f"{losses[-1].item():.2f} nats a byte")
    if watcher:
        watcher.close()
    curve = torch.stack(losses) / ranks
    if ranks > 1:
        dist.all_reduce(curve)  # each rank has seen its own texts alone
    if rank:
        return
    console.print(f"loss {curve[0]:.2f} -> {curve[-10:].mean():.2f} nats a byte")
    if found:
        last = found[max(found)]
        largest = max(last, key=last.__getitem__)
        console.print(f"largest gradient in step {max(found)}: {largest}, norm {last[largest]:.2e}")
    else:
        console.print("nothing was watched: the unfused model has no points")
    draw(curve.tolist(), found, out)
    console.print(f"drawn: {out}")


def compare_both(model: torch.nn.Module, steps: int, batch: int, compiled: bool, seed: int, out: Path) -> None:
    """Train fused, unfused, and unfused with other rounding, in turn, and say how far apart they are and how fast."""
    console, device = Console(), next(model.parameters()).device
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        for p in nudged.parameters():  # one unit in the last place, up or down: what another rounding may do
            p.copy_(torch.nextafter(p, torch.where(torch.rand_like(p) < 0.5, -math.inf, math.inf)))
    models = {"unfused": model, "fused": copy.deepcopy(model), "unfused, weights off by 1 ulp": nudged}
    ro.fuse(models["fused"])
    run = {name: step_of(model, steps, compiled) for name, model in models.items()}
    losses: dict[str, list[float]] = {name: [] for name in run}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in run}
    with progress(console) as bar:
        task = bar.add_task("training all three in turn", total=steps, loss="")
        for number, text in enumerate(batches(batch, steps, seed)):
            for name in random.sample(list(run), len(run)):  # in any order: what ran before has left its data in caches
                start, worked = time.perf_counter(), time.process_time()
                losses[name].append(run[name](text.to(device)).item())
                seconds[name].append((time.perf_counter() - start, time.process_time() - worked))
            bar.update(task, completed=number + 1, loss=f"{losses['fused'][-1]:.2f} nats a byte")
    base = torch.tensor(losses["unfused"])
    console.print(f"over {steps} steps, {'compiled' if compiled else 'eager'}:")
    for name in run:
        curve, times = torch.tensor(losses[name]), seconds[name][min(10, steps // 2) :]  # the first ones compile
        wall, work = (1000 * statistics.median(of) for of in zip(*times, strict=True))
        apart = (curve - base).abs()
        console.print(
            f"  {name:30} loss {curve[0]:.4f} -> {curve[-20:].mean():.4f} (last 20); from unfused: "
            f"mean {apart.mean():.1e}, largest {apart.max():.1e}; step {wall:.0f} ms, of CPU {work:.0f} (medians)",
            soft_wrap=True,
        )
    draw_both(losses, out)
    console.print(f"drawn: {out}")


def llama(layers: int, width: int) -> torch.nn.Module:
    """LlamaForCausalLM over bytes, two queries to a key, weights random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches(size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Pieces of the text, (size, LENGTH), at random places; the same on every rank."""
    text = torch.tensor(list("".join(topics.values()).encode()))
    places = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (size, 1), generator=places)
        yield text[starts + torch.arange(LENGTH)]


def step_of(model: torch.nn.Module, steps: int, compiled: bool) -> Step:
    """A step of training: the loss of (batch, LENGTH) bytes, before it."""
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    warm = max(1, steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * n / steps))
    )

    def step(text: torch.Tensor) -> torch.Tensor:
        loss = run(input_ids=text, labels=text).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def progress(console: Console) -> Progress:
    """A bar with the loss beside it."""
    text = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*text, TimeRemainingColumn(), console=console)


def draw(losses: list[float], found: dict[int, dict[str, float]], out: Path) -> None:
    """The loss, and below it for each watched point a map of the gradient's norm, layer x step."""
    from matplotlib.figure import Figure

    names = list(next(iter(found.values()), {}))
    rows = {point: [name for name in names if name.endswith(point)] for point in WATCHED if names}
    figure = Figure(figsize=(9, 2.2 + 1.9 * len(rows)), layout="constrained")
    top, *maps = figure.subplots(1 + len(rows), 1, sharex=True, squeeze=False)[:, 0]
    top.plot(losses, color="#1b6ca8", linewidth=1)
    top.set(ylabel="loss, nats a byte")
    top.set_title("A byte-level LLaMA in training: its loss, and how much gradient reaches each layer", fontsize=11)
    at = list(found)
    width = at[1] - at[0] if len(at) > 1 else 1
    for (point, of_layers), axes in zip(rows.items(), maps, strict=True):
        norms = torch.tensor([[found[step][name] for step in at] for name in of_layers])
        extent = (at[0] - width / 2, at[-1] + width / 2, -0.5, len(of_layers) - 0.5)
        shown = norms.clamp_min(torch.finfo(norms.dtype).tiny).log10()
        image = axes.imshow(
            shown.tolist(), aspect="auto", origin="lower", extent=extent, cmap="magma", interpolation="nearest"
        )
        axes.set(ylabel="layer", yticks=range(0, len(of_layers), max(1, len(of_layers) // 6)))
        axes.set_title(f"{point}: {WATCHED[point]}", fontsize=9, loc="left")
        figure.colorbar(image, ax=axes, label="log10 of the norm\nof dloss/dvalue", pad=0.01)
    figure.axes[len(rows)].set_xlabel("step")
    figure.savefig(out, dpi=120)


def draw_both(losses: dict[str, list[float]], out: Path) -> None:
    """The curves, and below them how far each is from the unfused one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    base = torch.tensor(losses["unfused"])
    styles = {"unfused": ("#9aa5b1", "-", 3.5), "fused": ("#1b6ca8", "-", 1.0)}
    for name, curve in losses.items():
        color, line, width = styles.get(name, ("#e0952f", "-", 1.0))
        if name in styles:
            top.plot(curve, line, color=color, linewidth=width, label=name)
        if name != "unfused":
            apart = (torch.tensor(curve) - base).abs().clamp_min(1e-8)
            below.semilogy(apart.tolist(), line, color=color, linewidth=1, label=f"{name} - unfused")
    top.set(ylabel="loss, nats a byte", title="The same model fused and unfused: same weights, same text")
    below.set(ylabel="|difference| of losses,\nnats a byte", xlabel="step")
    top.legend()
    below.legend(loc="lower right")
    figure.savefig(out, dpi=120)


def check(out: Path, width: int, batch: int, compare: bool) -> None:
    """Say what is wrong before the work, not after it."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    try:
        import matplotlib.figure  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise typer.BadParameter(f"{e.name} is missing: pip install 'retainops[demo,transformers]'") from None
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{out}: expected a name that ends in .png, .pdf or .svg", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    if width % 8:  # four heads, and rope turns pairs
        raise typer.BadParameter(f"{width} is not a multiple of 8", param_hint="--width")
    if batch % ranks:
        raise typer.BadParameter(f"{batch} is not a multiple of the number of ranks, {ranks}", param_hint="--batch")
    if compare and ranks > 1:
        raise typer.BadParameter("is for one process; start it without torchrun", param_hint="--compare")


if __name__ == "__main__":
    typer.run(main)
