"""Frames as JPEGs for those who watch: each once for a width, and only where somebody asks."""

import asyncio
import io
from bisect import bisect_left

import numpy as np
from PIL import Image

from ..stream import Seen
from ..thumbnail import bgr_of
from .hub import Newest
from .pool import Pool

WIDTHS = (160, 320, 480, 640, 960, 1280, 1920)
"""What is asked for is rounded up to one of these, so that clients share pictures."""
WIDTH = 640
QUALITY = 80
Key = tuple[int, int]


class Pictures:
    """The newest pictures of each source. One thread makes them, so that they take no more than
    one core from the cameras, however many watch."""

    def __init__(self) -> None:
        self._pool = Pool("pictures", 1, 64)
        self._made: dict[Key, tuple[int, asyncio.Future[bytes]]] = {}

    async def newest(self, source: Newest, width: int) -> tuple[int, bytes] | None:
        """The version and JPEG of a source's newest frame; None before the first. Raises Busy."""
        version, seen = source.version, source.seen  # in this order: seen is never older
        if seen is None:
            return None
        key = source.index, rounded(width)
        made = self._made.get(key)
        if made is None or (made[0] < version and made[1].done()):
            task = asyncio.ensure_future(self._pool.run(lambda: encode(seen, key[1])))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            made = self._made[key] = version, task
        return made[0], await asyncio.shield(made[1])

    def close(self) -> None:
        """Lets go of the thread."""
        self._pool.close()


def rounded(width: int) -> int:
    """The width of `WIDTHS` that is not smaller, or the greatest."""
    return WIDTHS[min(bisect_left(WIDTHS, width), len(WIDTHS) - 1)]


def encode(seen: Seen, width: int) -> bytes:
    """A JPEG of a frame, at most so many pixels wide, and twice as high."""
    bgr = bgr_of(seen.frame, seen.color)
    step = max(1, bgr.shape[1] // (4 * width))  # what is far too large is thinned out first
    picture = Image.fromarray(np.ascontiguousarray(bgr[::step, ::step, ::-1]))
    picture.thumbnail((width, 2 * width), Image.Resampling.BILINEAR)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
