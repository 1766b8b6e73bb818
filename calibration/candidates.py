"""What frames could be drawn: the pictures and videos of folders, tables and single files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from runtime.errors import DataError, FrameError
from runtime.frames import Frame
from runtime.manifest import ImageSpec
from runtime.preprocess import preprocess
from runtime.sources import PICTURES, VIDEOS, check_name, frames_of

from .frame_set import lot, read_frames, write_frame
from .pairs import Bad, check_bad, read_pairs

TABLES = (".csv", ".tsv", ".tar", ".tgz", ".gz")  # of archives `read_pairs` says what they are for
MAX_LENGTH = 1e9  # frames: a header that says more is wrong


class Listed(NamedTuple):
    """A picture or video file of source number `source`. `inside` is its path within the source,
    the same on every machine."""

    path: Path
    inside: str
    source: int
    label: str | None


@dataclass(frozen=True)
class Candidate:
    """A frame that could be drawn: a picture's `file`, or number `place` on the `Shelf`."""

    name: str
    source: int
    label: str | None
    lot: bytes
    file: Path
    place: int | None = None


class Lost:
    """What could not be used, and in full what is wrong with the first."""

    def __init__(self) -> None:
        self.bad: list[Bad] = []
        self.first = ""

    def add(self, name: str, reason: str, fault: str) -> None:
        """Notes a picture or video."""
        self.bad.append(Bad(name, reason))
        self.first = self.first or fault


def list_files(sources: Sequence[Path], max_bad: float) -> tuple[list[Listed], list[Bad]]:
    """The pictures and videos of the sources, and the rows of tables that were left out.

    Labelled are tables with `file,label`, and folders of two or more class folders with all
    pictures in them. Pictures given one by one count as one source. Raises DataError for a source
    that is missing, empty or cannot be used, and where of a table's rows more than the share
    `max_bad` is bad.
    """
    if not sources:
        raise DataError("no frames to calibrate on: give folders, tables, pictures or videos")
    listed: list[Listed] = []
    bad: list[Bad] = []
    single: int | None = None
    for number, path in enumerate(Path(source).expanduser() for source in sources):
        if os.path.isdir(path):
            listed += _of_folder(path, number)
        elif path.suffix.lower() in TABLES:
            listed += _of_table(path, number, max_bad, bad)
        elif path.suffix.lower() in VIDEOS:
            listed.append(_of_file(path, number))
        else:
            single = number if single is None else single
            listed.append(_of_file(path, single))
    return listed, bad


def _of_file(path: Path, number: int) -> Listed:
    if not os.path.exists(path):
        raise DataError(f"there is no file or folder {path}")
    if not os.path.isfile(path):
        raise DataError(f"{path} is neither a file nor a folder; record a camera to a video first")
    return Listed(path, path.name, number, None)


def _of_table(path: Path, number: int, max_bad: float, bad: list[Bad]) -> list[Listed]:
    pairs = read_pairs(path, ["{}"])
    check_bad(pairs.bad, len(pairs) + len(pairs.bad), max_bad, path)
    bad += pairs.bad
    labels = [pairs.classes[t] for t in pairs.targets] if pairs.targets else [None] * len(pairs)
    return [
        Listed(file, os.path.relpath(file, path.parent), number, label)
        for file, label in zip(pairs.files, labels, strict=True)
    ]


def _of_folder(folder: Path, number: int) -> list[Listed]:
    try:
        files = list(_walk(folder))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error}") from error
    if not files:
        raise DataError(f"the folder {folder} holds no pictures and no videos")
    inside = [os.path.relpath(file, folder) for file in files]
    labels: Sequence[str | None] = [None] * len(files)
    if _has_classes(files, inside):
        pairs = read_pairs(folder, ["{}"])  # for its rules of what a label is
        files, targets = list(pairs.files), pairs.targets or ()
        labels = [pairs.classes[t] for t in targets]
        inside = [os.path.relpath(file, folder) for file in files]
    return [Listed(f, i, number, c) for f, i, c in zip(files, inside, labels, strict=True)]


def _has_classes(files: Sequence[Path], inside: Sequence[str]) -> bool:
    """Whether all are <class>/<picture>, of at least two classes."""
    parts = [Path(name).parts for name in inside]
    pictures = all(file.suffix.lower() in PICTURES for file in files)
    return pictures and {len(p) for p in parts} == {2} and len({p[0] for p in parts}) > 1


def _walk(folder: Path) -> Iterator[Path]:
    """The pictures and videos in a folder and those within, but for what tools hide in it."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        real = os.path.realpath(root)  # a link may lead back up
        folders[:] = [] if real in seen else sorted(n for n in folders if not n.startswith("."))
        names = [] if real in seen else sorted(n for n in names if not n.startswith("."))
        seen.add(real)
        for path in (Path(root, name) for name in names):
            if path.suffix.lower() in PICTURES | VIDEOS and path.is_file():
                yield path


def _fail(error: OSError) -> None:
    raise error


class Shelf:
    """Frames of videos in a file, so that a video is decoded once and none of it is held."""

    def __init__(self, stream: IO[bytes], spec: ImageSpec) -> None:
        self._stream, self._spec = stream, spec
        self._free: list[int] = []
        self._number = 0

    def take(self, place: int) -> Frame:
        """The frame [H, W, 3] at a place."""
        (frame,) = read_frames(self._stream, [place], self._spec)
        return np.asarray(frame, dtype=np.uint8)

    def put(self, frame: Frame) -> int:
        """Writes a frame [H, W, 3] where there is room; returns its place."""
        if not self._free:
            self._free.append(self._number)
            self._number += 1
        place = self._free.pop()
        write_frame(self._stream, place, frame)
        return place

    def spread(self, video: Path, most: int) -> tuple[dict[int, int], str]:
        """Puts at most `most` frames of a video, at even distances; returns their numbers in the
        video with their places, and what is wrong with the video, if anything.

        Where it has more frames than its header says, every second one is given up again.
        """
        kept = dict[int, int]()
        try:
            step = every = max(1, -(-_length(video) // most))
            for turn, (_, frame, color) in enumerate(frames_of(video, every)):
                number = turn * every
                if number % step == 0 and len(kept) == most:
                    step *= 2
                    self._free += [kept.pop(n) for n in list(kept) if n % step]
                if number % step == 0:
                    kept[number] = self.put(preprocess(frame, self._spec, color))
        except FrameError as error:
            return kept, str(error)
        return kept, ""


def _length(video: Path) -> int:
    """How many frames a video's header says it has; 0 where it does not say. Raises FrameError."""
    check_name(video)
    try:
        import cv2
    except ModuleNotFoundError:
        return 0  # `frames_of` says what is missing
    capture = cv2.VideoCapture(str(video))
    try:
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        return int(frames) if 0 < frames < MAX_LENGTH else 0
    finally:
        capture.release()


def find_candidates(
    listed: Sequence[Listed], shelf: Shelf, each: int, seed: int, lost: Lost
) -> list[Candidate]:
    """All frames that could be drawn, at most `each` of a video, and the lot that each has for
    this seed. What can be decoded of a damaged video is among them, and the damage in `lost`."""
    found: list[Candidate] = []
    for path, inside, source, label in listed:
        name, what = shown(path), (source, inside.replace(os.sep, "/"))
        if path.suffix.lower() not in VIDEOS:
            found.append(Candidate(name, source, label, lot(seed, *what), path))
            continue
        kept, fault = shelf.spread(path, each)
        if fault:
            lost.add(name, "damaged video", fault)
        found += [
            Candidate(f"{name}, frame {number}", source, label, lot(seed, *what, number), path, at)
            for number, at in kept.items()
        ]
    return found


def shown(path: Path) -> str:
    """A path as valid Unicode, whatever bytes the file system has."""
    return os.fsencode(path).decode(errors="replace")
