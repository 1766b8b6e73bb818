"""From a frame of any size to the image encoder's input, the pixels that the model was trained on.

The reference is the models' own transform (torchvision's Resize and CenterCrop on a Pillow image,
open_clip's for `pad`): antialiased bicubic or bilinear. The result is equal to it bit for bit where
the frame is reduced less than 4 times, and else but for a level here and there (see `resize`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .errors import FrameError
from .frames import Box, Color, Frame, check_frame, check_roi, frame_size, read_picture
from .manifest import ImageSpec
from .opencv import bgr_of_nv12
from .resize import Resize, plan_resize
from .resize_weights import Span


def preprocess(
    frame: Frame | str | Path,
    spec: ImageSpec,
    color: Color = "bgr",
    roi: Box | None = None,
    out: Frame | None = None,
) -> Frame:
    """Returns uint8 RGB [spec.height, spec.width, 3], in `out` where that is given.

    `frame` is an array in the given `color` order (see `frames.check_frame`), or the path of a
    picture. With `roi` = (x, y, width, height) in pixels it is that part of it, as if it were the
    whole frame. Raises FrameError.
    """
    pixels: Frame = preprocess_regions(
        frame, [roi], spec, color, None if out is None else out[None]
    )[0]
    return pixels


def preprocess_regions(
    frame: Frame | str | Path,
    regions: Sequence[Box | None],
    spec: ImageSpec,
    color: Color = "bgr",
    out: Frame | None = None,
) -> Frame:
    """Parts of one frame, each as by `preprocess`: uint8 RGB [N, spec.height, spec.width, 3]."""
    if isinstance(frame, str | Path):
        frame, color = read_picture(frame), "rgb"
    array = check_frame(frame, color)
    boxes = [check_roi(roi, *frame_size(array, color)) for roi in regions]
    fits = [fit(width, height, spec) for _, _, width, height in boxes]
    parts = [found.part_of(box) for found, box in zip(fits, boxes, strict=True)]
    out = _checked(out, (len(boxes), spec.height, spec.width, 3))
    pixels, left, top = _pixels(array, color, parts)
    backwards = color not in ("rgb", "gray")
    for found, (x, y, width, height), result in zip(fits, parts, out, strict=True):
        part = pixels[y - top : y - top + height, x - left : x - left + width]
        found.write(part, spec.fill, result[..., ::-1] if backwards else result)
    return out


@dataclass(frozen=True, eq=False)
class Fit:
    """How a picture of one size is fitted to the model's: the resize, and where its result goes."""

    resize: Resize
    left: int
    top: int

    def part_of(self, box: Box) -> Box:
        """What is needed of a box in the frame."""
        columns, rows = self.resize.columns, self.resize.rows
        return box[0] + columns.start, box[1] + rows.start, columns.length, rows.length

    def write(self, part: Frame, fill: int, out: Frame) -> None:
        """Writes the part, resized, and the padding to `out`, uint8 [H, W, 3]."""
        bottom, right = self.top + self.resize.rows.count, self.left + self.resize.columns.count
        inside = out[self.top : bottom, self.left : right]
        if inside.shape != out.shape:
            out[...] = fill
        self.resize(part, inside)


@lru_cache(maxsize=64)
def fit(width: int, height: int, spec: ImageSpec) -> Fit:
    """The fit of a picture of this size."""
    wide, high = resized_size(width, height, spec)
    columns, rows = _span(width, wide, spec.width), _span(height, high, spec.height)
    resize = plan_resize(columns, rows, spec.interpolation)
    return Fit(resize, max(0, (spec.width - wide) // 2), max(0, (spec.height - high) // 2))


def _span(size: int, resized: int, wanted: int) -> Span:
    """The centre of a longer axis, or all of a shorter one. As in torchvision the half that is cut
    off is rounded to even, and as in open_clip the half that is padded is rounded down."""
    return Span(size, resized, max(0, round((resized - wanted) / 2)), min(resized, wanted))


def resized_size(width: int, height: int, spec: ImageSpec) -> tuple[int, int]:
    """Width and height after the resize and before the crop or the padding."""
    if spec.fit == "squash":
        return spec.width, spec.height
    if spec.fit == "crop" and spec.width == spec.height:  # torchvision truncates the long side
        if width <= height:
            return spec.width, int(spec.width * height / width)
        return int(spec.height * width / height), spec.height
    ratios = width / spec.width, height / spec.height
    ratio = max(ratios) if spec.fit == "pad" else min(ratios)
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _pixels(frame: Frame, color: Color, parts: Sequence[Box]) -> tuple[Frame, int, int]:
    """The pixels of a frame, [H, W] or [H, W, C], and where in it they begin: x and y."""
    if color == "gray":
        return frame.reshape(frame.shape[:2]), 0, 0
    if color != "nv12" or not parts:
        return frame, 0, 0
    # only what is needed, in whole pairs of pixels: they share their chroma
    left, top = (min(part[i] for part in parts) // 2 * 2 for i in (0, 1))
    right, bottom = (max(part[i] + part[i + 2] for part in parts) for i in (0, 1))
    box = left, top, (right - left + 1) // 2 * 2, (bottom - top + 1) // 2 * 2
    return bgr_of_nv12(frame, box), left, top


def _checked(out: Frame | None, shape: tuple[int, ...]) -> Frame:
    """`out` if it is of this shape, or a new array."""
    if out is None:
        return np.empty(shape, dtype=np.uint8)
    if out.shape != shape or out.dtype != np.uint8:
        raise FrameError(f"out must be uint8 of shape {shape}, not {out.dtype} {out.shape}")
    return out
