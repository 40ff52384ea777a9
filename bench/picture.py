"""The picture of a run: how near each variant comes to a device copy, and what retaining a gradient costs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures import Figures, duration
from bench.record import Row, Run
from bench.variants import AUTOTUNED

SIZE = "64 MiB"  # the size shown, where it was measured; else the largest
PANELS = ("forward", "backward", "backward, a gradient retained\n(1.20x: over backward without)")
MOST = 1.08  # longer bars end here; their figure stands beside them
COLOURS = {"retainops": "#1b6ca8", "torch.compile": "#e0952f", AUTOTUNED: "#f0c27d", "eager": "#9aa5b1"}
REFERENCE_COLOUR = "#8fbbdc"  # retainops where the kernels could not run
PEER_COLOUR = "#4f9d69"


def draw(run: Run, path: Path) -> None:
    """Save the picture as PNG."""
    figure(run).savefig(path, dpi=110)


def figure(run: Run) -> Figure:
    """Bars, one a variant: the fraction of a device copy of the same bytes. A line of panels for each op and dtype."""
    figures = Figures(run.rows)
    shown = [r for r in run.rows if r.kind == "bandwidth" and not r.label]
    against = {r.op for r in shown if r.variant == "eager"}  # one op of each kind; the tables have the others
    lines = list(dict.fromkeys((r.op, r.dtype) for r in shown if r.op in against or not against))
    fig = Figure(figsize=(14, 1.3 + 1.45 * max(len(lines), 1)), layout="constrained")
    axes = fig.subplots(max(len(lines), 1), len(PANELS), squeeze=False, sharex=True)
    for (op, dtype), row_of_axes in zip(lines, axes, strict=False):
        rows = _shown([r for r in run.rows if (r.op, r.dtype, r.label) == (op, dtype, "")])
        for n, ax in enumerate(row_of_axes):
            _bars(ax, [r for r in rows if _panel(r) == n], figures)
        row_of_axes[0].set_ylabel(f"{op}\n{dtype}", fontweight="bold", fontsize=10)
    for ax, title in zip(axes[0], PANELS, strict=True):
        ax.set_title(title, fontsize=11)
    for ax in axes[-1]:
        ax.set_xlabel("of a device copy's speed, same bytes", fontsize=9, loc="left")
    size = next((r.size for r in _shown(run.rows)), "no")
    no_kernels = any(r.path == "reference" for r in run.rows)
    path = " (no GPU, so retainops takes its reference path here, not its kernels)" if no_kernels else ""
    fig.suptitle(
        f"{run.metadata['device']}: {size} tensors, {run.metadata['statistic']} round{path}",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    return fig


def _shown(rows: list[Row]) -> list[Row]:
    """The rows of the size shown."""
    sized = [r for r in rows if r.kind == "bandwidth"]
    at_size = [r for r in sized if r.size == SIZE]
    largest = max((r.elements for r in sized), default=0)
    return at_size or [r for r in sized if r.elements == largest]


def _panel(row: Row) -> int:
    return 0 if row.direction == "forward" else 1 if row.point is None else 2


def _bars(ax: Axes, rows: list[Row], figures: Figures) -> None:
    order = list(dict.fromkeys(r.variant for r in rows))
    measured = [(r, f) for r in rows if r.variant != "copy" and (f := figures.of_copy(r))]
    measured.sort(key=lambda pair: order.index(pair[0].variant))
    colours = [_colour(r) for r, _ in measured]
    ax.barh(range(len(measured)), [min(f, MOST) for _, f in measured], color=colours, height=0.74)
    several = len({r.point for r in rows}) > 1
    ax.set_yticks(range(len(measured)), [_label(r, several) for r, _ in measured], fontsize=9)
    ax.set_ylim(max(len(measured), 1) - 0.45, -0.55)
    ax.axvline(1, color="#444444", linewidth=1, linestyle="--")
    ax.set_xlim(0, 2.08)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "copy"], fontsize=8)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    for n, (row, fraction) in enumerate(measured):
        ratio = figures.kept_ratio(row)
        texts = (f"{fraction:.0%}", duration(row.seconds), f"{ratio[0]:.2f}x" if ratio else "")
        for x, text in zip((1.36, 1.78, 2.06), texts, strict=True):  # in columns, right of the line of the copy
            ax.text(x, n, text, va="center", ha="right", fontsize=8.5, in_layout=False)


def _colour(row: Row) -> str:
    return REFERENCE_COLOUR if row.path == "reference" else COLOURS.get(row.variant, PEER_COLOUR)


def _label(row: Row, several_points: bool) -> str:
    if row.point is None:
        return row.variant
    forms = {"eager": {"": "retain_grad()", "Stats": "retain_grad(), norms"}, "retainops": {"Stats": "Stats(l2, amax)"}}
    parts = [row.variant, forms.get(row.variant, {}).get(row.form, row.form), row.point if several_points else ""]
    return " ".join(part for part in parts if part)
