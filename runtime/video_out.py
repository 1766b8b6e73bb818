"""Writes frames as a video file, or as a folder of pictures."""

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import BackendUnavailable, DataError
from .folders import check_target
from .frames import Frame
from .opencv import opencv
from .sources import check_name
from .video_pipe import H264Writer, has_h264

# OpenCV's, where they are not written as H.264 by the command ffmpeg (.mp4).
CODECS = {".mp4": "mp4v", ".mkv": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
LONGEST = 10.0  # seconds without a frame; a longer pause is cut to this
MEASURED = 6  # frames, by which the speed of a video is found


class VideoOut:
    """A video file that shows each frame for as long as it was the newest.

    Frames may come at uneven times: they are repeated or left out so that the video runs at `fps`;
    None: as fast as its first frames came. It is written beside its place, which it takes in
    `close`; `discard` leaves nothing.
    """

    def __init__(self, path: str | Path, fps: float | None = None, overwrite: bool = False) -> None:
        self.path = check_video(path, overwrite)
        self._fps, self._overwrite = fps or 0.0, overwrite
        handle, name = tempfile.mkstemp(
            prefix=".new-", suffix=self.path.suffix.lower(), dir=self.path.parent
        )
        os.close(handle)
        self._beside = Path(name)
        self._writer: Any = None
        self._size, self._count = (0, 0), 0
        self._next = 0.0
        self._first: list[tuple[Frame, float]] = []
        self._last: tuple[Frame, float] | None = None

    def write(self, frame: Frame, time: float) -> None:
        """Adds a frame, uint8 BGR [H, W, 3], that was taken at `time` in seconds. One of another
        size than the first is fitted into its size."""
        if self._last is None:
            self._first.append((frame, time))
            if self._fps or len(self._first) == MEASURED:
                self._begin()
        else:
            self._add(frame, time)

    def close(self) -> Path | None:
        """Ends the video and puts it in its place; returns that, or None where no frame came."""
        if self._first:
            self._begin()
        if self._last is None:
            self.discard()
            return None
        frame, time = self._last
        self._repeat_until(frame, max(self._next, time) + 0.5 / self._fps)
        self._writer.release()
        self._check_whole()
        check_video(self.path, self._overwrite)
        self._beside.chmod(0o644)
        self._beside.replace(self.path)
        return self.path

    def discard(self) -> None:
        """Removes what was written."""
        if self._writer is not None:
            with contextlib.suppress(BackendUnavailable):
                self._writer.release()
        with contextlib.suppress(FileNotFoundError):
            self._beside.unlink()

    def _check_whole(self) -> None:
        """OpenCV writes on without a word where the disk is full. Raises DataError."""
        if isinstance(self._writer, H264Writer):  # which does tell
            return
        cv2, last = opencv(), max(0, int(self._count * 0.95) - 2)  # containers count a little wrong
        video = cv2.VideoCapture(str(self._beside), cv2.CAP_FFMPEG)
        whole = video.get(cv2.CAP_PROP_FRAME_COUNT) > last
        whole = whole and video.set(cv2.CAP_PROP_POS_FRAMES, last) and video.grab()
        video.release()
        if not whole:
            raise DataError(f"{self.path} cannot be written whole: is its disk full?")

    def _begin(self) -> None:
        """Opens the video, and writes the frames that waited until its speed was known."""
        times = [time for _, time in self._first]
        apart = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        self._fps = self._fps or (min(60.0, max(1.0, 1 / apart)) if apart > 0 else 25.0)
        self._open(self._first[0][0])
        self._next = times[0]
        for frame, time in self._first:
            self._add(frame, time)
        self._first = []

    def _add(self, frame: Frame, time: float) -> None:
        if self._last is not None:
            self._repeat_until(self._last[0], time)
        self._last = self._fitted(frame), time

    def _repeat_until(self, frame: Frame, time: float) -> None:
        """Writes a frame for each moment of the video before `time`."""
        self._next = max(self._next, time - LONGEST)
        while self._next < time - 1e-6:
            self._writer.write(frame)
            self._count += 1
            self._next += 1 / self._fps

    def _open(self, frame: Frame) -> None:
        height, width = frame.shape[:2]
        self._size = width - width % 2, height - height % 2  # what codecs want
        if self.path.suffix.lower() == ".mp4" and has_h264():
            self._writer = H264Writer(self._beside, self._fps, self._size, self.path.name)
            return
        cv2 = opencv()
        codec = CODECS[self.path.suffix.lower()]
        code = cv2.VideoWriter_fourcc(*codec)
        self._writer = cv2.VideoWriter(str(self._beside), code, self._fps, self._size)
        if not self._writer.isOpened():
            raise BackendUnavailable(
                f"OpenCV cannot write {self.path.name} here (codec {codec}): name a file that ends "
                f"in {', '.join(CODECS)}, or a folder for pictures"
            )

    def _fitted(self, frame: Frame) -> Frame:
        width, height = self._size
        if frame.shape[:2] == (height, width):
            return frame
        if frame.shape[0] - height in (0, 1) and frame.shape[1] - width in (0, 1):
            return np.ascontiguousarray(frame[:height, :width])
        scale = min(width / frame.shape[1], height / frame.shape[0])
        size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
        whole = np.zeros((height, width, 3), dtype=np.uint8)
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        part = whole[top : top + size[1], left : left + size[0]]
        part[...] = opencv().resize(frame, size, interpolation=opencv().INTER_AREA)
        return whole


class PicturesOut:
    """A folder of JPEG pictures, named by number; it may be there, but then is empty."""

    def __init__(self, folder: str | Path) -> None:
        self.path = check_target(folder, "000001.jpg", overwrite=False)
        self.path.mkdir(parents=True, exist_ok=True)
        self._count = 0

    def write(self, frame: Frame, time: float) -> None:
        """Adds a frame, uint8 BGR [H, W, 3]. Raises DataError."""
        self._count += 1
        place = self.path / f"{self._count:06d}.jpg"
        beside = place.with_name(f".new-{place.name}")
        content = io.BytesIO()  # Pillow itself does not see that a file is cut off
        Image.fromarray(np.ascontiguousarray(frame[..., ::-1])).save(content, "JPEG", quality=90)
        try:
            beside.write_bytes(content.getvalue())
            beside.replace(place)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise DataError(f"{place} cannot be written: {error.strerror or error}") from error

    def close(self) -> Path | None:
        """Returns the folder, or None where no frame came."""
        return self.path if self._count else None

    def discard(self) -> None:
        """Pictures are whole as they are: they stay."""


def check_out(path: Path, overwrite: bool) -> None:
    """Raises DataError and BackendUnavailable where `open_out` would."""
    if path.suffix:
        check_video(path, overwrite)
    else:
        check_target(path, "000001.jpg", overwrite=False)


def open_out(path: str | Path, overwrite: bool = False) -> VideoOut | PicturesOut:
    """A video where the name ends as one of `CODECS`, a folder of pictures where it has no ending.
    Raises DataError, and BackendUnavailable without OpenCV."""
    if Path(path).suffix:
        return VideoOut(path, overwrite=overwrite)
    return PicturesOut(path)


def note_of(path: Path) -> str:
    """What is to be known of a video before it is written; empty where there is nothing."""
    if path.suffix.lower() != ".mp4" or has_h264():
        return ""
    return (
        f"{path.name} will be MPEG-4 part 2, which browsers do not play: apt install ffmpeg for "
        "H.264, or name a .webm"
    )


def check_video(path: str | Path, overwrite: bool) -> Path:
    """Returns where a video can be written. Raises DataError and BackendUnavailable."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in CODECS:
        raise DataError(f"{path} is no video that is written; name one of {', '.join(CODECS)}")
    if isinstance(opencv(), ImportError):
        raise BackendUnavailable(
            "videos need OpenCV: pip install 'edgeclip[cpu]' (on a Jetson use the system's OpenCV)"
        )
    return check_file(path, overwrite)


def check_file(path: str | Path, overwrite: bool) -> Path:
    """Returns `path` where a file may be written there. Raises DataError and FrameError."""
    path = Path(path).expanduser()
    check_name(path)
    if not path.parent.is_dir():
        raise DataError(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already; name another file, or replace it with --force")
    return path
