"""Frames for people: upright colours for a picture file, and a small JPEG of a frame."""

import io

import numpy as np
from PIL import Image

from .frames import Color, Frame, check_frame, frame_size
from .opencv import bgr_of_nv12


def bgr_of(frame: Frame, color: Color) -> Frame:
    """A frame as OpenCV draws on it: a new uint8 BGR [H, W, 3]. Raises FrameError."""
    frame = check_frame(frame, color)
    if color == "nv12":
        width, height = frame_size(frame, color)
        return bgr_of_nv12(frame, (0, 0, width, height)).copy()
    if color == "gray":
        return np.repeat(frame.reshape(*frame.shape[:2], 1), 3, axis=2)
    channels = frame[..., ::-1] if color == "rgb" else frame[..., :3]
    return np.array(channels, order="C")


def thumbnail(frame: Frame, color: Color, side: int) -> bytes:
    """A JPEG of a frame whose longer side has `side` pixels, or fewer where the frame has."""
    bgr = bgr_of(frame, color)
    step = max(1, max(bgr.shape[:2]) // (4 * side))  # what is far too large is thinned out first
    picture = Image.fromarray(np.ascontiguousarray(bgr[::step, ::step, ::-1]))
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()
