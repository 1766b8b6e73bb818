"""The picture of a search: what each trial reached, and which options mattered."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from calibration.contact_sheet import FAINT, INK, PAPER
from calibration.plots import BLUE

ORANGE = "#d9822b"
_LOG = ("lr", "weight_decay")
_COLUMNS = 3


def chart(result: Mapping[str, Any]) -> Figure:
    """Draws `search.json`: trials in their order with the best until then; the importances; and
    for each option the figures over its values."""
    names = list(result["values"])
    rows = -(-len(names) // _COLUMNS)
    figure = Figure((10, 3 + 2.4 * rows), 120, layout="constrained", facecolor=PAPER)
    parts = np.asarray(figure.subfigures(2, 1, height_ratios=(3, 2.4 * rows)))
    upper, lower = parts.tolist()
    order, mattered = upper.subplots(1, 2, width_ratios=(3, 2))
    _order(order, result)
    _mattered(mattered, result["importance"])
    epoch = min(len(trial["epochs"]) for trial in result["trials"])
    lower.suptitle(
        f"after epoch {epoch}, which all have reached; orange: the best in the end", size=9
    )
    grid = list(lower.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flat)
    for axes, name in zip(grid, names, strict=False):
        _over(axes, result, name, epoch)
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    return figure


def _order(axes: Axes, result: Mapping[str, Any]) -> None:
    best, line = 0.0, []
    for place, trial in enumerate(result["trials"], 1):
        reached = max(trial["epochs"], default=0.0)
        early = trial["ended_early"]
        if not early:
            best = max(best, trial["epochs"][-1])
        line.append(best)
        color = FAINT if early else BLUE
        axes.plot(place, reached if early else trial["epochs"][-1], "o", color=color, ms=5)
    axes.step(range(1, len(line) + 1), line, where="post", color=ORANGE, lw=1.2)
    axes.set_title("reached by each trial; gray: ended early; line: the best so far", size=9)
    axes.set_xlabel("trial")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _mattered(axes: Axes, importance: Mapping[str, float]) -> None:
    axes.set_title("how much each option mattered", size=9)
    if not importance:
        axes.text(0.5, 0.5, "too few trials to tell", ha="center", va="center", color=INK, size=9)
        axes.set_axis_off()
        return
    ordered = sorted(importance.items(), key=lambda item: item[1])
    axes.barh([name for name, _ in ordered], [share for _, share in ordered], 0.6, color=BLUE)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _over(axes: Axes, result: Mapping[str, Any], name: str, epoch: int) -> None:
    for trial in result["trials"]:
        best = trial["number"] == result["best"]
        color = ORANGE if best else FAINT if trial["ended_early"] else BLUE
        axes.plot(trial["values"][name], trial["epochs"][epoch - 1], "o", color=color, ms=5)
    if name in _LOG:
        axes.set_xscale("log")
    axes.set_xlabel(name.replace("_", " "), size=9)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
