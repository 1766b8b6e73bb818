"""What OpenCV does to a frame before it is resized: takes its channels apart, halves, converts.

OpenCV is optional, and imported when a frame first needs it. Without it numpy and Pillow make the
same pixels, slower; only NV12 needs it.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from .errors import BackendUnavailable
from .frames import Box, Frame
from .scratch import scratch

Halving = Literal["mean", "blurred mean"]
"""How a picture is halved: to the means of 2 x 2 pixels, x.5 rounded up; and whether it is blurred
before, by [1, 2, 1] / 4 along both axes, continued by its mirror image."""


@cache
def opencv() -> Any:
    """The module, or the error of its import: it may be there and miss a library of the system."""
    try:
        import cv2
    except ImportError as error:
        return error
    return cv2


def hush() -> None:
    """Has OpenCV and its FFmpeg print nothing of their own: for a command that tells what becomes
    of its sources. Before OpenCV is imported; what the environment says otherwise goes first."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def halved(pixels: Frame, halvings: Sequence[Halving]) -> Frame:
    """[H, W] or [H, W, C] with both sides halved so. Before that they become multiples of what
    they are divided by: the last row and column are repeated."""
    if halvings:
        pixels = _packed(_padded(pixels, 2 ** len(halvings)))
    for number, halving in enumerate(halvings):
        shape = pixels.shape[0] // 2, pixels.shape[1] // 2, *pixels.shape[2:]
        half = scratch.take(f"half {number}", shape, np.uint8)
        _halve(pixels, halving == "blurred mean", half)
        pixels = half
    return pixels


def _halve(pixels: Frame, blurred: bool, half: Frame) -> None:
    cv2 = opencv()
    if isinstance(cv2, ImportError):
        for plane, result in zip(_channels(pixels), _channels(half), strict=True):
            plane = _blurred(plane) if blurred else np.ascontiguousarray(plane)
            result[...] = np.asarray(Image.fromarray(plane).reduce(2))
        return
    if blurred:
        blur: Frame = scratch.take("blurred", pixels.shape, np.uint8)
        cv2.GaussianBlur(pixels, (3, 3), 0, dst=blur, borderType=cv2.BORDER_REFLECT)
        pixels = blur
    size = half.shape[1], half.shape[0]
    cv2.resize(pixels, size, dst=half, interpolation=cv2.INTER_AREA)


def _channels(pixels: Frame) -> Frame:
    return np.moveaxis(np.atleast_3d(pixels), 2, 0)


def planes(pixels: Frame) -> Frame:
    """The channels apart, uint8 [C, H, W], of [H, W] or [H, W, C]; of four the first three."""
    if pixels.ndim == 2:
        return pixels[None]
    height, width, count = pixels.shape
    # Where all planes begin alike (modulo 64 bytes), OpenCV's split writes past the cache.
    memory: Frame = scratch.take("planes", (count, height * width + 1), np.uint8)
    apart = memory[:, :-1].reshape(count, height, width)
    cv2 = opencv()
    if isinstance(cv2, ImportError):
        apart[...] = _channels(pixels)
    else:
        cv2.split(_packed(pixels), list(apart))
    colors: Frame = apart[:3]
    return colors


def _padded(pixels: Frame, multiple: int) -> Frame:
    height, width = pixels.shape[:2]
    down, right = -height % multiple, -width % multiple
    if not down and not right:
        return pixels
    shape = height + down, width + right, *pixels.shape[2:]
    whole: Frame = scratch.take("padded", shape, np.uint8)
    whole[:height, :width] = pixels
    whole[:height, width:] = pixels[:, -1:]
    whole[height:] = whole[height - 1]
    return whole


def _blurred(plane: Frame) -> Frame:
    """OpenCV's GaussianBlur with a kernel of 3 x 3."""
    padded = np.pad(plane, 1, mode="edge").astype(np.uint16)
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    sums = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]
    return np.asarray((sums + 8) >> 4, dtype=np.uint8)


def bgr_of_nv12(frame: Frame, box: Box) -> Frame:
    """The pixels of an NV12 frame in a box with even sides, BGR [height, width, 3]."""
    cv2 = opencv()
    if isinstance(cv2, ImportError):
        raise BackendUnavailable(
            f"NV12 frames need OpenCV ({cv2}): pip install 'edgeclip[cpu]' "
            "(on a Jetson use the system's OpenCV)"
        )
    x, y, width, height = box
    rows = frame.shape[0] * 2 // 3
    luma = frame[y : y + height, x : x + width]
    chroma = frame[rows + y // 2 : rows + (y + height) // 2, x : x + width]
    pairs = chroma.reshape(height // 2, width // 2, 2)
    bgr: Frame = scratch.take("bgr", (height, width, 3), np.uint8)
    cv2.cvtColorTwoPlane(_packed(luma), _packed(pairs), cv2.COLOR_YUV2BGR_NV12, dst=bgr)
    return bgr


def _packed(pixels: Frame) -> Frame:
    """As OpenCV reads it without a copy: rows one after the other, each in one piece."""
    row = pixels[0]
    return pixels if row.flags.c_contiguous and pixels.strides[0] >= row.nbytes else pixels.copy()
