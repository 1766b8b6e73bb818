"""Cameras that a measurement is made with: frames kept in memory, or a clip again and again."""

import random
import threading
import time
from collections.abc import Sequence

from .capture import Capture, open_capture
from .errors import FrameError
from .frames import Color, Frame
from .source_uri import SourceSpec


class _Paced:
    """A camera whose frames are due by the clock, and have no place in a file."""

    ended = ""
    came: float | None = None
    missed = 0

    def __init__(self, fps: float) -> None:
        self.fps: float | None = fps
        self._clock = _Clock(fps)

    def position(self) -> float | None:
        """None."""
        return None

    def interrupt(self) -> None:
        """Ends the wait for the next frame."""
        self._clock.stop()

    def close(self) -> None:
        """No more frames come."""
        self._clock.stop()


class MadeCamera(_Paced):
    """Gives frames of memory in turn, `fps` a second by the clock, from a random moment on."""

    reader = "memory"

    def __init__(self, frames: Sequence[tuple[Frame, Color]], fps: float) -> None:
        super().__init__(fps)
        self._frames, self.color = frames, frames[0][1]
        self._count = 0

    def grab(self) -> bool:
        """Waits until the next frame is due."""
        self._count += 1
        return self._clock.wait()

    def retrieve(self) -> Frame:
        """That frame."""
        return self._frames[self._count % len(self._frames)][0]


class ClipCamera(_Paced):
    """Plays a video again and again as fast as it was filmed, or `fps` frames a second: each is
    decoded. Raises FrameError where it cannot be read."""

    def __init__(self, clip: SourceSpec, fps: float | None) -> None:
        self._clip, self._capture = clip, open_capture(clip)
        super().__init__(fps or self._capture.fps or 25.0)
        self.reader, self.color = self._capture.reader, self._capture.color

    def grab(self) -> bool:
        """Waits until the next frame is due; at the clip's end it begins anew."""
        return self._clock.wait() and (self._capture.grab() or self._again().grab())

    def _again(self) -> Capture:
        self._capture.close()
        self._capture = open_capture(self._clip)
        return self._capture

    def retrieve(self) -> Frame:
        """That frame, decoded."""
        return self._capture.retrieve()

    def close(self) -> None:
        """Lets go of the clip."""
        super().close()
        self._capture.close()


class _Clock:
    """When frames are due. One that is more than a frame late is not made up for."""

    def __init__(self, fps: float) -> None:
        self._apart = 1 / fps
        self._due = time.monotonic() + random.random() * self._apart
        self._stopped = threading.Event()

    def wait(self) -> bool:
        """Waits for the next frame; False where `stop` was called."""
        now = time.monotonic()
        if now - self._due > self._apart:
            self._due = now
        stopped = self._stopped.wait(max(0.0, self._due - now))
        self._due += self._apart
        return not stopped

    def stop(self) -> None:
        self._stopped.set()


def check_clip(clip: SourceSpec) -> tuple[int, int, float]:
    """Width, height and frames a second of a video. Raises FrameError where it cannot be read."""
    capture = open_capture(clip)
    try:
        if not capture.grab():
            raise FrameError(f"{clip.shown} has no frame")
        height, width = capture.retrieve().shape[:2]
        return width, height, capture.fps or 25.0
    finally:
        capture.close()
