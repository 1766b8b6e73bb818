"""Stands for cameras and files: `Fakes` opens one after the other, each with its own fate."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.capture import Capture
from runtime.errors import FrameError
from runtime.frames import Color, Frame
from runtime.grabbed import Grabbed
from runtime.grabber import Grabber
from runtime.source_uri import SourceSpec

CAMERA = SourceSpec("rtsp", "rtsp://bob:geheim@door/stream")
FILE = SourceSpec("video", "video.mp4")


@dataclass
class Fake:
    """Gives `frames` frames, `fps` a second (None: at once), then ends, or hangs where that is
    said; the frames with the numbers `broken` cannot be decoded."""

    frames: int = 1_000_000
    fps: float | None = None
    hangs: bool = False
    broken: Sequence[int] = ()
    live: bool = True
    size: tuple[int, int] = (48, 64)
    reader: str = "fake"
    color: Color = "bgr"
    ended: str = ""
    came: float | None = None
    missed: int = 0
    count: int = 0
    closed: bool = False
    freed: threading.Event = field(default_factory=threading.Event)

    def grab(self) -> bool:
        if self.count >= self.frames:
            if self.hangs:
                self.freed.wait()
            return False
        if self.fps and self.live:
            time.sleep(1 / self.fps)
        self.count += 1
        return True

    def retrieve(self) -> Frame:
        if self.count - 1 in self.broken:
            raise FrameError(f"frame {self.count - 1} is broken")
        return np.full((*self.size, 3), (self.count - 1) % 256, dtype=np.uint8)

    def position(self) -> float | None:
        return None if self.live else (self.count - 1) / (self.fps or 25)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class Fakes:
    """`opens` of a grabber: each opening takes the next; an error is raised, and so is the lack."""

    def __init__(self, *captures: Fake | Exception) -> None:
        self._left = list(captures)
        self.opened = 0

    def __call__(self, spec: SourceSpec, timeout: float) -> Capture:
        self.opened += 1
        capture = self._left.pop(0) if self._left else FrameError("it is unplugged")
        if isinstance(capture, Exception):
            raise capture
        return capture


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until it is true, and no longer than that."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not come true"
        time.sleep(0.005)


def taken(grabber: Grabber, count: int) -> list[Grabbed]:
    """The next frames of a grabber, fewer where it ends before."""
    found: list[Grabbed] = []
    while len(found) < count and (grabbed := grabber.take(5)):
        found.append(grabbed)
    return found
