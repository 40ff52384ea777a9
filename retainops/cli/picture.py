"""The demo's photograph, and the picture it draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from retainops.cli.siren import Fit

INK, FAINT = "#22303c", "#8795a1"
HEAT_MAP_WIDTH = 1.4  # of its height


def load_photograph(path: Path | None, size: int) -> torch.Tensor:
    """A photograph, cropped to a square and resized: shape (size, size, 3), values in [0, 1].

    Args:
        path: any file that pillow reads; None: Grace Hopper, from matplotlib's sample data.
        size: of the square, in pixels.

    Raises:
        OSError: no such file, or not an image that pillow reads.
    """
    import matplotlib.cbook
    from PIL import Image

    file = path or matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    try:
        with Image.open(file) as image:
            return _square(image, size)
    except (SyntaxError, ValueError, Image.DecompressionBombError) as e:  # how pillow refuses a broken file
        raise OSError(f"cannot be read: {e}") from e


def _square(image: Any, size: int) -> torch.Tensor:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):  # 16 bits and more: pillow would clip them at 255
        deep = np.asarray(upright, dtype=np.float64)
        upright = Image.fromarray((255 * deep / max(deep.max(), 1)).clip(0, 255).astype(np.uint8))
    # Faces are in the upper part of a portrait.
    square = ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.LANCZOS, centering=(0.5, 0.2))
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)


def writable_formats() -> set[str]:
    """The endings of file names that matplotlib can write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return set(FigureCanvasAgg.filetypes)


def draw(path: Path, photograph: torch.Tensor, reconstruction: torch.Tensor, psnr: float, fit: Fit) -> None:
    """Write the picture: the photograph, the reconstruction, and the retained gradients' norms by layer and step.

    Args:
        path: the file to write.
        photograph, reconstruction: shape (size, size, 3), values in [0, 1].
        psnr: of the reconstruction, in dB.
        fit: the norms.
    """
    import matplotlib.pyplot as plt

    size, steps = photograph.shape[0], fit.norms.shape[1]
    style = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with plt.rc_context({**style, "axes.titlesize": 11.5, "axes.titlepad": 9, "axes.edgecolor": FAINT}):
        figure = plt.figure(figsize=(13.5, 4.3), layout="constrained", facecolor="white")
        axes = figure.subplots(1, 3, width_ratios=(1, 1, HEAT_MAP_WIDTH))
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.02)
        _show(axes[0], photograph, f"Photograph, {size} x {size} pixels")
        _show(axes[1], reconstruction, f"SIREN after {steps} steps, {psnr:.1f} dB")
        _heat_map(figure, axes[2], fit)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _show(axes: Any, image: torch.Tensor, title: str) -> None:
    axes.imshow(image.numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def _heat_map(figure: Any, axes: Any, fit: Fit) -> None:
    from matplotlib.colors import LogNorm

    layers, steps = fit.norms.shape
    positive = fit.norms[fit.norms > 0]
    low, high = (positive.min().item(), positive.max().item()) if positive.numel() else (0.1, 1.0)
    image = axes.imshow(
        fit.norms.clamp_min(low).numpy(),
        norm=LogNorm(low / 1.5, high * 1.1),  # off the ends of the colour map, black and near white
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, steps + 0.5, layers + 0.5, 0.5),
    )
    axes.set_box_aspect(1 / HEAT_MAP_WIDTH)  # as high as the photographs
    axes.set_title("Retained gradient of c = w₀ (Wx + b), inside each sin(c)")
    axes.set_xlabel("step")
    axes.set_ylabel("hidden layer")
    axes.set_yticks(range(1, layers + 1))
    axes.tick_params(length=3)
    axes.hlines([n + 0.5 for n in range(1, layers)], 0.5, steps + 0.5, color="white", linewidth=1)
    bar = figure.colorbar(image, cax=axes.inset_axes((1.025, 0, 0.035, 1)))
    bar.set_label("‖∂loss/∂c‖₂ over all pixels")
    bar.outline.set_visible(False)
