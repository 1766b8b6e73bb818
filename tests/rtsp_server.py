"""A camera with RTSP for tests: GStreamer's server, in a process of its own that can be killed.

Run as a script it is that process; it needs Debian's gir1.2-gst-rtsp-server-1.0, python3-gi and
gstreamer1.0-plugins-ugly (x264enc), which belong to the system's Python.
"""

import argparse
import functools
import importlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PYTHON = "/usr/bin/python3"
WIDTH, HEIGHT, BITS = 320, 240, 16
ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=15 ! rtph264pay",
    "jpeg": "jpegenc ! rtpjpegpay",
}


@functools.cache
def why_absent() -> str:
    """What is missing here for a server; empty where there is all."""
    if not Path(PYTHON).exists():
        return f"there is no {PYTHON}"
    tried = subprocess.run([PYTHON, __file__, "--check"], capture_output=True, text=True)
    return tried.stderr.strip().rpartition("\n")[2] if tried.returncode else ""


def age_ms(luma: Any) -> float:
    """How long ago a frame was made, by the clock that its upper half shows as black and white
    stripes: the lowest bits of `time.monotonic()` in milliseconds, uint8 [HEIGHT, WIDTH]."""
    wide = WIDTH // BITS
    stripes = [luma[HEIGHT // 4, n * wide + wide // 2] > 128 for n in range(BITS)]
    shown = sum(int(bit) << n for n, bit in enumerate(stripes))
    return (time.monotonic() * 1000 - shown) % (1 << BITS)


class RtspServer:
    """Serves `url` while it is entered, to whoever gives the `login` (user:password): frames of
    WIDTH x HEIGHT pixels, above the clock of `age_ms`, below `color` (RGB)."""

    def __init__(
        self,
        fps: int = 25,
        codec: str = "h264",
        login: str = "",
        color: tuple[int, int, int] = (200, 60, 40),
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"rtsp://127.0.0.1:{self.port}/stream"
        self._command = [PYTHON, __file__, "--port", str(self.port), "--fps", str(fps)]
        self._command += ["--codec", codec, "--login", login, "--color", *map(str, color)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Returns when it serves. Raises OSError where it does not come to that."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        if self._process.stdout.readline() != "serving\n":
            self.kill()
            raise OSError("GStreamer's RTSP server does not start")

    def kill(self) -> None:
        """As a camera that loses its power."""
        if self._process:
            assert self._process.stdout
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def freeze(self, frozen: bool) -> None:
        """As a camera that hangs: its connections stay, and nothing comes."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def __enter__(self) -> "RtspServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


def picture(color: list[int]) -> bytes:
    """An I420 frame of the time (see `age_ms`) and of a colour, by BT.601 in video range."""
    now, wide = int(time.monotonic() * 1000), WIDTH // BITS
    stripes = b"".join(bytes([235 if now >> n & 1 else 16]) * wide for n in range(BITS))
    red, green, blue = color
    y = round(16 + 0.257 * red + 0.504 * green + 0.098 * blue)
    u = round(128 - 0.148 * red - 0.291 * green + 0.439 * blue)
    v = round(128 + 0.439 * red - 0.368 * green - 0.071 * blue)
    half, quarter = HEIGHT // 2, WIDTH // 2 * HEIGHT // 4
    chroma = b"".join(b"\x80" * quarter + bytes([value]) * quarter for value in (u, v))
    return stripes * half + bytes([y]) * (WIDTH * half) + chroma


def serve(asked: argparse.Namespace) -> None:
    """Runs the server until it is killed. Only in the system's Python."""
    gi = importlib.import_module("gi")
    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    names = [f"gi.repository.{name}" for name in ("Gst", "GstRtspServer", "GLib")]
    gst, rtsp, glib = map(importlib.import_module, names)
    gst.init(None)
    encoder = ENCODERS[asked.codec]
    if not all(gst.ElementFactory.find(one.split()[0]) for one in encoder.split(" ! ")):
        raise SystemExit(f"GStreamer lacks {encoder}")
    if asked.check:
        return
    caps = f"video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={asked.fps}/1"
    factory = rtsp.RTSPMediaFactory()
    source = f"appsrc name=camera is-live=true do-timestamp=true format=time caps={caps}"
    factory.set_launch(f"( {source} ! {encoder} name=pay0 pt=96 )")
    factory.set_shared(True)

    def configure(factory: Any, media: Any) -> None:
        camera = media.get_element().get_by_name_recurse_up("camera")

        def push() -> bool:
            frame = gst.Buffer.new_wrapped(picture(asked.color))
            return bool(camera.emit("push-buffer", frame) == gst.FlowReturn.OK)

        glib.timeout_add(round(1000 / asked.fps), push)

    factory.connect("media-configure", configure)
    server = rtsp.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(asked.port))
    if asked.login:
        user, _, password = asked.login.partition(":")
        token = rtsp.RTSPToken()
        token.set_string("media.factory.role", "user")
        auth = rtsp.RTSPAuth()
        auth.add_basic(rtsp.RTSPAuth.make_basic(user, password), token)
        server.set_auth(auth)
        role = "user, media.factory.access=true, media.factory.construct=true"
        factory.add_role_from_structure(gst.Structure.new_from_string(role))
    server.get_mount_points().add_factory("/stream", factory)
    server.attach(None)
    print("serving", flush=True)
    glib.MainLoop().run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--codec", choices=ENCODERS, default="h264")
    parser.add_argument("--login", default="")
    parser.add_argument("--color", type=int, nargs=3, default=[0, 0, 0])
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
