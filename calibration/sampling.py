"""Draws the frames on which an INT8 encoder is calibrated and judged.

From folders, tables, pictures and videos: at random, but evenly over the sources and, within a
source, over its labels; no two frames that are near-duplicates. The same seed draws the same
frames on every machine, in whatever order a disk lists its files.
"""

import collections
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.sources import VIDEOS

from .candidates import Candidate, Listed, Lost, Shelf, find_candidates, list_files, shown
from .embed import Pictures
from .frame_set import FrameSet, Origin, lot, new_file, write_frame
from .likeness import Distinct
from .pairs import check_bad

IN_HAND = 32  # frames in memory at a time
FEWEST = 8  # candidates of a video, however many videos there are


def sample(
    sources: Sequence[Path],
    spec: ImageSpec,
    most: int,
    seed: int,
    store: Path,
    max_bad: float = 0.01,
    per_video: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> FrameSet:
    """Draws at most `most` frames and writes them to the file `store`, preprocessed as `spec` says.

    `sources` are folders (of pictures and videos, or <class>/<picture>), CSV or TSV tables (see
    `read_pairs`), pictures and videos. Of a video `per_video` frames at even distances can be
    drawn; by default twice its share of `most`, and at least 8. `advance` is told of each frame
    found. In memory are 32 frames at a time, however many are drawn.

    Raises DataError for sources that cannot be used, where more than the share `max_bad` of what
    was drawn cannot be read, and where the disk is full; then `store` is as it was.
    """
    if most < 1:
        raise DataError(f"at least 1 frame has to be drawn to calibrate on, not {most}")
    if per_video is not None and per_video < 1:
        raise DataError(f"at least 1 frame of a video has to be a candidate, not {per_video}")
    store = store.expanduser()
    listed, bad = list_files(sources, max_bad)
    with new_file(store) as stream, tempfile.TemporaryFile(dir=store.parent) as room:
        lost, shelf = Lost(), Shelf(room, spec)
        each = per_video or _each(listed, most)
        candidates = find_candidates(listed, shelf, each, seed, lost)
        found = _Found(stream, min(most, len(candidates)), lost)
        draw = Draw(candidates, seed)
        while turn := draw.take(most - len(found.used)):
            for candidate, frame in _frames(turn, shelf, spec):
                if not found.add(candidate, frame):
                    draw.refuse(candidate)
                elif advance:
                    advance(1)
        names = tuple(shown(Path(source)) for source in sources)
        found.check(max_bad, ", ".join(names))
    origin = Origin(names, seed, most, len(candidates), found.near, (*bad, *lost.bad))
    return _frame_set(store, spec, found, origin, _classes(listed))


def _each(listed: Sequence[Listed], most: int) -> int:
    videos = sum(item.path.suffix.lower() in VIDEOS for item in listed)
    return max(FEWEST, -(-2 * most // max(videos, 1)))


def _classes(listed: Sequence[Listed]) -> tuple[str, ...]:
    """The labels in order; none unless everything has one."""
    labels = {item.label for item in listed}
    return () if None in labels else tuple(sorted(label for label in labels if label is not None))


def _frames(
    turn: Sequence[Candidate], shelf: Shelf, spec: ImageSpec
) -> Iterator[tuple[Candidate, Frame | FrameError]]:
    """Each candidate with its frame [H, W, 3], or with what is wrong with it."""
    for at in range(0, len(turn), IN_HAND):
        part = turn[at : at + IN_HAND]
        pictures = iter(Pictures([c.file for c in part if c.place is None], spec))
        for candidate in part:
            place = candidate.place
            yield candidate, next(pictures) if place is None else shelf.take(place)


class Draw:
    """Whose turn it is: evenly over sources, within a source over labels, in these by lot."""

    def __init__(self, candidates: Sequence[Candidate], seed: int) -> None:
        left = collections.defaultdict[tuple[int, str | None], list[Candidate]](list)
        for candidate in sorted(candidates, key=lambda c: (c.lot, c.name), reverse=True):
            left[candidate.source, candidate.label].append(candidate)
        self._left = {key: left[key] for key in sorted(left, key=lambda key: lot(seed, *key))}
        self._of_source = collections.Counter[int]()
        self._of_label = collections.Counter[tuple[int, str | None]]()

    def take(self, most: int) -> list[Candidate]:
        """The next candidates, at most `most`; none when all had their turn."""
        turn: list[Candidate] = []
        while self._left and len(turn) < most:
            key = min(self._left, key=lambda key: (self._of_source[key[0]], self._of_label[key]))
            turn.append(self._left[key].pop())
            self._count(turn[-1], 1)
            if not self._left[key]:
                del self._left[key]
        return turn

    def refuse(self, candidate: Candidate) -> None:
        """Gives the turn of a candidate that is not used back to its source and label."""
        self._count(candidate, -1)

    def _count(self, candidate: Candidate, number: int) -> None:
        self._of_source[candidate.source] += number
        self._of_label[candidate.source, candidate.label] += number


class _Found:
    """The candidates whose frames are in the store, and what became of the others."""

    def __init__(self, stream: IO[bytes], most: int, lost: Lost) -> None:
        self._stream, self._lost = stream, lost
        self._distinct = Distinct(most)
        self.used: list[Candidate] = []
        self.hashes: list[str] = []
        self.near = 0

    def add(self, candidate: Candidate, frame: Frame | FrameError) -> bool:
        """Writes the frame, unless it cannot be read or is a near-duplicate: then False."""
        if isinstance(frame, FrameError):
            self._lost.add(candidate.name, "unreadable picture", str(frame))
            return False
        if not self._distinct.add(frame):
            self.near += 1
            return False
        write_frame(self._stream, len(self.used), frame)
        self.used.append(candidate)
        self.hashes.append(hashlib.sha256(frame.tobytes()).hexdigest())
        return True

    def check(self, max_bad: float, where: str) -> None:
        """Raises DataError where nothing, or too little of what was tried, can be used."""
        bad = self._lost.bad
        if not self.used:
            raise DataError(f"no frame of {where} can be used; first: {self._lost.first}")
        check_bad(bad, len(bad) + self.near + len(self.used), max_bad, where)


def _frame_set(
    store: Path, spec: ImageSpec, found: _Found, origin: Origin, classes: tuple[str, ...]
) -> FrameSet:
    index: dict[str | None, int] = {label: i for i, label in enumerate(classes)}
    return FrameSet(
        store,
        spec,
        places=tuple(range(len(found.used))),
        names=tuple(candidate.name for candidate in found.used),
        sha256=tuple(found.hashes),
        sources=tuple(candidate.source for candidate in found.used),
        origin=origin,
        classes=classes,
        targets=tuple(index[candidate.label] for candidate in found.used) if classes else None,
    )
