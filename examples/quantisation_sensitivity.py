"""Which channels can be quantised? Squared gradients per channel tell, beside quantising them.

    python examples/quantisation_sensitivity.py            # about a minute on a CPU; draws quantisation_sensitivity.png
    python examples/quantisation_sensitivity.py --bits 4

To round a value by d changes what a model says by a Kullback-Leibler divergence of F d^2 / 2, to second order. F, the
Fisher information, is the mean square of the gradient of the log likelihood, of labels drawn from the model itself
(Martens 2020, arXiv 1412.1193). An interior's gradient of a sum of losses is that of each sample, so
Stats("l2", over="channels") is all that it takes: one number a channel, added up in the backward kernel over as many
batches as there are, and no gradient is stored.

The values are interiors of fused gated units, act = silu(gate), of a model that says the next byte from the eight
before. The text is that of Python's own documentation topics, which every Python ships.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

import retainops as ro

BYTES, CONTEXT, WIDTH, HIDDEN = 256, 8, 128, 128
BATCH, SAMPLES, FEW, UNSEEN = 512, 4096, 1024, 16384
Change = Callable[[int, torch.Tensor], torch.Tensor]
"""Of a block's number and the values in it."""


class Block(torch.nn.Module):
    """A gated unit behind a norm, added to what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = ro.nn.RMSNorm(WIDTH), ro.nn.GatedMLP(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Model(torch.nn.Module):
    """The logits of the next byte, (n, 256), from the CONTEXT bytes before."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(BYTES, WIDTH // CONTEXT)
        self.blocks = torch.nn.Sequential(*(Block() for _ in range(blocks)))
        self.norm, self.logits = ro.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, BYTES)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.logits(self.norm(self.blocks(self.embedding(context).flatten(1))))


class Quantiser:
    """Rounds each channel of each block to 2^bits steps between its least and largest value.

    Args:
        values: of each block, (samples, channels), to find the range on.
        bits: of a value.

    Attributes:
        error: the mean square of what rounding changes, (blocks, channels).
    """

    def __init__(self, values: torch.Tensor, bits: int) -> None:
        self.low, high = values.amin(1), values.amax(1)
        self.step = (high - self.low).clamp_min(1e-12) / (2**bits - 1)
        self.most = 2**bits - 1
        self.error = torch.stack([(self(n, x) - x).square().mean(0) for n, x in enumerate(values)])

    def __call__(self, block: int, x: torch.Tensor) -> torch.Tensor:
        low, step = self.low[block], self.step[block]
        return low + step * ((x - low) / step).round().clamp(0, self.most)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 500,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the model, of 128 channels each.")] = 3,
    bits: Annotated[int, typer.Option(min=1, max=8, help="Of a quantised value.")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, samples and random orders.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.", metavar="FILE")] = Path(
        "quantisation_sensitivity.png"
    ),
) -> None:
    """Train a byte model, score the channels of its gated units by squared gradients, and quantise them to check.

    The picture shows what each channel's quantisation changes, predicted and measured, and the loss when more and more
    channels are quantised: those of low score first, those of high score first, and in other orders.

    Example: python examples/quantisation_sensitivity.py --bits 4 --blocks 2
    """
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{out}: expected a name that ends in .png, .pdf or .svg", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    console = Console()
    torch.manual_seed(seed)
    text = torch.tensor(list("".join(topics.values()).encode()))
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = Model(blocks)
    train(model, seen, steps)
    context, following = samples(unseen, UNSEEN)
    base = loss_of(model, context, following)
    console.print(f"trained: loss {base:.3f} nats a byte on text that was not seen")

    known = samples(seen, SAMPLES)[0]
    quantise = Quantiser(values(model, known), bits)
    squares = fisher(model, known)
    predicted = 0.5 * squares * quantise.error
    measured = divergences(model, known[:FEW], quantise)
    scores = {
        "squared gradient x squared error": predicted,
        "squared gradient": squares,
        "squared error": quantise.error,
    }
    console.print(table(scores, measured))

    orders = {
        "most sensitive first": predicted.flatten().argsort(descending=True),
        "in random order": torch.randperm(predicted.numel()),
        "smallest error first": quantise.error.flatten().argsort(),
        "least sensitive first": predicted.flatten().argsort(),
    }
    shares = torch.linspace(0, 1, 11)
    curves = {}
    for name, order in orders.items():
        chosen = [order[: round(share * len(order))] for share in shares.tolist()]
        losses = [loss_of(model, context, following, only(quantise, few, predicted.shape)) for few in chosen]
        curves[name] = torch.tensor(losses) - base
        console.print(f"{bits} bits, half of the channels, {name}: loss + {curves[name][5]:.4f} nats a byte")
    draw(predicted, measured, shares, curves, bits, out)
    console.print(f"drawn: {out}")


def train(model: Model, text: torch.Tensor, steps: int) -> None:
    """Teach it the next byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in track(range(steps), "training"):
        context, following = samples(text, BATCH)
        F.cross_entropy(model(context), following).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def samples(text: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n pieces of text at random places, (n, CONTEXT), and the byte after each."""
    pieces = text[torch.randint(0, len(text) - CONTEXT, (n, 1)) + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, -1]


def fisher(model: Model, context: torch.Tensor) -> torch.Tensor:
    """The mean square of each channel's gradient, (blocks, channels): of the log likelihood of labels of the model."""
    with ro.retain(model, "blocks.*.mlp.act", ro.Stats("l2", over="channels")) as kept:
        for part in track(context.split(BATCH), "squared gradients"):
            logits = model(part)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            F.cross_entropy(logits, labels, reduction="sum").backward()  # squares of all parts add up
    model.zero_grad()
    return torch.stack([slot.l2.square() for slot in kept.values()]) / len(context)


@contextlib.contextmanager
def changed(model: Model, change: Change) -> Iterator[None]:
    """In this `with`, act of each block's unit is what `change` makes of it.

    A value inside of a fused op cannot be changed: here the unit is computed again, step by step.
    """

    def hook(n: int) -> Callable[[ro.nn.GatedMLP, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
        return lambda mlp, args, _: mlp.down_proj(change(n, F.silu(mlp.gate_proj(args[0]))) * mlp.up_proj(args[0]))

    handles = [block.mlp.register_forward_hook(hook(n)) for n, block in enumerate(model.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def values(model: Model, context: torch.Tensor) -> torch.Tensor:
    """act of all blocks, (blocks, samples, channels)."""
    found: dict[int, torch.Tensor] = {}
    with changed(model, lambda n, x: found.setdefault(n, x)):
        model(context)
    return torch.stack([found[n] for n in sorted(found)])


def only(quantise: Quantiser, chosen: torch.Tensor, shape: torch.Size) -> Change:
    """Quantise the chosen channels, numbered through all blocks, and leave the others."""
    mask = torch.zeros(shape.numel(), dtype=torch.bool)
    mask[chosen] = True
    of_blocks = mask.view(shape)
    return lambda n, x: torch.where(of_blocks[n], quantise(n, x), x)


@torch.no_grad()
def loss_of(model: Model, context: torch.Tensor, following: torch.Tensor, change: Change = lambda _, x: x) -> float:
    """The mean loss, in nats a byte."""
    with changed(model, change):
        return F.cross_entropy(model(context), following).item()


@torch.no_grad()
def divergences(model: Model, context: torch.Tensor, quantise: Quantiser) -> torch.Tensor:
    """What each channel's quantisation alone changes, (blocks, channels): KL(model, quantised), in nats a byte."""
    expected = model(context).double().log_softmax(-1)
    shape = torch.Size((len(model.blocks), HIDDEN))
    found = torch.zeros(shape.numel())
    for channel in track(range(shape.numel()), "quantising channels one by one"):
        with changed(model, only(quantise, torch.tensor([channel]), shape)):
            logits = model(context).double().log_softmax(-1)
        found[channel] = F.kl_div(logits, expected, log_target=True, reduction="batchmean")
    return found.view(shape)


def table(scores: dict[str, torch.Tensor], measured: torch.Tensor) -> Table:
    """How well scores order the channels as measured: Spearman's correlation of ranks."""
    table = Table(title="Channels in order of a score, and of what their quantisation changes")
    table.add_column("score")
    table.add_column("rank correlation", justify="right")
    ranks = measured.flatten().argsort().argsort()
    for name, score in scores.items():
        both = torch.stack([score.flatten().argsort().argsort(), ranks]).double()
        table.add_row(name, f"{torch.corrcoef(both)[0, 1]:.2f}")
    return table


def draw(
    predicted: torch.Tensor,
    measured: torch.Tensor,
    shares: torch.Tensor,
    curves: dict[str, torch.Tensor],
    bits: int,
    out: Path,
) -> None:
    """Channels one by one, and the loss with more and more of them quantised."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for n, (x, y) in enumerate(zip(predicted, measured, strict=True)):
        color = (0.1, 0.75 - 0.6 * n / len(predicted), 0.7)
        left.loglog(
            x.tolist(), y.clamp_min(1e-12).tolist(), "o", markersize=3.5, color=color, alpha=0.6, label=f"block {n}"
        )
    left.axline((1e-5, 1e-5), (1e-4, 1e-4), color="#e0952f", linewidth=1.5, label="predicted = measured")
    left.set(title=f"each channel of act alone in {bits} bits: KL divergence, nats a byte")
    left.set(xlabel="predicted: squared gradient x squared error / 2", ylabel="measured")
    left.legend(fontsize=8)
    for (name, curve), color in zip(curves.items(), ("#c8553d", "#9aa5b1", "#e0952f", "#1b6ca8"), strict=True):
        right.plot((100 * shares).tolist(), curve.tolist(), "o-", markersize=3, color=color, label=name)
    right.set(title=f"channels of act in {bits} bits: loss on text that was not seen", xlabel="channels quantised, %")
    right.set(ylabel="loss above the unquantised model's, nats a byte")
    right.legend(fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
