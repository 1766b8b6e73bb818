"""Cameras, addresses, pipelines and videos with OpenCV."""

import math
import time
from typing import Any

import numpy as np

from .errors import DataError, FrameError
from .frames import Color, Frame
from .opencv import opencv
from .rtsp_answer import why_closed
from .source_uri import SourceSpec

CATCH_UP = 2.0  # seconds at most
PAUSE = 0.5  # seconds between two frames, where those before came at least twice as fast


def can_read(spec: SourceSpec) -> bool:
    """Whether there is an OpenCV with what this kind of source needs."""
    cv2 = opencv()
    return not isinstance(cv2, ImportError) and _backend(cv2, spec) is not None


def _backend(cv2: Any, spec: SourceSpec) -> int | None:
    """One by name: the search for one tries readers that print the address, password and all."""
    wanted = {
        "v4l2": [cv2.CAP_V4L2],
        "csi": [cv2.CAP_GSTREAMER],
        "gst": [cv2.CAP_GSTREAMER],
    }.get(spec.kind, [cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER])
    return next((one for one in wanted if cv2.videoio_registry.hasBackend(one)), None)


class OpenCvCapture:
    """An open cv2.VideoCapture."""

    color: Color = "bgr"
    came: float | None = None

    def __init__(self, spec: SourceSpec, timeout: float) -> None:
        cv2 = self._cv2 = opencv()
        self._spec = spec
        backend = _backend(cv2, spec)
        self._capture = cv2.VideoCapture(_address(spec), backend, _parameters(cv2, spec, timeout))
        if not self._capture.isOpened():
            self._capture.release()
            asked = spec.kind == "rtsp"
            why = why_closed(spec, timeout / 10) if asked else _WHY_CLOSED[spec.kind]
            raise FrameError(f"{spec.shown} {why}")
        if spec.kind == "v4l2":
            self._set_up(spec)
        if spec.kind == "http" and self._capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0:
            self._capture.release()
            raise DataError(f"{spec.shown} is a file, no camera: download it and name the file")
        self.reader = f"OpenCV {cv2.__version__} ({self._capture.getBackendName()})"
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps: float | None = rate if 0 < rate <= 1000 else None
        self.ended = ""
        self._limit = 0.95 * timeout if spec.kind in ("rtsp", "http") else math.inf
        self._took = 0.0
        self._count = self.missed = 0
        self._position = 0.0

    def _set_up(self, spec: SourceSpec) -> None:
        """Sets what a camera was asked for, and looks whether it does that."""
        cv2, asked = self._cv2, spec.options
        if asked.format:
            self._capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*asked.format.upper()))
        for value, option in (
            (asked.width, cv2.CAP_PROP_FRAME_WIDTH),
            (asked.height, cv2.CAP_PROP_FRAME_HEIGHT),
            (asked.fps, cv2.CAP_PROP_FPS),
        ):
            if value:
                self._capture.set(option, value)
        width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if (asked.width or width, asked.height or height) != (width, height):
            self._capture.release()
            raise DataError(
                f"{spec.shown} gives {width} x {height} pixels, not what was asked for; "
                "v4l2-ctl --list-formats-ext lists what it can"
            )

    def grab(self) -> bool:
        before = self._count
        first = self._spec.kind == "rtsp" and not before
        if self._caught_up() if first else self._grab_in_time():
            self.missed = self._count - before - 1
            return True
        self.ended = self.ended or self._why_ended()
        return False

    def _grab_in_time(self) -> bool:
        """Grabs a frame. FFmpeg's parser of H.264 holds one back until the next begins: after a
        pause it is old, and where none came in time it is handed out all the same."""
        good, took = self._timed_grab()
        if took > self._limit:
            self.ended = "no answer in time"
            return False
        paused = took > PAUSE and self._took < PAUSE / 2
        self._took = took
        return self._grab_in_time() if good and paused and self._spec.kind == "rtsp" else good

    def _timed_grab(self) -> tuple[bool, float]:
        start = time.monotonic()
        good = bool(self._capture.grab())
        self._count += good
        return good, time.monotonic() - start

    def _caught_up(self) -> bool:
        """Grabs until frames have to be waited for. Before them come, all at once, those of the
        second for which FFmpeg looks at a stream before it has opened it."""
        apart, waited = 1 / (self.fps or 25), 0.0
        end = time.monotonic() + CATCH_UP
        while waited < apart and time.monotonic() < end:
            if not self._grab_in_time():
                return False
            # Twice in a row: one alone may have been hard to decode.
            waited = waited + self._took if self._took > apart / 2 else 0.0
        return True

    def _why_ended(self) -> str:
        if self._spec.live:
            return "it gives no more frames"
        expected = int(self._capture.get(self._cv2.CAP_PROP_FRAME_COUNT))
        if self._count < expected * 0.95 - 1:  # containers count a little wrong
            return f"it is damaged or cut off: it ends after {self._count} of {expected} frames"
        return ""

    def retrieve(self) -> Frame:
        good, frame = self._capture.retrieve()
        if not good or frame is None:
            raise FrameError(f"frame {self._count} of {self._spec.shown} cannot be decoded")
        return np.asarray(frame, dtype=np.uint8)

    def position(self) -> float | None:
        if self._spec.live:
            return None
        told = float(self._capture.get(self._cv2.CAP_PROP_POS_MSEC)) / 1000
        if self._count > 1 and not self._position < told < self._position + 3600:
            told = self._position + 1 / (self.fps or 25)  # files without times of their own
        self._position = told
        return told

    def interrupt(self) -> None:
        pass  # OpenCV's captures are not to be touched by two threads

    def close(self) -> None:
        self._capture.release()


_WHY_CLOSED = {
    "v4l2": "cannot be opened: is it plugged in, used by another program, or not permitted "
    "(group video)?",
    "http": "does not answer, refuses the login, or has no video",
    "csi": "cannot be opened: is it connected, and nvargus-daemon running?",
    "gst": "cannot be started: try the pipeline with gst-launch-1.0",
    "video": "is not a video that OpenCV can read, or it is empty",
}


def _address(spec: SourceSpec) -> str | int:
    if spec.kind == "csi":
        return csi_pipeline(spec)
    return int(spec.address) if spec.address.isdecimal() else spec.address


def _parameters(cv2: Any, spec: SourceSpec, timeout: float) -> list[int]:
    if spec.kind not in ("rtsp", "http"):
        return []
    limit = max(1, round(timeout * 1000))
    parameters = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    # Each further thread of a decoder holds back one more frame.
    return [*parameters, cv2.CAP_PROP_N_THREADS, 1]


def csi_pipeline(spec: SourceSpec) -> str:
    """The GStreamer pipeline of a Jetson's CSI camera, which gives the newest frame alone."""
    asked = spec.options
    width, height, fps = asked.width or 1280, asked.height or 720, round(asked.fps or 30)
    return (
        f"nvarguscamerasrc sensor-id={spec.address} ! "
        f"video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1 ! "
        f"nvvidconv flip-method={asked.flip} ! video/x-raw,format=BGRx ! videoconvert ! "
        "video/x-raw,format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )
