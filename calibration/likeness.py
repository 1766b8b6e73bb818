"""How alike frames look: tells near-duplicates from distinct frames, whatever the size or codec.

A frame's layout is a difference hash (dHash; Krawetz 2013, "Kind of Like That",
hackerfactor.com): the gray frame is averaged to 8 rows of 9 cells, and each cell is held against
its left neighbour. Here that gives two answers, brighter or not and darker or not, with a step
between them, so that noise in an even part of a frame decides nothing; 128 in all.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.frames import Frame

Layout = NDArray[np.bool_]

BITS = 128
STEP = 2  # gray levels of 255: closer cells count as equal
# Re-encoding (JPEG quality 50) and 10 % more light change at most 6 answers in 95 of 100 photos;
# no two of 300 photos of different things, nor of 1,000 pictures of 32 x 32, differ in so few.
NEAR = 6
# Levels of the mean red, green or blue: the same place by day and by night are two frames.
SHADE = 24


def layout(frame: Frame) -> Layout:
    """The layout [128] of an RGB frame uint8 [H, W, 3]; all False where the frame is even."""
    gray = Image.fromarray(frame).convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(gray, dtype=np.int16)
    change = cells[:, 1:] - cells[:, :-1]
    return np.concatenate([(change > STEP).ravel(), (change < -STEP).ravel()])


def distances(layouts: Layout, one: Layout) -> NDArray[np.int64]:
    """In how many answers each of `layouts` [N, 128] differs from `one` [128]."""
    return np.asarray((layouts != one).sum(axis=1), dtype=np.int64)


class Distinct:
    """The frames so far, at most `most`, no two of which are near-duplicates.

    Near-duplicates differ in at most NEAR answers, and in no mean colour by over SHADE levels.
    """

    def __init__(self, most: int) -> None:
        self._layouts = np.empty((most, BITS), dtype=np.bool_)
        self._shades = np.empty((most, 3))
        self._number = 0

    def add(self, frame: Frame) -> bool:
        """Takes in the frame uint8 [H, W, 3], unless it is a near-duplicate: then False."""
        number, own, shade = self._number, layout(frame), frame.mean(axis=(0, 1))
        near = distances(self._layouts[:number], own) <= NEAR
        near &= np.abs(self._shades[:number] - shade).max(axis=1) <= SHADE
        if near.any():
            return False
        self._layouts[number], self._shades[number] = own, shade
        self._number += 1
        return True
