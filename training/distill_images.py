"""What a student learns from: pictures, with captions where they have some, never with labels."""

import dataclasses
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import Progress

from calibration.candidates import TABLES, list_files
from calibration.pairs import Bad, Pairs, check_bad, read_pairs
from runtime.errors import DataError
from runtime.sources import VIDEOS

from .embedding_store import DIGEST, Digests
from .video_frames import frames_of_video

_AT_ONCE = 4096  # files


def open_images(
    sources: Sequence[Path], fps: float, room: Path, max_bad: float, progress: Progress
) -> Pairs:
    """All pictures of the sources: folders (with or without classes), tables, pictures, videos.

    Frames of videos are written into `room`. Labels are left out; captions of a table stay. A
    picture without any has an empty tuple of them. Raises DataError for what cannot be used.
    """
    texts: dict[str, int] = {}
    images: dict[Path, dict[int, None]] = {}
    bad: list[Bad] = []
    task = progress.add_task("Listing pictures", total=None)
    for source in (Path(s).expanduser() for s in sources):
        files, captions = _read(source, fps, room, max_bad, bad)
        for file, own in zip(files, captions, strict=True):
            known = images.setdefault(file, {})
            known |= {texts.setdefault(text, len(texts)): None for text in own}
    progress.remove_task(task)
    if not images:
        raise DataError("--images: there are no pictures")
    return Pairs(tuple(images), tuple(map(tuple, images.values())), tuple(texts), bad=tuple(bad))


def _read(
    source: Path, fps: float, room: Path, max_bad: float, bad: list[Bad]
) -> tuple[list[Path], list[list[str]]]:
    """The picture files of a source, and each one's captions."""
    if source.suffix.lower() in TABLES and not source.is_dir():
        pairs = read_pairs(source, ["{}"])
        check_bad(pairs.bad, len(pairs) + len(pairs.bad), max_bad, source)
        bad += pairs.bad
        if pairs.targets is None:
            return list(pairs.files), [[pairs.texts[c] for c in own] for own in pairs.captions]
        return list(pairs.files), [[] for _ in pairs.files]
    files: list[Path] = []
    for item in list_files([source], max_bad)[0]:
        if item.path.suffix.lower() not in VIDEOS:
            files.append(item.path)
            continue
        frames, fault = frames_of_video(item.path, fps, room)
        files += frames
        if fault:
            bad.append(Bad(str(item.path), "damaged video"))
    return files, [[] for _ in files]


def digests(files: Sequence[Path], progress: Progress) -> tuple[Digests, list[int]]:
    """The hash of each file's content, uint8 [N, 16], and the rows of files that can be read."""
    task = progress.add_task("Hashing pictures", total=len(files))
    made = np.zeros((len(files), DIGEST), np.uint8)
    good = []
    with ThreadPoolExecutor() as pool:
        for begin in range(0, len(files), _AT_ONCE):  # what a pool is given it holds
            for row, found in enumerate(pool.map(_digest, files[begin : begin + _AT_ONCE]), begin):
                if found:
                    made[row] = np.frombuffer(found, np.uint8)
                    good.append(row)
                progress.advance(task)
    progress.remove_task(task)
    return made, good


def _digest(file: Path) -> bytes | None:
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=DIGEST).digest()
    except OSError:
        return None


def text_digests(texts: Sequence[str]) -> Digests:
    """The hash of each text, uint8 [N, 16]."""
    parts = [hashlib.blake2b(text.encode(), digest_size=DIGEST).digest() for text in texts]
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, DIGEST)


def left_out(pairs: Pairs, good: Sequence[int], reason: str) -> Pairs:
    """The pairs of the rows `good`; the others are listed as bad."""
    if len(good) == len(pairs):
        return pairs
    lost = sorted(set(range(len(pairs))) - set(good))
    bad = tuple(Bad(str(pairs.files[row]), reason) for row in lost)
    return dataclasses.replace(pairs.keep(good), bad=(*pairs.bad, *bad))
