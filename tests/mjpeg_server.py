"""A camera of the network for tests: MJPEG over HTTP, with whatever faults a test scripts."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from PIL import Image

Script = Callable[[int], Iterator[bytes | float]]
"""What the n-th connection (from 0) gets: JPEGs, and pauses in seconds; then it is cut."""


def jpeg(level: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of one gray level, by which it can be told from others."""
    content = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(content, "JPEG", quality=95)
    return content.getvalue()


def steady(fps: float, size: tuple[int, int] = (64, 48)) -> Iterator[bytes | float]:
    """Pictures for ever, so many a second, as a clock tells."""
    start, count = time.monotonic(), 0
    pictures = [jpeg(level, size) for level in range(20, 240, 20)]
    while True:
        yield pictures[count % len(pictures)]
        count += 1
        yield max(0.0, start + count / fps - time.monotonic())


class MjpegServer:
    """Serves `url` while it is entered, to whoever gives the `login` (user:password)."""

    def __init__(self, script: Script, login: str = "", port: int = 0) -> None:
        self.connections = 0
        self._login = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", port), self._handler(script))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/stream.mjpg"

    def __enter__(self) -> "MjpegServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _handler(self, script: Script) -> type[BaseHTTPRequestHandler]:
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if camera._login and self.headers["Authorization"] != camera._login:
                    self.send_response(401)
                    self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                    self.end_headers()
                    return
                number, camera.connections = camera.connections, camera.connections + 1
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                try:
                    for piece in script(number):
                        if isinstance(piece, float | int):
                            camera._over.wait(piece)
                        else:
                            self._send(piece)
                        if camera._over.is_set():
                            return
                except OSError:
                    pass  # nobody watches any more

            def _send(self, picture: bytes) -> None:
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}"
                self.wfile.write(f"{head}\r\n\r\n".encode() + picture + b"\r\n")

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
