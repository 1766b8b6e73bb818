"""Frames from files: pictures, folders of pictures, and videos."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import BackendUnavailable, FrameError
from .frames import Color, Frame, read_picture

PICTURES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv"}


def check_name(path: str | Path) -> None:
    """OpenCV crashes the process for a name that is not UTF-8. Raises FrameError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode(errors="replace").decode()
        raise FrameError(f"the name {shown!r} is not UTF-8: give it another") from None


def find_files(paths: list[Path]) -> list[Path]:
    """The files themselves, and the pictures and videos inside the folders, sorted.

    Raises FrameError for a path that does not exist, and a folder without any.
    """
    files: list[Path] = []
    for path in (given.expanduser() for given in paths):
        if os.path.isdir(path):
            found = sorted(p for p in path.rglob("*") if p.is_file())
            inside = [p for p in found if p.suffix.lower() in PICTURES | VIDEOS]
            if not inside:
                raise FrameError(f"the folder {path} holds no pictures and no videos")
            files += inside
        elif os.path.exists(path):
            files.append(path)
        else:
            raise FrameError(f"there is no file or folder {path}")
    return files


def frames_of(path: Path, every: int = 1) -> Iterator[tuple[str, Frame, Color]]:
    """Yields (name, frame, colour order): one for a picture, each `every`-th of a video.

    Raises FrameError where the file cannot be read.
    """
    if path.suffix.lower() in VIDEOS:
        yield from _video(path, every)
    else:
        yield str(path), read_picture(path), "rgb"


def _video(path: Path, every: int) -> Iterator[tuple[str, Frame, Color]]:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            "videos need OpenCV: pip install 'edgeclip[cpu]' (on a Jetson use the system's OpenCV)"
        ) from error
    check_name(path)
    capture = cv2.VideoCapture(str(path))
    try:
        number = 0
        while capture.grab():
            if number % every == 0:
                good, frame = capture.retrieve()
                if not good:
                    raise FrameError(f"{path}: frame {number} cannot be decoded")
                yield f"{path}#{number}", np.asarray(frame, dtype=np.uint8), "bgr"
            number += 1
        if number == 0:
            raise FrameError(f"{path} is not a video that OpenCV can read, or it is empty")
        expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if number < expected * 0.95 - 1:  # containers count a little wrong
            raise FrameError(f"{path} is damaged or cut off: it ends after {number} of {expected}")
    finally:
        capture.release()
