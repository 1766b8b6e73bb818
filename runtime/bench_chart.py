"""The chart of `edgeclip bench`. It needs matplotlib, which the runtime itself does not."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from .bench import Row

COLORS = {"preprocess": "#d9822b", "encode": "#2f6db3", "head": "#2e9e4f"}


def chart(rows: Sequence[Row]) -> Figure:
    """A bar for each row that ran: the medians of its stages, one after the other, and a mark at
    the 99th percentile of the whole."""
    ran = [row for row in rows if not row.error]
    figure = Figure((7.5, 1.8 + 0.5 * len(ran)), 120, layout="constrained")
    axes = figure.add_subplot()
    places, left = range(len(ran)), [0.0] * len(ran)
    for stage, color in COLORS.items():
        widths = [row.stages[stage].p50 for row in ran]
        axes.barh(places, widths, 0.6, left, color=color, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    slowest = [row.stages["total"].p99 for row in ran]
    axes.plot(slowest, places, "|", color="#3a3a38", markersize=14, label="p99 of the whole")
    for place, end, row in zip(places, map(max, left, slowest), ran, strict=True):
        axes.annotate(f"  {row.frames_per_second:.1f} frames/s", (end, place), va="center", size=8)
    axes.set_yticks(places, [f"{row.backend}\n{row.precision}" for row in ran], size=8)
    axes.set_ylim(len(ran) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max([*left, *slowest], default=1))
    axes.set_xlabel("milliseconds from a frame to its label; bars: medians")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
