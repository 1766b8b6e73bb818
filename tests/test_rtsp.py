"""Cameras with RTSP, by a real server: GStreamer's, in the system's Python (see rtsp_server.py)."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from rtsp_server import HEIGHT, WIDTH, RtspServer, age_ms, why_absent

from runtime import grabber as grabber_module
from runtime.capture import open_capture
from runtime.errors import FrameError
from runtime.grabbed import Grabbed
from runtime.grabber import Grabber
from runtime.rtsp_answer import why_closed
from runtime.source_uri import SourceSpec, parse_source

pytest.importorskip("cv2")
FPS, COLOR = 25, (200, 60, 40)


@pytest.fixture(scope="module")
def server() -> Iterator[RtspServer]:
    with serves(login="bob:geheim") as started:
        yield started


def serves(codec: str = "h264", login: str = "") -> RtspServer:
    if missing := why_absent():
        pytest.skip(f"there is no RTSP server here: {missing}")
    return RtspServer(FPS, codec, login, COLOR)


def known(server: RtspServer) -> str:
    return server.url.replace("//", "//bob:geheim@")


def taken(grabber: Grabber, count: int) -> list[tuple[Grabbed, float]]:
    """Frames, and how old each was when it was taken, ms."""
    found = (grabber.take(10) for _ in range(count))
    return [(grabbed, age_ms(grabbed.frame[..., 1])) for grabbed in found if grabbed]


def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not come true"
        time.sleep(0.01)


def test_frames_come_in_their_colours_and_none_of_them_late(
    server: RtspServer, capfd: pytest.CaptureFixture[str]
) -> None:
    grabber = Grabber(parse_source(known(server)))
    found, ages = zip(*taken(grabber, 25), strict=True)
    grabber.close()
    assert [grabbed.frame.shape for grabbed in found] == [(HEIGHT, WIDTH, 3)] * 25
    below = found[-1].frame[HEIGHT * 3 // 4, WIDTH // 2]
    np.testing.assert_allclose(below[::-1], COLOR, atol=6)
    # FFmpeg's parser of H.264 holds one frame back: it looks for the beginning of the next.
    assert ages[0] < 250 and np.median(ages) < 2.5 * 1000 / FPS
    said = capfd.readouterr()
    assert "geheim" not in said.err + said.out + grabber.name + grabber.reason


def test_what_a_camera_refuses_is_said(
    server: RtspServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for address, message in (
        (server.url, "asks for a login: rtsp://user:password@host/path"),
        (server.url.replace("//", "//bob:falsch@"), "refuses the login"),
        (known(server) + "/none", "answers 404 Not Found: is the path"),
    ):
        with pytest.raises(FrameError, match=message) as raised:
            open_capture(parse_source(address), 5.0)
        said = capfd.readouterr()
        assert "geheim" not in str(raised.value) + said.err + said.out
        assert "falsch" not in str(raised.value) + said.err + said.out


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["h264", "jpeg"])
def test_a_camera_that_is_killed_is_found_again(
    codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.05)
    threads = threading.active_count()
    with serves(codec) as server:
        grabber = Grabber(parse_source(server.url), stall=2.0)
        assert len(taken(grabber, 5)) == 5
        server.kill()
        until(lambda: grabber.state == "lost")
        until(lambda: "refused" in grabber.reason)
        server.start()
        until(lambda: grabber.state == "live")
        taken(grabber, 1)  # it may have waited since before
        assert max(age for _, age in taken(grabber, 5)) < 250
        grabber.close()
    counters = grabber.counters
    assert counters.reconnects >= 1 and counters.seen >= 11
    assert counters.seen - counters.taken - counters.dropped in (0, 1)
    until(lambda: threading.active_count() == threads)


@pytest.mark.realtime
def test_a_frame_that_was_held_back_is_not_handed_out_when_none_came_in_time() -> None:
    with serves() as server:
        capture = open_capture(parse_source(server.url), 1.0)
        assert all(capture.grab() for _ in range(5))
        server.freeze(True)
        start = time.monotonic()
        while capture.grab():  # what was on its way
            assert time.monotonic() - start < 0.9
        assert capture.ended == "no answer in time"
        server.freeze(False)
        capture.close()


@pytest.mark.slow
@pytest.mark.realtime
def test_after_a_pause_no_frame_from_before_it_comes() -> None:
    with serves() as server:
        capture = open_capture(parse_source(server.url), 5.0)
        assert all(capture.grab() for _ in range(5))
        server.freeze(True)
        threading.Timer(1.0, server.freeze, [False]).start()
        start, ages = time.monotonic(), list[float]()
        while time.monotonic() - start < 1.5:
            assert capture.grab()
            ages.append(age_ms(capture.retrieve()[..., 1]))
        assert max(ages) < 500
        capture.close()


@pytest.mark.slow
def test_a_camera_that_freezes_is_left_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.05)
    with serves() as server:
        grabber = Grabber(parse_source(server.url), stall=1.5)
        assert len(taken(grabber, 5)) == 5
        server.freeze(True)
        until(lambda: grabber.state in ("stalled", "lost"))
        server.freeze(False)
        until(lambda: grabber.state == "live")
        taken(grabber, 1)
        assert max(age for _, age in taken(grabber, 5)) < 250
        grabber.close()


def answering(*answers: bytes) -> tuple[str, threading.Thread]:
    """An address of which each connection gets the next answer."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listening:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return f"rtsp://127.0.0.1:{listening.getsockname()[1]}/x", thread


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"RTSP/1.0 200 OK\r\n\r\n", "has no video that can be read"),
        (b"RTSP/1.0 503 \x1b[31mBusy\r\n\r\n", "answers 503 [31mBusy"),
        (b"HTTP/1.0 200 OK\r\n\r\n", "cannot be reached: what answers there does not speak RTSP"),
        (b"", "does not speak RTSP"),
    ],
)
def test_why_a_stream_is_closed(answer: bytes, message: str) -> None:
    address, thread = answering(answer)
    assert message in why_closed(SourceSpec("rtsp", address), 1.0)
    thread.join()
    assert "cannot be reached" in why_closed(SourceSpec("rtsp", address), 1.0)


def test_a_password_with_a_slash_is_not_shown() -> None:
    said = why_closed(SourceSpec("rtsp", "rtsp://bob:geheim/7@127.0.0.1/x"), 1.0)
    assert "geheim" not in said and "of the form rtsp://" in said
