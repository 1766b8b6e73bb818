"""Cameras with MJPEG over HTTP: real connections, with whatever can be wrong with them."""

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from fake_capture import CAMERA, taken
from mjpeg_server import MjpegServer, jpeg, steady

from runtime import grabber as grabber_module
from runtime.capture import open_capture
from runtime.capture_mjpeg import MjpegCapture
from runtime.errors import FrameError
from runtime.frames import Frame
from runtime.grabber import Grabber
from runtime.source_uri import parse_source


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.02)


def test_mjpeg_over_http_changes_size_and_has_broken_pictures() -> None:
    def script(connection: int) -> Iterator[bytes | float]:
        for picture in (b"garbage", jpeg(40), jpeg(80)[:300], jpeg(120, (32, 16)), jpeg(160)):
            yield picture
            yield 0.05
        yield 5.0

    with MjpegServer(script) as server:
        grabber = Grabber(parse_source(server.url))
        found = taken(grabber, 3)
        assert [(g.number, g.frame.shape) for g in found] == [
            (1, (48, 64, 3)),
            (3, (16, 32, 3)),
            (4, (48, 64, 3)),
        ]
        counters = grabber.counters
        assert (counters.seen, counters.broken, counters.reconnects) == (5, 2, 0)
        grabber.close()


def test_the_login_of_an_address_is_used_and_never_shown() -> None:
    with MjpegServer(lambda connection: steady(50), login="bob:ge:he@im") as server:
        address = server.url.replace("//", "//bob:ge%3Ahe%40im@")
        capture = open_capture(parse_source(address))
        assert capture.grab() and capture.retrieve().shape == (48, 64, 3)
        capture.close()
        with pytest.raises(FrameError, match=r"//\*\*\*@127.*answers 401 Unauthorized"):
            open_capture(parse_source(server.url.replace("//", "//bob:geheim@")))
        with pytest.raises(FrameError, match="answers 401"):
            open_capture(parse_source(server.url))
    with pytest.raises(FrameError, match="cannot be reached: .*refused"):
        open_capture(parse_source(address))


@pytest.mark.parametrize("password", ["sec#ret", "sec?ret", "sec/ret", "sec[ret", "sec ret"])
def test_no_part_of_a_password_is_shown(password: str) -> None:
    with pytest.raises(FrameError) as refused:
        open_capture(parse_source(f"http://bob:{password}@127.0.0.1:9/x"))
    assert "sec" not in str(refused.value) and "***@127.0.0.1:9/x" in str(refused.value)


@pytest.mark.realtime
def test_what_is_decoded_too_slowly_does_not_queue_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(connection: int) -> Iterator[bytes | float]:
        while True:  # brighter and brighter: the level tells when it was made
            yield jpeg(int((time.monotonic() - began) * 100))
            yield 0.02

    def slow(self: MjpegCapture) -> Frame:
        time.sleep(0.06)
        return decode(self)

    decode, began = MjpegCapture.retrieve, time.monotonic()
    monkeypatch.setattr(MjpegCapture, "retrieve", slow)
    with MjpegServer(script) as server:
        grabber = Grabber(parse_source(server.url))
        ages = []
        for _ in range(20):
            [grabbed] = taken(grabber, 1)
            now = time.monotonic()
            made = began + float(grabbed.frame.mean()) / 100
            ages.append((now - made, now - grabbed.time_captured))
        grabber.close()
    made, told = np.array(ages).T
    assert np.median(made[10:]) < 0.2 and np.median(made - told) < 0.05
    counters = grabber.counters
    assert counters.dropped > 20
    assert counters.seen == counters.taken + counters.dropped + counters.broken


def test_a_file_at_an_address_is_no_camera(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in range(10):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(path.read_bytes())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        grabber = Grabber(parse_source(f"http://127.0.0.1:{server.server_address[1]}/a.avi"))
        assert grabber.take(5) is None and grabber.state == "ended"
        assert "is a file, no camera" in grabber.reason
        server.shutdown()
        thread.join()


def test_mjpeg_that_dies_or_hangs_returns() -> None:
    def script(connection: int) -> Iterator[bytes | float]:
        yield from itertools.islice(steady(50), 6)
        yield 10.0 if connection == 1 else 0.0

    with MjpegServer(script) as server:
        grabber = Grabber(parse_source(server.url), stall=0.25)
        found = taken(grabber, 9)
        assert len(found) == 9 and server.connections >= 3
        assert grabber.counters.reconnects >= 2
        assert [g.number for g in found] == sorted({g.number for g in found})
        grabber.close()


@pytest.mark.realtime
def test_a_newest_frame_is_never_old() -> None:
    with MjpegServer(lambda connection: steady(100)) as server:
        grabber = Grabber(parse_source(server.url))
        levels = []
        for _ in range(5):
            grabbed = grabber.take(5)
            assert grabbed and time.monotonic() - grabbed.time_captured < 0.06
            levels.append(grabbed.number)
            time.sleep(0.1)
        counters = grabber.counters
        assert counters.dropped >= 20 and counters.seen - counters.dropped - counters.taken in (
            0,
            1,
        )
        grabber.close()


@pytest.mark.parametrize("size, message", [(-1, "bytes"), (10**12, "bytes")])
def test_a_picture_of_a_mad_size_is_refused(size: int, message: str) -> None:
    class Answer:
        lines = [b"--frame\r\n", b"Content-Length: %d\r\n" % size, b"\r\n"]

        def readline(self, limit: int) -> bytes:
            return self.lines.pop(0)

        def fileno(self) -> int:
            return pair[0].fileno()

        def close(self) -> None:
            pass

    pair = socket.socketpair()
    capture = MjpegCapture(CAMERA, Answer())
    assert not capture.grab() and message in capture.ended
    capture.close()
    for end in pair:
        end.close()
