"""Embeds the pictures of a data set: decoded in threads, encoded in batches, in little memory."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess

from .metrics import Floats
from .pairs import Bad, Pairs

BATCH = 64
AHEAD = 2 * BATCH  # pictures in hand: the next batch is decoded while one is encoded


class Pictures:
    """The pictures of some files as a model sees them, in order, or what is wrong with one. The
    first ones, up to `keep` bytes, stay in memory for the next time."""

    def __init__(self, files: Sequence[Path], spec: ImageSpec, keep: int = 0) -> None:
        self._files, self._spec = files, spec
        self._most = keep // (3 * spec.height * spec.width)
        self._kept: list[Frame | FrameError] = []

    def __iter__(self) -> Iterator[Frame | FrameError]:
        yield from self._kept
        for picture in _decoded(self._files[len(self._kept) :], self._spec):
            if len(self._kept) < self._most:
                self._kept.append(picture)
            yield picture


def embed_pictures(
    pairs: Pairs,
    pictures: Iterable[Frame | FrameError],
    encode: Callable[[Frame], Floats],
    advance: Callable[[int], None] | None = None,
) -> tuple[Pairs, Floats]:
    """Embeds the pairs' pictures; returns the pairs whose picture could be read, and unit rows
    [N, D].

    `encode` takes uint8 RGB [N, H, W, 3] and gives unit rows; `advance` is told how many pictures
    are done. What cannot be read is left out and listed in `bad`. Raises DataError where none can.
    """
    good: list[int] = []
    bad: list[Bad] = []
    batch: list[Frame] = []
    parts: list[Floats] = []
    reason = ""
    for row, picture in enumerate(pictures):
        if isinstance(picture, FrameError):
            reason = reason or str(picture)
            bad.append(Bad(str(pairs.files[row]), "unreadable picture"))
        else:
            good.append(row)
            batch.append(picture)
        if batch and (len(batch) == BATCH or row == len(pairs) - 1):
            parts.append(encode(np.stack(batch)))
            batch = []
        if advance:
            advance(1)
    if not good:
        raise DataError(f"none of the {len(pairs)} pictures can be used; first: {reason}")
    kept = pairs.keep(good) if bad else pairs
    return dataclasses.replace(kept, bad=(*pairs.bad, *bad)), np.concatenate(parts)


def _decoded(files: Sequence[Path], spec: ImageSpec) -> Iterator[Frame | FrameError]:
    """The pictures in order, or what is wrong with them. Pillow lets go of the interpreter lock."""
    ahead: collections.deque[Future[Frame | FrameError]] = collections.deque()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for file in files:
            ahead.append(pool.submit(_read, file, spec))
            if len(ahead) == AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(file: Path, spec: ImageSpec) -> Frame | FrameError:
    try:
        return preprocess(file, spec)
    except FrameError as error:
        return error
