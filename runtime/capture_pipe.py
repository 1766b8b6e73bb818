"""Frames through a pipe: raw from the standard input, or from FFmpeg's command line."""

import os
import select
import subprocess
import sys
import threading
from collections import deque
from fractions import Fraction

import numpy as np

from .errors import BackendUnavailable, FrameError
from .frames import MAX_PIXELS, Color, Frame
from .source_uri import SourceSpec, hide_secrets

_BYTES = {"bgr": 3.0, "rgb": 3.0, "bgra": 4.0, "gray": 1.0, "nv12": 1.5}  # a pixel


class StdinCapture:
    """Raw frames, one after the other without anything between, from the standard input."""

    reader = "standard input"
    came: float | None = None
    missed = 0

    def __init__(self, spec: SourceSpec, descriptor: int | None = None) -> None:
        asked = spec.options
        self.color: Color = asked.color
        self.fps: float | None = asked.fps or None
        self.ended = ""
        self._shape = _shape(asked.color, asked.width, asked.height)
        self._bytes = round(asked.width * asked.height * _BYTES[asked.color])
        self._from = sys.stdin.fileno() if descriptor is None else descriptor
        self._stop = threading.Event()
        self._frame = bytearray()
        self._count = 0

    def grab(self) -> bool:
        """Reads the next frame; False where there are no more, or `interrupt` was called."""
        frame = bytearray()
        while len(frame) < self._bytes:
            if self._stop.is_set():
                return False
            if not select.select([self._from], [], [], 0.2)[0]:
                continue
            piece = os.read(self._from, min(self._bytes - len(frame), 1 << 20))
            if not piece:
                if frame:
                    self.ended = f"the last frame has {len(frame)} of {self._bytes} bytes"
                return False
            frame += piece
        self._frame = frame
        self._count += 1
        return True

    def retrieve(self) -> Frame:
        return np.frombuffer(self._frame, np.uint8).reshape(self._shape)

    def position(self) -> float | None:
        return (self._count - 1) / self.fps if self.fps else None

    def interrupt(self) -> None:
        self._stop.set()

    def close(self) -> None:
        pass


def _shape(color: Color, width: int, height: int) -> tuple[int, ...]:
    if color == "gray":
        return height, width
    if color == "nv12":
        return height * 3 // 2, width
    return height, width, 4 if color == "bgra" else 3


class FfmpegCapture:
    """What the command `ffmpeg` reads, as PPM pictures: each tells its own size."""

    reader = "ffmpeg's command line"
    color: Color = "rgb"
    came: float | None = None
    missed = 0

    def __init__(self, spec: SourceSpec) -> None:
        self._spec = spec
        self.fps = _rate(spec) if spec.kind == "video" else None
        self._process = subprocess.Popen(
            ["ffmpeg", *ffmpeg_arguments(spec)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._said: deque[bytes] = deque(maxlen=20)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.ended = ""
        self._count = 0
        self._frame: Frame = np.empty((0, 0, 3), np.uint8)

    def _listen(self) -> None:
        assert self._process.stderr
        self._said.extend(self._process.stderr)

    def grab(self) -> bool:
        """Reads the next frame that FFmpeg has decoded; False where it ended (`ended`)."""
        pipe = self._process.stdout
        assert pipe
        magic, size, _ = pipe.readline(), pipe.readline(64), pipe.readline(64)
        if magic != b"P6\n":
            self.ended = self._why_ended()
            return False
        width, height = map(int, size.split())
        if width * height > MAX_PIXELS:
            raise FrameError(f"{self._spec.shown} gives frames of {width} x {height} pixels")
        content = pipe.read(width * height * 3)
        if len(content) < width * height * 3:
            self.ended = self._why_ended()
            return False
        self._frame = np.frombuffer(content, np.uint8).reshape(height, width, 3)
        self._count += 1
        return True

    def _why_ended(self) -> str:
        code = self._process.wait()
        self._listener.join()
        if code or self._spec.live or not self._count:
            last = self._said[-1].decode(errors="replace").strip() if self._said else ""
            said = hide_secrets(last) or "it gives no more frames"
            return f"ffmpeg ended with code {code}: {said}"
        return ""

    def retrieve(self) -> Frame:
        return self._frame

    def position(self) -> float | None:
        return None if self._spec.live else (self._count - 1) / (self.fps or 25)

    def interrupt(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()


def ffmpeg_arguments(spec: SourceSpec) -> list[str]:
    """What `ffmpeg` is told: read this source, write PPM pictures to the standard output."""
    asked, before, address = spec.options, [], spec.address
    if spec.kind == "v4l2":
        address = f"/dev/video{address}" if address.isdecimal() else address
        before = ["-f", "v4l2"]
        before += ["-video_size", f"{asked.width}x{asked.height}"] if asked.width else []
        before += ["-framerate", f"{asked.fps:g}"] if asked.fps else []
        before += ["-input_format", asked.format.lower()] if asked.format else []
    elif spec.kind == "rtsp":
        before = ["-rtsp_transport", "tcp"]
    else:
        address = f"file:{address}" if spec.kind == "video" else address
    live = ["-fflags", "nobuffer", "-threads", "1"] if spec.live else []
    out = ["-map", "0:v:0", "-c:v", "ppm", "-f", "image2pipe", "-"]
    return ["-nostdin", "-loglevel", "error", *live, *before, "-i", address, *out]


def _rate(spec: SourceSpec) -> float:
    """Frames a second of a video, as `ffprobe` tells."""
    asked = "-v error -select_streams v:0 -show_entries stream=r_frame_rate -of csv=p=0"
    command = ["ffprobe", *asked.split(), f"file:{spec.address}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        return float(Fraction(told.strip().rstrip(",")))
    except FileNotFoundError:
        raise BackendUnavailable(
            "there is no ffprobe to tell a video's rate: apt install ffmpeg"
        ) from None
    except (ValueError, ZeroDivisionError, subprocess.TimeoutExpired):
        raise FrameError(f"{spec.shown} is not a video that FFmpeg can read") from None
