"""One way to read every source: frame by frame, with OpenCV where it can, else with FFmpeg."""

import shutil
from pathlib import Path
from typing import Protocol

from .capture_opencv import OpenCvCapture, can_read
from .capture_pipe import FfmpegCapture, StdinCapture
from .errors import BackendUnavailable, FrameError
from .frames import Color, Frame, read_picture
from .opencv import opencv
from .source_uri import SourceSpec
from .sources import PICTURES


class Capture(Protocol):
    """An open source. One thread reads it; `interrupt` alone may be called by another."""

    reader: str
    """What reads it: OpenCV and its backend, FFmpeg, Pillow, ..."""
    color: Color
    fps: float | None
    """Frames a second as the source tells; None where it does not."""
    ended: str
    """Why there are no more frames; empty where they were all there."""
    came: float | None
    """When the frame that was grabbed came, as `time.monotonic`; None: when `grab` returned."""
    missed: int
    """How many older ones were passed over for it."""

    def grab(self) -> bool:
        """Waits for the next frame; False where there are no more."""

    def retrieve(self) -> Frame:
        """The pixels of the frame that was grabbed. Raises FrameError where they are broken."""

    def position(self) -> float | None:
        """Seconds of that frame from the start of a file; None of a live source."""

    def interrupt(self) -> None:
        """Makes a `grab` that hangs return, where that is possible."""

    def close(self) -> None:
        """Lets go of the device, connection or file."""


def open_capture(spec: SourceSpec, timeout: float = 8.0) -> Capture:
    """Opens a source; addresses are given up after `timeout` seconds without an answer.

    Raises FrameError where it gives no frames, DataError where it is not what was asked for,
    BackendUnavailable where nothing here can read it.
    """
    if spec.kind == "pictures":
        return PicturesCapture(spec)
    if spec.kind == "stdin":
        return StdinCapture(spec)
    if spec.kind == "http":
        from .capture_mjpeg import open_mjpeg  # with Python's whole HTTP

        if mjpeg := open_mjpeg(spec, timeout):
            return mjpeg
    if can_read(spec):
        return OpenCvCapture(spec, timeout)
    if spec.kind not in ("csi", "gst") and shutil.which("ffmpeg"):
        return FfmpegCapture(spec)
    raise BackendUnavailable(_missing(spec))


def _missing(spec: SourceSpec) -> str:
    if spec.kind in ("csi", "gst"):
        return (
            f"{spec.shown} needs an OpenCV with GStreamer, which those of pip lack: use the "
            "system's (on a Jetson apt install python3-opencv), or pipe raw frames: "
            "gst-launch-1.0 -q ... ! fdsink | edgeclip stream BUNDLE --source '-?width=W&height=H'"
        )
    there = opencv()
    what = f"OpenCV cannot be used ({there})" if isinstance(there, ImportError) else "OpenCV cannot"
    return (
        f"nothing here can read {spec.shown}: {what}, and there is no ffmpeg; "
        "pip install 'edgeclip[cpu]', or apt install ffmpeg"
    )


class PicturesCapture:
    """A picture, or those of a folder by name, one after the other."""

    reader = "Pillow"
    color: Color = "rgb"
    ended = ""
    came: float | None = None
    missed = 0

    def __init__(self, spec: SourceSpec) -> None:
        path = Path(spec.address)
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        self._files = [file for file in found if file.suffix.lower() in PICTURES]
        if not self._files:
            raise FrameError(f"the folder {path} holds no pictures")
        self._number = -1
        self.fps: float | None = None

    def grab(self) -> bool:
        self._number += 1
        return self._number < len(self._files)

    def retrieve(self) -> Frame:
        return read_picture(self._files[self._number])

    def position(self) -> float | None:
        return float(self._number)  # a picture a second

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass
