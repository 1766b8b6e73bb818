"""Pictures of what a model did: frames with their three best labels, captions with the pictures
that they found. Right and wrong are marked.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.frames import Frame, read_picture
from runtime.prediction import Prediction

PICTURE, GAP, LINE = 150, 14, 19
PAPER, INK, FAINT, BAR = "#fbfbfa", "#1d1d1b", "#8a8a86", "#d7e3f4"
RIGHT, WRONG = "#2e9e4f", "#d43d2f"


@dataclass(frozen=True)
class Example:
    """One frame (uint8 RGB), what it was taken for, and what it is; `mark` is a note on it."""

    frame: Frame
    prediction: Prediction
    label: str
    mark: str = ""


@dataclass(frozen=True)
class Query:
    """A caption and the pictures for it: frame (uint8 RGB), whether it is right, a note on it."""

    caption: str
    pictures: Sequence[tuple[Frame, bool, str]]


def contact_sheet(
    examples: Sequence[Example], title: str, columns: int = 8, word: str = "is"
) -> Image.Image:
    """Draws the examples in rows of `columns`, with a title above; `word` stands before a label
    that is not the predicted one."""
    rows = -(-len(examples) // columns)
    cell = PICTURE + GAP, PICTURE + 4 * LINE + GAP
    sheet, draw, head = _sheet(columns, rows * cell[1], title)
    for number, example in enumerate(examples):
        x, y = GAP + number % columns * cell[0], head + number // columns * cell[1]
        right = example.prediction.label == example.label
        _paste(sheet, draw, (x, y), (example.frame, right, example.mark))
        _labels(draw, x, y + PICTURE + 4, example, word)
    return sheet


def query_sheet(queries: Sequence[Query], title: str, columns: int = 6) -> Image.Image:
    """Draws a caption and a row of at most `columns` pictures for each query, a title above."""
    height = PICTURE + 2 * LINE + GAP
    sheet, draw, y = _sheet(columns, len(queries) * height, title)
    for query in queries:
        width = columns * (PICTURE + GAP) - GAP
        draw.text((GAP, y), fitted(draw, query.caption, width, 13), INK, _font(13))
        for number, picture in enumerate(query.pictures[:columns]):
            _paste(sheet, draw, (GAP + number * (PICTURE + GAP), y + LINE + 8), picture)
        y += height
    return sheet


def small(file: Path) -> Frame:
    """A picture file at the size in which it is shown, so that large ones do not pile up."""
    return np.asarray(thumbnail(read_picture(file)), dtype=np.uint8)


def thumbnail(frame: Frame) -> Image.Image:
    """The middle square of a frame, at the size that the sheets show."""
    image = Image.fromarray(frame)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    how = Image.Resampling.NEAREST if side < PICTURE else Image.Resampling.LANCZOS
    return square.resize((PICTURE, PICTURE), how)


def fitted(draw: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """The text in one line, cut so that it is at most `width` pixels wide in font `size`."""
    text = " ".join(text.split())
    if draw.textlength(text, _font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", _font(size)) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _sheet(columns: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """An empty sheet with its title; where the first row begins."""
    head = 3 * LINE
    sheet = Image.new("RGB", (columns * (PICTURE + GAP) + GAP, height + head + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, LINE // 2 + 4), fitted(draw, title, sheet.width - 2 * GAP, 17), INK, _font(17))
    return sheet, draw, head


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as in the charts: it has Latin, Greek, Cyrillic and Arabic letters."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    picture: tuple[Frame, bool, str],
) -> None:
    """Draws a frame with a green or red border, and its note in the corner."""
    (x, y), (frame, right, mark) = at, picture
    sheet.paste(thumbnail(frame), at)
    color = RIGHT if right else WRONG
    draw.rectangle((x - 3, y - 3, x + PICTURE + 2, y + PICTURE + 2), outline=color, width=3)
    if mark:
        width = draw.textlength(mark, _font(12)) + 8
        draw.rectangle((x, y, x + width, y + 16), fill=PAPER)
        draw.text((x + 4, y + 1), mark, INK, _font(12))


def _labels(draw: ImageDraw.ImageDraw, x: int, y: int, example: Example, word: str) -> None:
    for label, score in example.prediction.top(3):
        draw.rectangle((x, y + 2, x + round(score * PICTURE), y + LINE - 1), fill=BAR)
        color = RIGHT if label == example.label else INK
        draw.text((x + 3, y + 2), fitted(draw, label, PICTURE - 40, 12), color, _font(12))
        draw.text((x + PICTURE - 32, y + 2), f"{score:.2f}", FAINT, _font(12))
        y += LINE
    if example.prediction.label != example.label:
        text = fitted(draw, f"{word}: {example.label}", PICTURE - 3, 12)
        draw.text((x + 3, y + 2), text, WRONG, _font(12))
