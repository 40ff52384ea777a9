"""Which values carry the answer? Attribution patching, act x grad, beside patching itself.

    python examples/attribution_patching.py          # seconds to a minute on a CPU; draws attribution_patching.png

Activation patching runs a model on one text with one value of it taken from a run on another text, and looks how much
the answer changes: a run for each value. Attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) does it
for all values at once, to first order: the change is (value there - value here) x gradient here. Two forward runs and
one backward are all that it takes, and gradients of values inside of fused ops.

The model is trained on the spot to complete repeated texts: "c a f b d c a" goes on with "f". What it has to learn is
known (Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895), an induction circuit: a head of an early layer tells
each place which token came before it, and a head of a later one looks for the place that came after a token like the
present one, and copies what is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

import retainops as ro

VOCABULARY, WIDTH, HEADS, LENGTH = 32, 64, 4, 24
SHORTEST, LONGEST = 6, 11  # of what is repeated, when training
BLOCK, KEY = 8, 3  # when patching: the text is 8 tokens, and again up to the one at place 3
VALUE = KEY + 1  # what comes next, then
Grid = dict[str, torch.Tensor]
"""Name of a point -> a number for each place of the text."""
EXACT, ONE, MEAN = "exact, by patching", "first order", "mean of 8 gradients"
ESTIMATES = (ONE, MEAN)


class Layer(torch.nn.Module):
    """Attention and a gated unit, each behind a norm. Points: what attention adds, the unit's interior, the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = ro.nn.RMSNorm(WIDTH), ro.nn.RMSNorm(WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = ro.nn.GatedMLP(WIDTH, 2 * WIDTH)
        self.attention, self.stream = ro.nn.Point(), ro.nn.Point()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.attention_norm(x)).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention(self.out(heads))
        return self.stream(x + self.mlp(self.mlp_norm(x)))


class Model(torch.nn.Module):
    """The next token's logits, from those before."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.token, self.place = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        self.embedded = ro.nn.Point()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.logits = ro.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embedded(self.token(text) + self.place.weight[: text.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))


class Pair(NamedTuple):
    """Texts, and what they are about: with one token replaced, the texts no longer say what comes next.

    Attributes:
        clean, other: (pairs, places); they differ in one place of the first time.
        answer: the token that comes next in the clean ones.
        instead: the one that stands in the other place.
    """

    clean: torch.Tensor
    other: torch.Tensor
    answer: torch.Tensor
    instead: torch.Tensor


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of training; the circuit is there after 200.")] = 300,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the model; an induction circuit takes two.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="How many pairs of texts effects are means over.")] = 64,
    seed: Annotated[int, typer.Option(help="Of weights and texts.")] = 0,
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.", metavar="FILE")] = Path(
        "attribution_patching.png"
    ),
) -> None:
    """Train a model to go on with repeated texts; find its circuit by gradients, and check it by patching.

    For each point and place of the text: the change of the answer's logit (minus that of another token) if the value
    there is taken from a text that differs in one token. Exactly, by a run for each; and to first order, by one
    backward for all.

    Example: python examples/attribution_patching.py --layers 3 --steps 600
    """
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{out}: expected a name that ends in .png, .pdf or .svg", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    console = Console()
    torch.manual_seed(seed)
    model = Model(layers)
    loss, right = train(model, steps)
    console.print(f"trained: loss {loss:.3f}, {100 * right:.0f}% of tokens right from their second time on")
    if right < 0.9:
        console.print("the task is not learnt yet, so there is no circuit to find: try more --steps")
    found: dict[str, dict[str, Grid]] = {}
    for what, place in (("the answer", VALUE), ("before the answer", KEY)):
        pair = texts(pairs, place)
        found[f"token {place}, {what}, replaced"] = {
            EXACT: patched(model, pair),
            ONE: attributed(model, pair),
            MEAN: attributed(model, pair, between=8),
        }
    found["values 10% smaller"] = shrunk(model, pair, 0.1)
    console.print(table(found | {"values set to 0": shrunk(model, pair, 1.0)}))
    draw(found, out)
    console.print(f"drawn: {out}")


def train(model: Model, steps: int, batch: int = 64) -> tuple[float, float]:
    """Train; the last loss, and the share of tokens that were right, where the text was repeated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in track(range(steps), "training"):
        period = int(torch.randint(SHORTEST, LONGEST + 1, ()))
        text = distinct(batch)[:, :period].repeat(1, LENGTH // period + 1)[:, :LENGTH]
        logits, following = model(text[:, :-1])[:, period:], text[:, period + 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item(), (logits.argmax(-1) == following).float().mean().item()


def distinct(texts: int) -> torch.Tensor:
    """The vocabulary in random order, once a text."""
    return torch.rand(texts, VOCABULARY).argsort(1)


def texts(pairs: int, place: int) -> Pair:
    """Pairs of a text, a block and its first tokens again, and that with another token at a place of the block."""
    tokens = distinct(pairs)
    block, instead = tokens[:, :BLOCK], tokens[:, BLOCK]
    clean = torch.cat([block, block[:, : KEY + 1]], 1)
    other = clean.clone()
    other[:, place] = instead
    return Pair(clean, other, block[:, VALUE], instead)


def metric(logits: torch.Tensor, pair: Pair) -> torch.Tensor:
    """For each pair, by how much the answer's logit is above the other token's, after the last token."""
    last = logits[:, -1]
    return (last.gather(1, pair.answer[:, None]) - last.gather(1, pair.instead[:, None]))[:, 0]


def points_of(model: Model) -> list[str]:
    """The points of the picture, from the first to the last of a forward."""
    of_layers = [f"layers.{n}.{name}" for n in range(len(model.layers)) for name in ("attention", "mlp.act", "stream")]
    return ["embedded", *of_layers]


@contextlib.contextmanager
def changed(model: Model, point: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """In this `with`, the value at a point is what `change` makes of it."""
    inside = point.endswith(".act")
    module = model.get_submodule(point.removesuffix(".act"))

    def of_point(_: torch.nn.Module, __: tuple[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
        return change(value)

    def of_unit(mlp: ro.nn.GatedMLP, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
        # A value inside of a fused op cannot be changed: here the unit is computed again, step by step.
        return mlp.down_proj(change(F.silu(mlp.gate_proj(args[0]))) * mlp.up_proj(args[0]))

    handle = module.register_forward_hook(of_unit if inside else of_point)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def values(model: Model, text: torch.Tensor) -> Grid:
    """The values at all points."""
    found: Grid = {}

    def keeping(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: found.setdefault(name, value)

    with contextlib.ExitStack() as stack:
        for name in points_of(model):
            stack.enter_context(changed(model, name, keeping(name)))
        model(text)
    return found


def attributed(model: Model, pair: Pair, between: int = 1) -> Grid:
    """What patching would change, estimated at all points and places at once.

    Args:
        model, pair: what runs on what.
        between: of how many texts between the two the gradient is a mean, by their embeddings (Hanna et al. 2024, arXiv
            2403.17806). 1: that of the clean text alone, which is attribution patching.
    """
    here, there = values(model, pair.clean), values(model, pair.other)
    embedded, step = here["embedded"], there["embedded"] - here["embedded"]
    with ro.retain(model, points_of(model)) as kept:
        for n in range(between):
            share = (n + 0.5) / between if between > 1 else 0.0
            with changed(model, "embedded", lambda value: value - value.detach() + embedded + share * step):  # noqa: B023
                metric(model(pair.clean), pair).sum().backward()  # gradients of all runs add up
    model.zero_grad()
    return {n: ((there[n] - here[n]) * kept[n].grad / between).sum(-1).mean(0) for n in points_of(model)}


@torch.no_grad()
def patched(model: Model, pair: Pair, by: Grid | None = None) -> Grid:
    """What patching changes, on average over pairs: a forward for each point and place.

    Args:
        model, pair: what runs on what.
        by: the values that are put in; None: those of the other texts.
    """
    by = values(model, pair.other) if by is None else by
    base = metric(model(pair.clean), pair)
    effects = {}
    for name in track(by, "patching"):
        effects[name] = torch.zeros(pair.clean.shape[1])
        for place in range(pair.clean.shape[1]):
            with changed(model, name, lambda value: at(place, value, by[name])):  # noqa: B023 - called within
                effects[name][place] = (metric(model(pair.clean), pair) - base).mean()
    return effects


def at(place: int, value: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The values, (texts, places, width), with those of one place replaced."""
    value = value.clone()
    value[:, place] = by[:, place]
    return value


def shrunk(model: Model, pair: Pair, by: float) -> dict[str, Grid]:
    """What making values smaller changes: exactly, and to first order.

    The latter is -by x value x gradient: a statistic, one number a place, and no gradient or value is stored for it.
    """
    names = [name for name in points_of(model) if name.endswith(("attention", "act"))]
    with ro.retain(model, names, ro.Stats("act_grad", over="rows")) as kept:
        metric(model(pair.clean), pair).sum().backward()
    model.zero_grad()
    here = values(model, pair.clean)
    exact = patched(model, pair, {name: (1 - by) * here[name] for name in names})
    return {EXACT: exact, ONE: {name: -by * kept[name].act_grad.mean(0) for name in names}}


def flat(grid: Grid) -> torch.Tensor:
    """All numbers of a grid."""
    return torch.cat(list(grid.values()))


def table(found: dict[str, dict[str, Grid]]) -> Table:
    """How well estimates agree with patching, and where the largest effect of attention is."""
    table = Table(title="Change of the answer's logit minus another's")
    for column in ("values", "attention's largest effect", *ESTIMATES, *(f"r, {name}" for name in ESTIMATES)):
        table.add_column(column)
    for what, grids in found.items():
        exact = grids[EXACT]
        name = max((n for n in exact if n.endswith("attention")), key=lambda n: exact[n].abs().max().item())
        place = int(exact[name].abs().argmax())
        there = [f"{grids[e][name][place]:.2f}" if e in grids else "" for e in ESTIMATES]
        r = [f"{agreement(exact, grids[e]):.2f}" if e in grids else "" for e in ESTIMATES]
        table.add_row(what, f"{exact[name][place]:.2f} ({name}, token {label(place)})", *there, *r)
    return table


def agreement(exact: Grid, estimated: Grid) -> float:
    """The correlation of estimates with what they estimate."""
    return torch.corrcoef(torch.stack([flat(exact), flat(estimated)]))[0, 1].item()


def label(place: int) -> str:
    """A place of the text, by the token of the block that stands there."""
    return f"{place % BLOCK}" + ("'" if place >= BLOCK else "")


def draw(found: dict[str, dict[str, Grid]], out: Path) -> None:
    """A row for each kind of change: its effects, point x place, exact and estimated, and one against the other."""
    figure = Figure(figsize=(15, 3.3 * len(found)), layout="constrained")
    for row, (what, grids) in zip(figure.subplots(len(found), 4, squeeze=False), found.items(), strict=True):
        exact = grids[EXACT]
        most = flat(exact).abs().max().item()
        for axes, name in zip(row, (EXACT, *ESTIMATES), strict=False):
            if name not in grids:
                axes.set_axis_off()
                continue
            shown = torch.stack(list(grids[name].values()))
            image = axes.imshow(shown.tolist(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
            axes.set_yticks(range(len(exact)), list(exact) if name == EXACT else [], fontsize=8)
            axes.set_xticks(range(shown.shape[1]), [label(n) for n in range(shown.shape[1])], fontsize=8)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("token of the block (': the second time)", fontsize=8)
        row[0].set_title(f"{what}\n{EXACT}", fontsize=9)
        figure.colorbar(image, ax=row[:3].tolist(), label="change of logits' difference", pad=0.01)
        scatter(row[3], grids)
    figure.savefig(out, dpi=100)


def scatter(axes: Axes, grids: dict[str, Grid]) -> None:
    """Estimates against exact effects: right ones are on the line."""
    axes.axline((0, 0), slope=1, color="#9aa5b1", linewidth=1)
    for name, mark, color in zip(ESTIMATES, ("x", "o"), ("#c8553d", "#1b6ca8"), strict=True):
        if name in grids:
            r = agreement(grids[EXACT], grids[name])
            x, y = flat(grids[EXACT]).tolist(), flat(grids[name]).tolist()
            axes.plot(x, y, mark, color=color, markersize=5, fillstyle="none", label=f"{name}, r = {r:.2f}")
    axes.set_xlabel("exact change", fontsize=9)
    axes.set_ylabel("estimated change", fontsize=9)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    typer.run(main)
