"""Frames as a model sees them, in a file on disk: read in batches, however many there are."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from runtime.errors import DataError
from runtime.frames import Frame
from runtime.manifest import ImageSpec

from .pairs import Bad, count

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Origin:
    """Where frames came from, and how they were drawn: at most `most` of the `candidates`."""

    sources: tuple[str, ...]
    seed: int
    most: int
    candidates: int
    near_duplicates: int
    bad: tuple[Bad, ...]


@dataclass(frozen=True, eq=False)
class FrameSet:
    """Frames, uint8 RGB [H, W, 3] as `spec` says, one after the other in the file `store`.

    Frame i is the one number `places[i]` in the file; `names[i]` says what it is (a picture's
    path, or "clip.mp4, frame 120"), `sha256[i]` is the hash of its bytes, and it came from
    `origin.sources[sources[i]]`. `classes` is empty and `targets` None unless every source has
    labels.
    """

    store: Path
    spec: ImageSpec
    places: tuple[int, ...]
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    sources: tuple[int, ...]
    origin: Origin
    classes: tuple[str, ...] = ()
    targets: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"FrameSet({len(self)} frames of {', '.join(self.origin.sources)})"

    def batches(self, size: int, rows: Sequence[int] | None = None) -> Iterator[Frame]:
        """The frames in order, or those of `rows`, as uint8 [n, H, W, 3] with n at most `size`.

        A batch is read when it is asked for. Raises DataError where the file is gone or cut off.
        """
        if size < 1:
            raise DataError(f"a batch holds at least 1 frame, not {size}")
        wanted = range(len(self)) if rows is None else rows
        parts = (wanted[at : at + size] for at in range(0, len(wanted), size))
        return (self._read(part) for part in parts)

    def _read(self, rows: Sequence[int]) -> Frame:
        try:
            with self.store.open("rb") as stream:
                return read_frames(stream, [self.places[row] for row in rows], self.spec)
        except (OSError, EOFError) as error:
            raise DataError(
                f"the frames in {self.store} cannot be read: {error}; sample them again"
            ) from error

    def keep(self, rows: Sequence[int]) -> "FrameSet":
        """A view of only these frames, in this order."""
        targets = self.targets
        return dataclasses.replace(
            self,
            places=tuple(self.places[i] for i in rows),
            names=tuple(self.names[i] for i in rows),
            sha256=tuple(self.sha256[i] for i in rows),
            sources=tuple(self.sources[i] for i in rows),
            targets=None if targets is None else tuple(targets[i] for i in rows),
        )

    def split(self, share: float, seed: int) -> tuple["FrameSet", "FrameSet"]:
        """Two parts without a frame in common, `share` (in 0..1) of the frames in the first.

        Drawn at random, alike in labels and sources: of each label the first part has `share`, as
        near as whole frames allow. Each part has at least one frame. Raises DataError for fewer
        than 2 frames.
        """
        if not 0 < share < 1:
            raise DataError(f"frames are split at a share between 0 and 1, not {share:g}")
        if len(self) < 2:
            raise DataError(
                f"{len(self)} frame of {', '.join(self.origin.sources)} cannot be split in frames "
                "to calibrate on and frames to judge by: give at least 2 that are not alike"
            )
        first = min(max(round(len(self) * share), 1), len(self) - 1)
        parts: tuple[list[int], list[int]] = [], []
        for turn, row in enumerate(self._shuffled(seed)):  # each first/N-th step is the first's
            parts[(turn + 1) * first // len(self) == turn * first // len(self)].append(row)
        return self.keep(sorted(parts[0])), self.keep(sorted(parts[1]))

    def _shuffled(self, seed: int) -> list[int]:
        """The rows label by label, in these source by source, otherwise at random."""
        labels = self.targets or [0] * len(self)
        keys = [
            (lot(seed, label), lot(seed, label, source), lot(seed, digest))
            for label, source, digest in zip(labels, self.sources, self.sha256, strict=True)
        ]
        return sorted(range(len(self)), key=keys.__getitem__)

    def labels(self) -> list[str] | None:
        """The label of each frame, None where not all have one."""
        return None if self.targets is None else [self.classes[t] for t in self.targets]

    def manifest(self) -> dict[str, Any]:
        """What was used and how it was found, for JSON."""
        labels = self.labels()
        frames = [
            {"name": name, "sha256": digest} | ({"label": labels[i]} if labels else {})
            for i, (name, digest) in enumerate(zip(self.names, self.sha256, strict=True))
        ]
        return {
            "sources": list(self.origin.sources),
            "seed": self.origin.seed,
            "most": self.origin.most,
            "candidates": self.origin.candidates,
            "near_duplicates": self.origin.near_duplicates,
            "unreadable": sum(bad.items for bad in self.origin.bad),
            "reasons": count(self.origin.bad),
            "used": len(self),
            "spec": msgspec.to_builtins(self.spec),
            "frames": frames,
        }


def lot(seed: int, *what: object) -> bytes:
    """A number for `what`, as if drawn at random: the same on every machine, in any order."""
    return hashlib.blake2b(ascii((seed, *what)).encode(), digest_size=8).digest()


def write_frame(stream: IO[bytes], place: int, frame: Frame) -> None:
    """Writes one frame as number `place` of the file."""
    stream.seek(place * frame.nbytes)
    stream.write(frame.tobytes())


def read_frames(stream: IO[bytes], places: Sequence[int], spec: ImageSpec) -> Frame:
    """Reads frames [n, H, W, 3] by their numbers in the file. Raises EOFError where it ends
    before."""
    frames = np.empty((len(places), spec.height, spec.width, 3), dtype=np.uint8)
    for frame, place in zip(frames, places, strict=True):
        stream.seek(place * frame.nbytes)
        content = stream.read(frame.nbytes)
        if len(content) < frame.nbytes:
            raise EOFError(f"it ends before frame {place}")
        frame[:] = np.frombuffer(content, dtype=np.uint8).reshape(frame.shape)
    return frames


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file beside `path`, which takes its place when the block succeeds.

    When the block fails, the file goes and `path` is as it was. Raises DataError where the disk is
    full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".new-", dir=path.parent, delete=False) as stream:
            try:
                yield stream
                stream.flush()
                os.replace(stream.name, path)
            except BaseException:
                os.unlink(stream.name)
                raise
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"no space left on the disk of {path.parent}") from error
        raise
