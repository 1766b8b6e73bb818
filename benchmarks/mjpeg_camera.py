"""A camera with MJPEG over HTTP in a process of its own, which can be killed, frozen, and told what
to do wrong: a line on its standard input sets a value, such as `fps 5` (see `Manners`)."""

import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from mjpeg_server import MjpegServer

BITS = 16
SIZES = [(640, 360), (320, 240), (800, 600)]


@dataclass
class Manners:
    """What the camera does: `size` is one of `SIZES`, `broken` and `stutter` are shares of the
    frames that are no picture, and that come up to half a second late, with those after them."""

    fps: float = 15.0
    size: float = 0.0
    broken: float = 0.0
    stutter: float = 0.0
    silent: float = 0.0


def clock_jpeg(size: tuple[int, int]) -> bytes:
    """A picture whose stripes, black and white, show the milliseconds of `time.monotonic()`."""
    now, (width, height) = int(time.monotonic() * 1000), size
    picture = Image.new("L", size)
    draw, wide = ImageDraw.Draw(picture), width / BITS
    for bit in range(BITS):
        if now >> bit & 1:
            draw.rectangle((bit * wide, 0, (bit + 1) * wide - 1, height), fill=255)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return content.getvalue()


def serve(port: int, manners: Manners) -> None:
    """Serves until the standard input ends, and does what is told there."""
    rng = random.Random(port)

    def script(connection: int) -> Iterator[bytes | float]:
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if manners.silent:
                due = now
                yield 0.02
                continue
            if rng.random() < manners.stutter:
                yield rng.random() * 0.5
            broken = rng.random() < manners.broken
            picture = clock_jpeg(SIZES[int(manners.size)])
            yield picture[: len(picture) // 2] if broken else picture
            due = max(due + 1 / manners.fps, now - 1.0)
            yield max(0.0, due - time.monotonic())

    with MjpegServer(script, port=port):
        print("serving", flush=True)
        for line in sys.stdin:
            name, value = line.split()
            setattr(manners, name, float(value))
    os._exit(0)


class Camera:
    """Such a process, as who watches it sees it."""

    def __init__(self, fps: float = 15.0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self._port}/stream.mjpg"
        self.fps = self.usual = fps
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Returns when it serves."""
        command = [sys.executable, __file__, str(self._port), str(self.usual)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.fps = self.usual
        assert self._process.stdout
        if self._process.stdout.readline() != "serving\n":
            raise SystemExit("a camera's process does not start")

    def tell(self, **manners: float) -> None:
        assert self._process and self._process.stdin
        for name, value in manners.items():
            self._process.stdin.write(f"{name} {value}\n")
        self._process.stdin.flush()
        self.fps = manners.get("fps", self.fps)

    def freeze(self, frozen: bool) -> None:
        assert self._process
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def kill(self) -> None:
        if self._process:
            assert self._process.stdin and self._process.stdout
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Manners(fps=float(sys.argv[2])))
