"""Draws on a frame what it shows: the labels that are there, and the scores of the best as bars."""

from collections.abc import Mapping, Sequence

import numpy as np

from .frames import Color, Frame
from .look import Rgb, color_of, letters, shortened, text_width
from .thumbnail import bgr_of

_WHITE, _PALE, _QUIET = (255, 255, 255), (205, 212, 220), (120, 132, 146)
_DARK, _SHADE = (14, 18, 24), 0.72  # what lies under the letters, and how much it covers
LEAST = 240  # pixels of the shorter side: smaller frames are enlarged, or nothing could be read


def annotate(
    frame: Frame,
    color: Color,
    labels: Sequence[str],
    scores: Mapping[str, float],
    active: Sequence[str] = (),
    caption: str = "",
    rows: int = 3,
) -> Frame:
    """A new frame, uint8 BGR [H, W, 3], with `active` labels on top, the `rows` best of `labels` by
    `scores` as bars at the bottom, and a caption in the corner.

    A label's colour is that of its position in `labels`. Frames whose shorter side is below 240
    pixels are enlarged by a whole number. Raises FrameError.
    """
    canvas = _enlarged(bgr_of(frame, color))
    height, width = canvas.shape[:2]
    size = max(11, min(64, round(min(height, width) / 26)))
    colors = {label: color_of(n) for n, label in enumerate(labels)}
    tags = [(label, colors[label]) for label in active if label in colors]
    right = _caption(canvas, caption, size)
    _tags(canvas, tags, size, width - right)
    best = sorted(labels, key=lambda label: -scores.get(label, 0.0))[:rows]
    _bars(canvas, [(label, scores.get(label, 0.0), colors[label]) for label in best], active, size)
    return canvas


def _enlarged(canvas: Frame) -> Frame:
    times = -(-LEAST // min(canvas.shape[:2]))
    if times <= 1:
        return canvas
    return np.ascontiguousarray(canvas.repeat(times, axis=0).repeat(times, axis=1))


def _tags(canvas: Frame, tags: Sequence[tuple[str, Rgb]], size: int, limit: int) -> None:
    """The labels that are there, each on its colour, from the left as far as there is room."""
    big, pad = round(size * 1.25), size // 2
    x, y = pad, pad
    for label, color in tags:
        text = shortened(label, big, limit - x - 3 * pad)
        if not text:
            return
        width = text_width(text, big) + 2 * pad
        _fill(canvas, x, y, width, round(big * 1.7), color, 0.92)
        _write(canvas, x + pad, y + round(big * 0.2), text, big, _WHITE)
        x += width + pad // 2


def _bars(
    canvas: Frame, rows: Sequence[tuple[str, float, Rgb]], active: Sequence[str], size: int
) -> None:
    height, width = canvas.shape[:2]
    pad, line = size // 2, round(size * 1.6)
    wide = min(width - 2 * pad, size * 20)
    percent = text_width("100%", size)
    name = round((wide - percent - 4 * pad) * 0.5)
    bar = wide - percent - 4 * pad - name
    left, top = pad, height - pad - line * len(rows) - pad
    _fill(canvas, left, top, wide, line * len(rows) + pad, _DARK, _SHADE)
    for number, (label, score, color) in enumerate(rows):
        y = top + pad // 2 + number * line
        there = label in active
        _write(canvas, left + pad, y + round(size * 0.12), shortened(label, size, name), size,
               _WHITE if there else _PALE)  # fmt: skip
        x, thick = left + 2 * pad + name, max(3, round(size * 0.5))
        middle = y + (line - thick) // 2
        _fill(canvas, x, middle, bar, thick, _QUIET, 0.35)
        _fill(canvas, x, middle, round(bar * min(1.0, score)), thick, color, 1.0 if there else 0.75)
        shown = f"{score:.0%}"
        end = left + wide - pad - text_width(shown, size)
        _write(canvas, end, y + round(size * 0.12), shown, size, _WHITE if there else _PALE)


def _caption(canvas: Frame, caption: str, size: int) -> int:
    """Writes at the top right; returns the width that it takes."""
    small, pad = max(10, round(size * 0.8)), size // 2
    text = shortened(caption, small, canvas.shape[1] // 2)
    if not text:
        return 0
    width = text_width(text, small) + 2 * pad
    left = canvas.shape[1] - pad - width
    _fill(canvas, left, pad, width, round(small * 1.7), _DARK, _SHADE)
    _write(canvas, left + pad, pad + round(small * 0.2), text, small, _PALE)
    return width + 2 * pad


def _fill(
    canvas: Frame, x: int, y: int, width: int, height: int, color: Rgb, opacity: float
) -> None:
    part = canvas[max(0, y) : max(0, y + height), max(0, x) : max(0, x + width)]
    part[...] = part * (1 - opacity) + np.array(color[::-1]) * opacity


def _write(canvas: Frame, x: int, y: int, text: str, size: int, color: Rgb) -> None:
    part = canvas[max(0, y) :, max(0, x) :]
    cover = letters(text, size)[: part.shape[0], : part.shape[1], None] / 255
    part = part[: cover.shape[0], : cover.shape[1]]
    part[...] = part + (np.array(color[::-1]) - part) * cover
