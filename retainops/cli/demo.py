"""`retainops demo`: fit a photograph with fused layers, and keep the gradient inside every one of them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import retainops as ro
from retainops.cli import picture, siren
from retainops.cli.messages import fail


def demo(
    image: Annotated[
        Path | None, typer.Option(help="A photograph to fit, instead of matplotlib's Grace Hopper.", metavar="FILE")
    ] = None,
    steps: Annotated[int, typer.Option(help="How many steps of Adam.", min=1)] = 250,
    size: Annotated[int, typer.Option(help="Pixels along each side.", min=2, max=2048)] = 128,
    out: Annotated[Path, typer.Option(help="Where to write the picture.", metavar="FILE")] = Path("demo.png"),
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the network under torch.compile(fullgraph=True), retention included.")
    ] = False,
    device: Annotated[str, typer.Option(help='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...')] = "auto",
) -> None:
    """Fit a photograph with fused layers, and keep the gradient inside every one of them.

    The network is a SIREN: each hidden layer is one fused mul_sin, whose interior c = w0 * (W x + b) is never in
    memory. One Retained("c") a layer keeps dloss/dc all the same. At the end those gradients are compared with
    retain_grad() in plain PyTorch, and a picture shows the photograph, the fit, and the gradients' norms by step.

    Example: retainops demo --image cat.jpg --size 256 --steps 800 --out cat.png
    """
    where = _device(device)
    _check_out(out)
    try:
        photograph = picture.load_photograph(image, size)
    except OSError as e:
        fail(f"--image {image or '(matplotlib sample)'}: {e.strerror or 'not an image that pillow can read'}")
    console = Console()
    started = time.perf_counter()

    torch.manual_seed(0)
    model = siren.Siren().to(where)
    x, target = siren.coordinates(size, where), (photograph * 2 - 1).reshape(-1, 3).to(where)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Fitting {size} x {size} pixels on {_called(where)}: {len(model.hidden)} hidden layers, {parameters:,} "
        "parameters, the gradient of each layer's c retained in every step."
    )
    if compiled:
        console.print("mul_sin takes the reference path inside torch.compile; the first step compiles (seconds).")
    else:
        console.print(ro.explain(ro.mul_sin, target, siren.W0))
    run = torch.compile(model, fullgraph=True) if compiled else model
    fit = _fit(console, model, run, x, target, steps)
    with torch.no_grad():
        y = model(x).clamp(-1, 1)
    psnr = siren.psnr((y - target).square().mean().item())
    picture.draw(out, photograph, ((y.cpu() + 1) / 2).view_as(photograph), psnr, fit)
    checks = siren.compare_with_eager(model, run, x, target)
    console.print(_table(checks))
    console.print(f"{psnr:.1f} dB after {steps} steps, {time.perf_counter() - started:.0f} s; the picture is {out}")
    if any(check.verdict == "differs" for check in checks):
        fail("a retained gradient differs from eager PyTorch's; please report it", status=1)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        fail(f'--device {name}: expected "auto", "cpu", "cuda" or "cuda:" and a number')
    count = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:  # a number that no index can be
        fail(f"--device {name}: PyTorch finds {count} GPUs on this machine")
    if device.type == "cuda" and (device.index or 0) >= count:
        fail(f"--device {name}: PyTorch finds {count} GPUs on this machine")
    return device


def _called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _check_out(out: Path) -> None:
    """Refuse a picture that cannot be written before the work, not after it."""
    if out.suffix.lstrip(".").lower() not in picture.writable_formats():
        fail(f"--out {out}: cannot write this kind of file; use .png, .pdf or .svg")
    if not out.parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        fail(f"--out {out}: this file cannot be written; choose another")


def _fit(
    console: Console, model: siren.Siren, run: siren.Run, x: torch.Tensor, target: torch.Tensor, steps: int
) -> siren.Fit:
    columns = (
        TextColumn("fitting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[quality]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fit", total=steps, quality="")

        def show(step: int, loss: torch.Tensor) -> None:
            if step % 10 == 9 or step == steps - 1:  # reading a loss makes a GPU wait
                quality = f"loss {loss:.2e}, {siren.psnr(loss.item()):.1f} dB"
                progress.update(task, completed=step + 1, quality=quality)

        return siren.fit(model, run, x, target, steps, show)


def _table(checks: list[siren.LayerCheck]) -> Table:
    table = Table(title="Retained gradients beside eager PyTorch's retain_grad(), at the final weights")
    table.add_column("hidden layer", justify="right")
    table.add_column("max |difference|", justify="right")
    table.add_column("relative", justify="right")
    table.add_column("eager's own error", justify="right")
    table.add_column("verdict")
    for layer, check in enumerate(checks, 1):
        style = "red" if check.verdict == "differs" else "green"
        numbers = (f"{n:.1e}" for n in (check.difference, check.relative, check.eager_error))
        table.add_row(str(layer), *numbers, f"[{style}]{check.verdict}[/]")
    return table
