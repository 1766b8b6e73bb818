"""The charts of a report, drawn by matplotlib without its global state."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from .contact_sheet import FAINT, INK, PAPER, WRONG
from .gate import LayerRow
from .metrics import Bin, Counts, expected_calibration_error
from .sections import Row, is_figure, shortened, words

BLUE = "#2f6db3"
LINES = (BLUE, "#d9822b", "#2e9e4f", "#7a5cc0", "#c2478b", "#6b6b67")
SHADES = LinearSegmentedColormap.from_list("shades", [PAPER, "#7fb0e0", BLUE, "#12335c"])
NUMBERED = 20  # classes up to which each cell of the confusion matrix has its number
TICKS = 40  # class names at a side of the confusion matrix
POINTS = 400  # of a curve; more are averaged in groups
CURVES = ("top1", "top5", "image_to_text_r1", "text_to_image_r1")  # more would be a tangle


def confusion(classes: Sequence[str], counts: Counts) -> Figure:
    """The confusion matrix, coloured by the share of the true class."""
    size, every = len(classes), math.ceil(len(classes) / TICKS)
    side = max(3.0, 0.45 * size if size <= NUMBERED else min(0.22 * size, 9.0))
    figure = _figure(side + 2.6, side + 1.6)
    axes = figure.add_subplot(facecolor=PAPER)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap=SHADES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    names = [shortened(classes[i], 28) for i in range(0, size, every)]
    font = 9 if size <= NUMBERED else 7
    axes.set_xticks(range(0, size, every), names, rotation=90, size=font, parse_math=False)
    axes.set_yticks(range(0, size, every), names, size=font, parse_math=False)
    axes.set_xlabel("taken for" + (f" (one class of {every} is named)" if every > 1 else ""))
    axes.set_ylabel("true class")
    axes.tick_params(length=2, color=FAINT)
    axes.spines[:].set_color(FAINT)
    if size <= NUMBERED:
        for (row, column), number in np.ndenumerate(counts):
            color = PAPER if shares[row, column] > 0.35 else INK if number else FAINT
            axes.text(column, row, f"{number}", ha="center", va="center", size=8, color=color)
    bar = figure.colorbar(image, shrink=0.6, format=PercentFormatter(1))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    return figure


def reliability(bins: Sequence[Bin]) -> Figure:
    """Accuracy by score over the diagonal of perfect calibration; below, how many scores."""
    figure = _figure(5.2, 5.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    used = [b for b in bins if b.number]
    middles, width = [(b.low + b.high) / 2 for b in used], 0.92 / len(bins)
    right, sure = [b.accuracy for b in used], [b.confidence for b in used]
    upper.bar(middles, right, width, color=BLUE, alpha=0.75, label="share right")
    upper.vlines(middles, right, sure, color=WRONG, linewidth=1.5)
    upper.plot(middles, sure, "_", color=WRONG, markersize=14, label="mean score")
    upper.plot((0, 1), (0, 1), "--", color=FAINT, linewidth=1, label="perfect calibration")
    upper.legend(loc="upper left", fontsize=8, frameon=False)
    upper.set_title(f"ECE {expected_calibration_error(bins):.1%}", size=11)
    upper.set_ylabel("share right")
    lower.bar(middles, [b.number for b in used], width, color=FAINT)
    lower.set_xlabel("score of the best label")
    lower.set_ylabel("pictures")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    for axes in (upper, lower):
        _tidy(axes)
    return figure


def curves(history: Sequence[Row], steps: Sequence[Row]) -> Figure:
    """A panel for each thing that was logged, by step and by epoch."""
    panels: list[tuple[str, str, Sequence[Row], list[str]]] = []
    for axis, rows in (("step", steps), ("epoch", history)):
        names = list(dict.fromkeys(name for row in rows for name in row if name != axis))
        figures = [name for name in names if is_figure(name)]
        if shown := [name for name in figures if name.removeprefix("guard_") in CURVES]:
            panels.append(("figures", axis, rows, shown))
        others = [name for name in names if name not in figures and name != "epoch"]
        panels += [(words(name), axis, rows, [name]) for name in others]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(4.4 * columns, 3.1 * lines)
    for number, (title, axis, rows, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        _draw_lines(axes, axis, rows, names)
        axes.set_title(title, size=10)
    return figure


def wise_ft(points: Sequence[Row]) -> Figure:
    """The figures over alpha, from the start's weights (0) to the end's (1)."""
    figure = _figure(6.4, 3.8)
    names = dict.fromkeys(name for point in points for name in point if name != "alpha")
    shown = [name for name in names if name.removeprefix("guard_") in CURVES]
    _draw_lines(figure.add_subplot(), "alpha", sorted(points, key=lambda p: p["alpha"]), shown)
    return figure


def drift(layers: Sequence[LayerRow]) -> Figure:
    """How far int8 in each layer alone moves the embeddings, in the order in which they run."""
    figure = _figure(7.5, 1.4 + 0.19 * len(layers))
    axes = figure.add_subplot(facecolor=PAPER)
    colors = [WRONG if row.in_float else BLUE for row in layers]
    axes.barh(range(len(layers)), [1 - row.cosine for row in layers], color=colors, height=0.72)
    names = [shortened(row.title, 44) for row in layers]
    axes.set_yticks(range(len(layers)), names, size=7, parse_math=False)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel("1 - cosine with fp32, at the worst percentile of the frames; red: in float")
    _tidy(axes)
    return figure


def _draw_lines(axes: Axes, axis: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    for color, name in zip(LINES * len(names), names, strict=False):
        points = np.array([(row[axis], row[name]) for row in rows if name in row], dtype=float)
        points = _thinned(points)
        style = "--" if name.startswith("guard_") else "-"
        style += "o" if len(points) <= 40 else ""
        axes.plot(*points.T, style, color=color, linewidth=1.3, markersize=3, label=words(name))
    if is_figure(names[0]):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlim(0, 1.02 * max(row[axis] for row in rows) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis != "alpha"))
    axes.set_xlabel(axis)
    _tidy(axes)


def _thinned(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most about POINTS points [N, 2]: the means of neighbours."""
    group = math.ceil(len(points) / POINTS)
    starts = np.arange(0, len(points), group)
    sizes = np.diff([*starts, len(points)])
    return np.asarray(np.add.reduceat(points, starts) / sizes[:, None])


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, with room around what is drawn."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure((width, height), 120, facecolor=PAPER, layout=layout)


def _tidy(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    axes.grid(color="#e6e6e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
