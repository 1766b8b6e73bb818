"""A contact sheet: frames with their three best labels, right and wrong marked."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from runtime.frames import Frame
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


def contact_sheet(examples: Sequence[Example], title: str, columns: int = 8) -> Image.Image:
    """Draws the examples in rows of `columns`, with a title above."""
    rows = -(-len(examples) // columns)
    cell = PICTURE + GAP, PICTURE + 4 * LINE + GAP
    head = 3 * LINE
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + head + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, LINE // 2 + 4), title, INK, _font(20))
    for number, example in enumerate(examples):
        x, y = GAP + number % columns * cell[0], head + number // columns * cell[1]
        sheet.paste(_thumbnail(example.frame), (x, y))
        _frame(draw, x, y, example)
        _labels(draw, x, y + PICTURE + 4, example)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _thumbnail(frame: Frame) -> Image.Image:
    image = Image.fromarray(frame)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    how = Image.Resampling.NEAREST if side < PICTURE else Image.Resampling.LANCZOS
    return square.resize((PICTURE, PICTURE), how)


def _frame(draw: ImageDraw.ImageDraw, x: int, y: int, example: Example) -> None:
    color = RIGHT if example.prediction.label == example.label else WRONG
    draw.rectangle((x - 3, y - 3, x + PICTURE + 2, y + PICTURE + 2), outline=color, width=3)
    if example.mark:
        width = draw.textlength(example.mark, _font(12)) + 8
        draw.rectangle((x, y, x + width, y + 16), fill=PAPER)
        draw.text((x + 4, y + 1), example.mark, INK, _font(12))


def _labels(draw: ImageDraw.ImageDraw, x: int, y: int, example: Example) -> None:
    for label, score in example.prediction.top(3):
        draw.rectangle((x, y + 2, x + round(score * PICTURE), y + LINE - 1), fill=BAR)
        right = label == example.label
        draw.text((x + 3, y + 2), label, RIGHT if right else INK, _font(14))
        draw.text((x + PICTURE - 32, y + 2), f"{score:.2f}", FAINT, _font(14))
        y += LINE
    if example.prediction.label != example.label:
        draw.text((x + 3, y + 2), f"is: {example.label}", WRONG, _font(14))
