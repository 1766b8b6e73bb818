"""Pillow's resize with antialias as products of matrices: the same pixels, several times as fast.

A picture that is reduced less than 4 times comes out bit for bit as Pillow makes it: weights and
values are whole multiples of Pillow's fixed point, and float64 adds those exactly in any order.
One that is reduced more is halved first, until it is still reduced 2 to 5 times, in float32; that
differs from Pillow by a level here and there (`resize_weights` makes up for the halving).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .frames import Frame
from .opencv import Halving, halved, planes
from .resize_weights import Axis, Filter, Span, plan_axis
from .scratch import scratch

EXACT = 4.0  # what is reduced by less is not halved
GAP = 2.4  # after the first halving a picture is halved on while it stays so many times as large
# Up to so many pixels a picture is blurred before its last halving. Small pictures were often made
# small, and are sharp to the pixel, which means of 2 x 2 turn into false patterns. Large frames of
# cameras and videos are not, and the blur would take as long as all the rest.
SHARP = 1 << 20
STRIP = 192  # rows that are worked on at once, so that they stay in the processor's cache
# For a product of more multiplications OpenBLAS takes several threads (its interface/gemm.c). That
# gains little on matrices like these, and takes 100 times as long while other cores are busy.
ONE_THREAD = 1 << 18
# What the rounding of a halving adds on average: the sums of four end on a half, or sixteenths do.
BIAS: dict[Halving, float] = {"mean": 1 / 8, "blurred mean": 1 / 8 + 1 / 32}


@dataclass(frozen=True, eq=False)
class Resize:
    """The resize of one part of a picture. `turned` has the rows resized before the columns."""

    columns: Axis
    rows: Axis
    halvings: tuple[Halving, ...]
    turned: bool

    def __call__(self, part: Frame, out: Frame) -> None:
        """Writes the resized part to `out`, uint8 [rows.count, columns.count, 3] of any strides.

        `part` is what the axes take: uint8 [rows.length, columns.length], or [..., 3 or 4].
        """
        channels = planes(halved(part, self.halvings))
        first, second = self.columns, self.rows
        if self.turned:
            channels, out = channels.swapaxes(1, 2), out.swapaxes(0, 1)
            first, second = second, first
        result = _along_columns(_along_rows(channels, first), second)
        np.add(result, 0.5 - sum(BIAS[halving] for halving in self.halvings), out=result)
        np.clip(result, 0, 255, out=result)
        for channel in range(3):
            np.copyto(out[..., channel], result[channel % len(result)], casting="unsafe")


def plan_resize(columns: Span, rows: Span, filtering: Filter) -> Resize:
    """The resize of a part of a picture."""
    reduced = min(span.size / span.resized for span in (columns, rows))
    times = max(1, math.floor(math.log2(reduced / GAP))) if reduced >= EXACT else 0
    seen = math.prod(span.count * span.size / span.resized for span in (columns, rows))
    means: list[Halving] = ["mean" for _ in range(times)]
    if means and seen <= SHARP:
        means[-1] = "blurred mean"
    halvings = tuple(means)
    # what Pillow 13 begins with; it matters to pixels that are rounded between the two
    turned = rows.size - rows.resized > max(0, 2 * (columns.size - columns.resized))
    return Resize(
        plan_axis(columns, filtering, halvings),
        plan_axis(rows, filtering, halvings),
        halvings,
        turned and not halvings,
    )


def _along_rows(channels: Frame, axis: Axis) -> NDArray[Any]:
    """Each row resized: [C, H, W] to floats [C, H, axis.count] of 0 to 255, in float64 whole."""
    count, height, width = channels.shape
    dtype = axis.blocks[0].weights.dtype
    narrow = scratch.take("narrow", (count, height, axis.count), dtype)
    largest = max(block.weights.size for block in axis.blocks)
    for strip in _pieces(height, max(1, min(STRIP, ONE_THREAD // largest))):
        wide = scratch.take("wide", (count, strip.stop - strip.start, width), dtype)
        np.copyto(wide, channels[:, strip])
        made = narrow[:, strip]
        for block in axis.blocks:
            np.matmul(wide[..., block.inputs], block.weights, out=made[..., block.outputs])
        if dtype == np.float64:  # between the passes Pillow has whole numbers
            np.add(made, 0.5, out=made)
            np.floor(made, out=made)
        np.clip(made, 0, 255, out=made)
    return narrow


def _along_columns(values: NDArray[Any], axis: Axis) -> NDArray[Any]:
    """Each column resized: floats [C, H, W] to [C, axis.count, W]."""
    count, _, width = values.shape
    result = scratch.take("result", (count, axis.count, width), values.dtype)
    for block in axis.blocks:
        for piece in _pieces(width, max(1, ONE_THREAD // block.weights.size)):
            inputs, outputs = values[:, block.inputs, piece], result[:, block.outputs, piece]
            np.matmul(block.weights.T, inputs, out=outputs)
    return result


def _pieces(total: int, most: int) -> Iterator[slice]:
    """0 to `total` in nearly equal pieces of at most `most`."""
    count = -(-total // most)
    return (slice(total * i // count, total * (i + 1) // count) for i in range(count))
