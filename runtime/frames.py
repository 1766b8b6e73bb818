"""Frames as they come: arrays from a camera, or picture files. Checked, and turned upright RGB."""

from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import FrameError

Frame = NDArray[np.uint8]
Color = Literal["bgr", "rgb", "bgra", "gray", "nv12"]
Colors = Color | Sequence[Color]
"""The channel order of all frames, or of each."""
Box = tuple[int, int, int, int]
"""Left, top, width and height of a part of a frame, in pixels."""

MAX_PIXELS = 100_000_000
MAX_ASPECT = 100  # a longer strip would grow to gigabytes when its short side is resized
# Only what cameras and photo tools write: every further decoder is one more to attack.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def check_frame(frame: object, color: Color) -> Frame:
    """Returns `frame` if it is one that can be classified.

    Expects uint8: `bgr`, `rgb` [H, W, 3]; `bgra` [H, W, 4]; `gray` [H, W] or [H, W, 1];
    `nv12` [H * 3/2, W] with even sides. Raises FrameError saying what is wrong.
    """
    if color not in get_args(Color):
        raise FrameError(f"color={color!r} is not known; use one of {', '.join(get_args(Color))}")
    if not isinstance(frame, np.ndarray):
        raise FrameError(
            f"a frame is a numpy array (or the path of a picture), not {type(frame).__name__}"
        )
    if frame.dtype != np.uint8:
        raise FrameError(
            f"a frame holds uint8 values 0 to 255, this one is {frame.dtype}; "
            "convert it first (floats in 0..1 by (image * 255).round().astype('uint8'))"
        )
    if not _shape_fits(frame.shape, color):
        raise FrameError(f"a {color} frame has {_SHAPES[color]}, this one has {frame.shape}")
    if frame.size == 0:
        raise FrameError(f"the frame is empty: its shape is {frame.shape}")
    if max(frame.shape[:2]) > MAX_ASPECT * min(frame.shape[:2]):
        raise FrameError(f"the frame's sides differ by over {MAX_ASPECT} times: {frame.shape}")
    return frame


_SHAPES = {
    "bgr": "shape (height, width, 3)",
    "rgb": "shape (height, width, 3)",
    "bgra": "shape (height, width, 4)",
    "gray": "shape (height, width)",
    "nv12": "shape (height * 3 / 2, width) with an even height and width",
}


def _shape_fits(shape: tuple[int, ...], color: Color) -> bool:
    if color in ("bgr", "rgb", "bgra"):
        return len(shape) == 3 and shape[2] == (4 if color == "bgra" else 3)
    if color == "gray":
        return len(shape) == 2 or (len(shape) == 3 and shape[2] == 1)
    return len(shape) == 2 and shape[0] % 3 == 0 and shape[1] % 2 == 0


def frame_size(frame: Frame, color: Color) -> tuple[int, int]:
    """Width and height in pixels of a checked frame."""
    rows, width = frame.shape[:2]
    return width, rows * 2 // 3 if color == "nv12" else rows


def check_roi(roi: Any, width: int, height: int) -> Box:
    """Returns the part (x, y, width, height) of a frame of that size; all of it where `roi` is
    None. Raises FrameError where it is empty, reaches outside, or is no four whole numbers."""
    if roi is None:
        return 0, 0, width, height
    try:
        x, y, w, h = map(index, roi)
    except (TypeError, ValueError):
        raise FrameError(
            f"a roi is (x, y, width, height) in whole pixels of the frame, not {roi!r}"
        ) from None
    if w <= 0 or h <= 0:
        raise FrameError(f"the roi {x, y, w, h} is empty: give a width and height of 1 or more")
    if x < 0 or y < 0 or x + w > width or y + h > height:
        raise FrameError(
            f"the roi {x, y, w, h} (x, y, width, height) reaches outside the frame "
            f"of {width} x {height} pixels"
        )
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise FrameError(f"the sides of the roi {x, y, w, h} differ by over {MAX_ASPECT} times")
    return x, y, w, h


def read_picture(
    path: str | Path | BinaryIO, at_least: int | None = None, max_pixels: int = MAX_PIXELS
) -> Frame:
    """Reads a picture file (or an open one) as uint8 RGB [H, W, 3], upright by its EXIF
    orientation.

    16-bit gray is scaled to 8 bits; transparency is dropped. With `at_least` a large JPEG may be
    decoded, faster, at a half, a quarter or an eighth of its size, its sides no shorter than that.
    Raises FrameError for what is not a picture, is damaged, or has over `max_pixels`, before that
    is decoded.
    """
    if isinstance(path, str | Path):
        path = Path(path).expanduser()
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise FrameError(
                    f"{path} has {image.width} x {image.height} pixels; "
                    f"at most {max_pixels:,} are read"
                )
            if at_least:
                image.draft(None, (at_least, at_least))
            return _upright_rgb(image)
    except FrameError:
        raise
    except FileNotFoundError as error:
        raise FrameError(f"there is no picture {path}") from error
    except UnidentifiedImageError as error:
        raise FrameError(f"{path} is not a picture in a known format") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise FrameError(f"{path} cannot be read as a picture: {error}") from error


def _upright_rgb(image: Image.Image) -> Frame:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode[0] in "IF":  # I;16, or I where Pillow widens 16 bits to 32
        values = np.asarray(upright)
        if upright.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pictures of mode {upright.mode} with 32 bits a pixel are not read")
        upright = Image.fromarray((values >> 8).astype(np.uint8))
    return np.asarray(upright.convert("RGB"), dtype=np.uint8)
