"""How drawings look: the colours of labels, and letters with smooth edges."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .frames import Frame

Rgb = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Told apart on dark and on light ground, neighbours most of all.
PALETTE: tuple[Rgb, ...] = (
    (46, 134, 222), (240, 147, 43), (38, 171, 98), (224, 86, 120), (142, 98, 214),
    (18, 173, 182), (201, 160, 26), (214, 76, 58), (104, 128, 150), (150, 120, 86),
)  # fmt: skip
# For letters that Pillow's own font lacks; found by Pillow where the system keeps fonts.
_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")


def color_of(index: int) -> Rgb:
    """The colour of the label at this position."""
    return PALETTE[index % len(PALETTE)]


@lru_cache(maxsize=64)
def font(size: int, wide: bool = False) -> Font:
    """A font of this size in pixels: Pillow's own, which is the same everywhere; or where there is
    one a `wide` one of the system, with more letters than the Latin ones."""
    if wide:
        for name in _WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def font_of(text: str, size: int) -> Font:
    """The font in which this text can be written."""
    return font(size, wide=any(ord(letter) > 255 for letter in text.replace("…", "")))


def text_width(text: str, size: int) -> int:
    """The width of a text in pixels."""
    return round(font_of(text, size).getlength(text))


def shortened(text: str, size: int, width: int) -> str:
    """The text, or as much of it as is at most `width` pixels wide, with an ellipsis."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1].rstrip()
    return text + "…" if text else ""


@lru_cache(maxsize=512)
def letters(text: str, size: int) -> Frame:
    """How much of each pixel a text covers: uint8 [H, W], H the same for all texts of a size."""
    mask = Image.new("L", (max(1, text_width(text, size) + 2), round(size * 1.3)))
    place = (0, round(size * 1.02))  # of the baseline, so that texts stand in a line
    ImageDraw.Draw(mask).text(place, text, fill=255, font=font_of(text, size), anchor="ls")
    return np.asarray(mask, dtype=np.uint8)
