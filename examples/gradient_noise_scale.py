"""How noisy is a language model's gradient, and at which layer? Measured at its norms, for next to nothing.

    python examples/gradient_noise_scale.py              # about a minute on a CPU; draws gradient_noise_scale.png
    python examples/gradient_noise_scale.py --steps 60

The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162) says how many samples a batch should have: B = tr(S)
/ |G|^2, of the covariance S of single samples' gradients and their mean G. Gray et al. 2024 (arXiv 2411.00999) read it
off normalisation layers. Here a sample is a token, and the parameter is a bias added to a norm's input: its gradient
from one token is a row of the gradient of `summed`, and that of the batch is the sum of the rows. Two statistics that
the backward kernel leaves, the norms of the rows and their sum, are all that it takes: no gradient is stored.

The text is that of Python's own documentation topics, which every Python ships, as bytes.
"""

from __future__ import annotations

import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from rich.progress import track
from torch.nn import functional as F

import retainops as ro

BYTES, WIDTH, HEADS, LENGTH, BATCH = 256, 96, 4, 96, 16


class Block(torch.nn.Module):
    """Attention and a gated unit, each behind a norm of the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = ro.nn.AddRMSNorm(WIDTH), ro.nn.AddRMSNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = ro.nn.GatedMLP(WIDTH, 3 * WIDTH)

    def forward(self, h: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.attention_norm(h, residual)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        h = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x, residual = self.mlp_norm(h, residual)
        return self.mlp(x), residual


class Model(torch.nn.Module):
    """The next byte, from those before."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding, self.place = torch.nn.Embedding(BYTES, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(layers))
        self.norm, self.loss = ro.nn.AddRMSNorm(WIDTH), ro.nn.LinearCrossEntropyLoss(WIDTH, BYTES)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The mean loss of (batch, LENGTH + 1) bytes."""
        h, residual = self.embedding(text[:, :-1]), self.place.weight.expand(len(text), -1, -1)
        for block in self.blocks:
            h, residual = block(h, residual)
        return self.loss(self.norm(h, residual)[0], text[:, 1:])


def noise_scale(l2_of_rows: torch.Tensor, sum_of_rows: torch.Tensor) -> tuple[float, float]:
    """(tr(S), |G|^2), without bias, from the gradient of a mean over tokens: McCandlish et al., A.2 and A.3."""
    tokens = l2_of_rows.numel()
    small = tokens * l2_of_rows.double().square().sum().item()  # the mean of |g|^2 over tokens; a row is g / tokens
    big = sum_of_rows.double().square().sum().item()
    return (small - big) / (1 - 1 / tokens), (tokens * big - small) / (tokens - 1)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 200,
    layers: Annotated[int, typer.Option(min=1, help="How many layers the model has.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the text.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.", metavar="FILE")] = Path(
        "gradient_noise_scale.png"
    ),
) -> None:
    """Train, measure at every step, and draw the noise scale of each norm."""
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{out}: expected a name that ends in .png, .pdf or .svg", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    torch.manual_seed(seed)
    text = torch.tensor(list("".join(topics.values()).encode()))
    model = Model(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, found = [], {}
    for _ in track(range(steps), "training"):
        starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH,))
        batch = text[starts[:, None] + torch.arange(LENGTH + 1)]
        # Two requests at one point: one number a token, and one a channel.
        with (
            ro.retain(model, "*norm.summed", ro.Stats("l2", over="rows")) as rows,
            ro.retain(model, "*norm.summed", ro.Stats("sum", over="channels")) as channels,
        ):
            loss = model(batch)
            loss.backward()
        for name, slot in rows.items():
            found.setdefault(name, []).append(noise_scale(slot.l2, channels[name].sum))
        last = ro.per_sample_norms(rows["norm.summed"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loudest = bytes(batch[last.argmax()].tolist()).decode(errors="replace")
    print(f"loss {losses[0]:.2f} -> {sum(losses[-10:]) / len(losses[-10:]):.2f} nats a byte")
    print(
        f"the largest gradient of the last batch, {last.max() / last.median():.1f} times the median, is of: {loudest!r}"
    )
    draw(losses, {name: smoothed(pairs) for name, pairs in found.items()}, out)
    print(f"drawn: {out}")


def smoothed(pairs: list[tuple[float, float]], keep: float = 0.9) -> list[float]:
    """tr(S) / |G|^2 of running means: single steps' estimates are far too noisy to divide by each other."""
    noise = signal = 0.0
    scales = []
    for step, (s, g) in enumerate(pairs, 1):
        noise, signal = keep * noise + (1 - keep) * s, keep * signal + (1 - keep) * g
        scales.append(noise / signal if step > 5 and signal > 0 else math.nan)
    return scales


def draw(losses: list[float], scales: dict[str, list[float]], out: Path) -> None:
    """The loss, and beside it each norm's noise scale in tokens."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    left.plot(losses, color="#1b6ca8")
    left.set(title="loss, nats a byte", xlabel="step")
    for n, (name, values) in enumerate(scales.items()):
        right.semilogy(values, label=name.removesuffix(".summed"), color=(0.1, 0.8 - 0.75 * n / len(scales), 0.7))
    right.axhline(BATCH * LENGTH, color="#e0952f", linestyle="--", label="tokens in the batch")
    right.set(title="gradient noise scale at each norm's input, tokens", xlabel="step")
    right.legend(fontsize=7, ncols=2)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    typer.run(main)
