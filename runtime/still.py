"""Whether a scene has changed, told cheaply: by small gray pictures of it."""

import numpy as np
from numpy.typing import NDArray

from .frames import Color, Frame, frame_size

SIDE, SAMPLES = 32, 4
CHANGE = 12.0
"""Gray levels by which one of the 32 x 32 parts of a scene must change."""

Thumbnail = NDArray[np.float32]


def thumbnail(frame: Frame, color: Color) -> Thumbnail:
    """32 x 32 gray levels of a checked frame, float32: each the mean of 4 x 4 of its pixels."""
    width, height = frame_size(frame, color)
    count = SIDE * SAMPLES
    rows = (np.arange(count) * height + height // 2) // count
    columns = (np.arange(count) * width + width // 2) // count
    pixels = frame[rows[:, None], columns].reshape(count, count, -1)[..., :3]
    gray = pixels.astype(np.float32).mean(axis=2)
    small: Thumbnail = gray.reshape(SIDE, SAMPLES, SIDE, SAMPLES).mean(axis=(1, 3))
    return small


def changed(before: Thumbnail, after: Thumbnail, by: float = CHANGE) -> bool:
    """Whether any part of the scene differs by more than `by` gray levels: the mean of all would
    miss what is small."""
    return bool(np.abs(after - before).max() > by)
