"""Why does a vision transformer say what it says? Its decision, traced back to the photograph.

    python examples/explain_vit.py                      # about a minute on a CPU; draws explain_vit.png
    python examples/explain_vit.py --image cat.jpg      # a photograph of yours behind the digits
    python examples/explain_vit.py --model google/vit-base-patch16-224 --image cat.jpg
    python examples/explain_vit.py --model vit_base_patch16_224 --image cat.jpg          # of timm

Two ways to read relevance off attention's probabilities P and the gradient dP of the decision with respect to them:

    chefer   each layer: A = mean over heads of relu(P * dP). Rolled over the layers, R = R + A @ R from R = 1, the row
             of the class token says how much each patch told it. Chefer et al. 2021, arXiv 2012.09838, 2103.15679.
    legrad   each layer: mean over heads and queries of relu(dP), a number a patch; summed over the layers. Bousselham
             et al. 2024, arXiv 2404.03214 (there a layer's gradient is of what that layer alone would decide).

Eager PyTorch keeps P and dP of every head for that, of every layer: 2 * heads * N^2 numbers each. Here attention stays
fused; its backward leaves N^2 numbers a layer for chefer, and N for legrad.

Without --model it trains a small one: to name a handwritten digit (scikit-learn's, 8 x 8) that was put somewhere into a
photograph (scikit-learn's, two). So there is a right answer: relevance belongs where the digit is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.nn import functional as F

import retainops as ro

Tensor = torch.Tensor
SIDE, PATCH, DIGIT, WIDTH, HEADS, LAYERS = 48, 8, 24, 64, 4, 4
GRID = SIDE // PATCH


class Block(nn.Module):
    """Attention and a gated unit, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = ro.nn.LayerNorm(WIDTH), ro.nn.LayerNorm(WIDTH)
        self.attention = ro.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = ro.nn.GatedMLP(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.mlp_norm(x))


class ViT(nn.Module):
    """The digit in a photograph, read off a class token in front of the patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.place = nn.Parameter(0.02 * torch.randn(1, 1 + GRID * GRID, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = ro.nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images - 0.5).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


@dataclass
class Subject:
    """A model to be explained.

    Attributes:
        model: images in, logits out.
        side, grid: pixels, and patches, to a side.
        prepare: (B, 3, side, side) of 0 to 1 -> what the model takes.
        name_of: a class in words.
    """

    model: nn.Module
    side: int
    grid: int
    prepare: Callable[[Tensor], Tensor] = lambda images: images
    name_of: Callable[[int], str] = str


def explain(subject: Subject, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of some images, and maps of the relevance of their largest one: (B, grid, grid) by name."""
    with ro.retain(subject.model, "*.p", ro.Relevance("chefer", "legrad")) as kept:
        logits = subject.model(subject.prepare(images))
        logits = getattr(logits, "logits", logits)
        logits.max(-1).values.sum().backward()  # each image is its own: no gradient crosses from one to another
    subject.model.zero_grad()
    layers = list(kept.values())
    first = layers[0].chefer
    rolled = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    for layer in layers:
        rolled = rolled + layer.chefer @ rolled
    others = rolled.shape[-1] - subject.grid**2  # the class token, and whatever else is no patch, come first
    found = {
        "chefer": rolled[:, 0] if others else rolled.mean(-2),
        "legrad": torch.stack([layer.legrad for layer in layers]).sum(0),
    }
    return logits.detach(), {name: t[:, others:].unflatten(-1, (subject.grid,) * 2) for name, t in found.items()}


class Scenes:
    """Handwritten digits in photographs: those to train on, and others."""

    def __init__(self, photographs: list[Tensor], seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        digits = load_digits()
        order = torch.randperm(len(digits.images), generator=self.random)
        ink = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
        self.ink, self.digits = (
            F.pad(F.interpolate(ink, size=(DIGIT - 4, DIGIT - 4), mode="bilinear"), (2, 2, 2, 2)),
            torch.tensor(digits.target)[order],
        )
        self.photographs = photographs
        self.backgrounds = torch.cat([resized(self.crop(i), SIDE) for i in range(400)])

    def crop(self, which: int) -> Tensor:
        """A square of a photograph, anywhere in it."""
        photograph = self.photographs[which % len(self.photographs)]
        shortest = min(photograph.shape[-2:])
        size = self._drawn(max(shortest // 3, 1), shortest)
        top, left = (self._drawn(0, total - size) for total in photograph.shape[-2:])
        return photograph[None, :, top : top + size, left : left + size]

    def batch(self, count: int, training: bool, light: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
        """Images, digits, and (count, GRID, GRID) of bool: the patches where the digit is."""
        which = torch.randint(len(self.backgrounds), (count,), generator=self.random)
        return self.placed(light * self.backgrounds[which], training)

    def placed(self, backgrounds: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """A digit somewhere on each background, of any size."""
        count, enlarged = len(backgrounds), backgrounds.shape[-1] // SIDE
        split = len(self.ink) * 4 // 5
        which = torch.randint(*((0, split) if training else (split, len(self.ink))), (count,), generator=self.random)
        corners = torch.randint(0, GRID - DIGIT // PATCH + 1, (count, 2), generator=self.random)
        ink, where = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, GRID, GRID, dtype=torch.bool)
        for i, (top, left) in enumerate(corners.tolist()):
            where[i, top : top + DIGIT // PATCH, left : left + DIGIT // PATCH] = True
            ink[i, :, where[i].repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)] = self.ink[which[i]].flatten(1)
        if enlarged > 1:
            ink = F.interpolate(ink, scale_factor=enlarged, mode="bilinear")
        return backgrounds * (1 - ink) + ink, self.digits[which], where

    def _drawn(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.random))


def train(scenes: Scenes, steps: int) -> ViT:
    """A small ViT; photographs behind the digits come up from black, so that it first learns what a digit is."""
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in track(range(steps), "training"):
        images, digits, _ = scenes.batch(64, True, 0.7 * min(1.0, step / (steps / 2)))
        F.cross_entropy(model(images), digits).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    return model.eval()


def judged(subject: Subject, scenes: Scenes, console: Console) -> None:
    """On digits that it was not trained on: how often it is right, and how often relevance is."""
    images, digits, where = scenes.batch(256, False)
    logits, maps = explain(subject, images)
    table = Table(
        "of 256 digits in photographs, not trained on", "share", "by chance", title="Is it where the digit is?"
    )
    table.add_row("the digit is named", f"{(logits.argmax(-1) == digits).double().mean():.0%}", "10%")
    chance = f"{where.double().mean():.0%}"
    for name, relevance in maps.items():
        largest = relevance.flatten(1).argmax(1, keepdim=True)
        hit = where.flatten(1).gather(1, largest).double().mean()
        table.add_row(f"{name}: the most relevant patch is one of the digit's", f"{hit:.0%}", chance)
    console.print(table)


def from_transformers(name: str) -> Subject:
    """A model of Hugging Face's, by its name there or a folder's."""
    from transformers import AutoModelForImageClassification, ImageProcessingMixin
    from transformers.utils import logging

    import retainops.integrations.transformers  # noqa: F401 -- registers the attention

    logging.disable_progress_bar()
    model = AutoModelForImageClassification.from_pretrained(name, attn_implementation="retainops").eval()
    config = model.config
    if not isinstance(getattr(config, "image_size", None), int) or not isinstance(
        getattr(config, "patch_size", None), int
    ):
        raise ValueError(f"{type(model).__name__} has no square image_size and patch_size; use a ViT or a DeiT")
    try:
        processing, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        processing = {}
    mean, std = processing.get("image_mean", [0.5] * 3), processing.get("image_std", [0.5] * 3)
    labels = config.id2label
    return Subject(
        model,
        config.image_size,
        config.image_size // config.patch_size,
        standardised(mean, std),
        lambda c: str(labels.get(c, c)).split(",")[0],
    )


def from_timm(name: str) -> Subject:
    """A ViT of timm's."""
    import timm

    model = timm.create_model(name, pretrained=True).eval()
    if not all(hasattr(block, "attn") and hasattr(block.attn, "qkv") for block in getattr(model, "blocks", [None])):
        raise ValueError(f"{type(model).__name__} is no plain ViT; use one, such as vit_base_patch16_224")
    table = ro.fuse(model, rules=["sdpa"])
    if not table.replaced or table.left:
        raise ValueError(f"its attention cannot be asked; {table}")
    config, patches = timm.data.resolve_model_data_config(model), model.patch_embed
    return Subject(model, patches.img_size[0], patches.grid_size[0], standardised(config["mean"], config["std"]))


def pretrained(name: str) -> Subject:
    """A model with its weights, from the user's cache or the network."""
    if not Path(name).exists() and "/" not in name:
        if importlib.util.find_spec("timm") is None:
            raise ValueError("without a / it is a name of timm's; pip install timm, or give owner/name or a folder")
        return from_timm(name)
    return from_transformers(name)


def standardised(mean: list[float], std: list[float]) -> Callable[[Tensor], Tensor]:
    """What models are trained on: a mean of 0 and a variance of 1, about."""
    m, s = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return lambda images: (images - m) / s


def resized(images: Tensor, side: int) -> Tensor:
    """To so many pixels a side."""
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True).clamp(0, 1)


def read(path: Path) -> Tensor:
    """A photograph, (3, height, width) of 0 to 1."""
    try:
        with Image.open(path) as image:
            rgb = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise typer.BadParameter(f"{path} cannot be read as an image: {error}") from None
    values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return values.view(rgb.height, rgb.width, 3).movedim(-1, 0) / 255


@dataclass
class Row:
    """A line of the picture: an image, what is said of it, its maps, and where the digit is, if there is one."""

    title: str
    image: Tensor
    maps: dict[str, Tensor]
    where: Tensor | None = None


def draw(rows: list[Row], out: Path) -> None:
    """A line for each image: itself, and each map as light upon it."""
    names = list(rows[0].maps)
    figure = Figure(figsize=(3.1 * (1 + len(names)) + 0.9, 3.3 * len(rows)), layout="constrained")
    titles = {"chefer": "chefer: relu(P · dP), rolled over layers", "legrad": "legrad: relu(dP), summed over layers"}
    for line, row in zip(figure.subplots(len(rows), 1 + len(names), squeeze=False), rows, strict=True):
        pixels = row.image.movedim(0, -1).numpy()
        line[0].imshow(pixels)
        line[0].set_title(row.title, fontsize=10)
        for axes, name in zip(line[1:], names, strict=True):
            heat = F.interpolate(row.maps[name][None, None], size=pixels.shape[:2], mode="bicubic")[0, 0]
            heat = ((heat - heat.min()) / (heat.max() - heat.min()).clamp_min(1e-12)).clamp(0, 1).numpy()
            axes.imshow(0.7 * pixels.mean(-1), cmap="gray", vmin=0, vmax=1)
            shown = axes.imshow(heat, cmap="inferno", alpha=0.9 * heat**0.6, vmin=0, vmax=1)
            axes.set_title(titles[name], fontsize=10)
            if row.where is not None:
                (top, left), side = row.where.nonzero()[0].tolist(), pixels.shape[0] / GRID
                size = DIGIT / PATCH * side
                frame = Rectangle((left * side, top * side), size, size, fill=False, edgecolor="white", linestyle=":")
                axes.add_patch(frame)
        for axes in line:
            axes.set_axis_off()
    if rows[0].where is not None:
        figure.supxlabel("in the dotted frame is the digit", fontsize=9)
    bar = figure.colorbar(shown, ax=figure.axes, location="right", shrink=0.6, aspect=30)
    bar.set_label("relevance, of the largest in the map", fontsize=9)
    bar.solids.set_alpha(1)
    figure.savefig(out, dpi=80)


def main(
    model: Annotated[
        str, typer.Option(help="A pretrained ViT: owner/name or a folder of transformers', a name of timm's.")
    ] = "",
    image: Annotated[
        Path | None, typer.Option(help="The photograph. Default: scikit-learn's, china and flower.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture: .png, .pdf or .svg.")] = Path("explain_vit.png"),
    steps: Annotated[int, typer.Option(help="Of training, without --model.", min=1)] = 300,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Explain a vision transformer's decisions by heat maps over photographs: chefer and legrad.

    Relevance is read off the gradient of attention's probabilities. Fused attention never holds these in memory; here
    its backward leaves the maps alone. Without --model a small ViT first learns to name a digit in a photograph.
    """
    console = Console()
    torch.manual_seed(seed)
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{out}: expected a name that ends in .png, .pdf or .svg", param_hint="--out")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"{out}: there is no folder {out.parent}", param_hint="--out")
    photographs = (
        [read(image)] if image else [torch.tensor(p).movedim(-1, 0) / 255 for p in load_sample_images().images]
    )
    rows = []
    if model:
        try:
            subject = pretrained(model)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise typer.BadParameter(f"{model}: {error}", param_hint="--model") from None
        for photograph in photographs:
            square = min(photograph.shape[-2:])
            top, left = ((total - square) // 2 for total in photograph.shape[-2:])
            view = photograph[None, :, top : top + square, left : left + square]
            logits, maps = explain(subject, resized(view, subject.side))
            rows.append(Row(said(subject, logits[0]), view[0], {name: t[0] for name, t in maps.items()}))
    else:
        scenes = Scenes(photographs, seed)
        subject = Subject(train(scenes, steps), SIDE, GRID)
        judged(subject, scenes, console)
        for which in range(3):
            view, digit, where = scenes.placed(0.7 * resized(scenes.crop(which), 6 * SIDE), False)
            logits, maps = explain(subject, resized(view, SIDE))
            title = f"a {digit.item()} in a photograph: {said(subject, logits[0])}"
            rows.append(Row(title, view[0], {name: t[0] for name, t in maps.items()}, where[0]))
    draw(rows, out)
    console.print(f"drawn: {out}")


def said(subject: Subject, logits: Tensor) -> str:
    """The decision, in words."""
    share, choice = logits.softmax(-1).max(-1)
    return f'"{subject.name_of(int(choice))}", {share:.0%}'


if __name__ == "__main__":
    typer.run(main)
