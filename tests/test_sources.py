"""Sources: what texts name, how they are read, and what a grabber does when they fail."""

import itertools
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import solid
from fake_capture import CAMERA, FILE, Fake, Fakes
from mjpeg_server import MjpegServer, jpeg, steady

from runtime import grabber as grabber_module
from runtime.capture import Capture, open_capture
from runtime.capture_mjpeg import MjpegCapture
from runtime.capture_opencv import csi_pipeline
from runtime.capture_pipe import FfmpegCapture, StdinCapture, ffmpeg_arguments
from runtime.errors import BackendUnavailable, DataError, FrameError
from runtime.frames import Frame
from runtime.grabbed import Grabbed
from runtime.grabber import Grabber
from runtime.pace import Pace
from runtime.source_uri import Options, hide_secrets, parse_source


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.02)


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not come true"
        time.sleep(0.005)


def frames_of(capture: Capture) -> list[Frame]:
    frames = []
    while capture.grab():
        frames.append(capture.retrieve())
    capture.close()
    return frames


def taken(grabber: Grabber, count: int) -> list[Grabbed]:
    found: list[Grabbed] = []
    while len(found) < count and (grabbed := grabber.take(5)):
        found.append(grabbed)
    return found


@pytest.mark.parametrize(
    "text, kind, address, options",
    [
        ("0", "v4l2", "0", Options()),
        ("/dev/video2", "v4l2", "/dev/video2", Options()),
        (
            "v4l2:///dev/video0?width=1280&height=720&fps=30&format=MJPG",
            "v4l2",
            "/dev/video0",
            Options(width=1280, height=720, fps=30, format="MJPG"),
        ),
        ("rtsp://a/b?channel=1#c", "rtsp", "rtsp://a/b?channel=1#c", Options()),
        ("https://a/b.mjpg", "http", "https://a/b.mjpg", Options()),
        ("csi://1?fps=60&flip=2", "csi", "1", Options(fps=60, flip=2)),
        ("gst:videotestsrc ! appsink drop=1", "gst", "videotestsrc ! appsink drop=1", Options()),
        (
            "-?width=4&height=2&color=nv12",
            "stdin",
            "-",
            Options(width=4, height=2, color="nv12"),
        ),
    ],
)
def test_a_text_names_a_source(text: str, kind: str, address: str, options: Options) -> None:
    spec = parse_source(text)
    assert (spec.kind, spec.address, spec.options) == (kind, address, options)


def test_files_and_folders_are_sources(tmp_path: Path) -> None:
    (tmp_path / "a ? clip.mp4").write_bytes(b"")
    assert parse_source(tmp_path / "a ? clip.mp4").kind == "video"
    assert parse_source(f"file://{tmp_path}/a%20%3F%20clip.mp4").kind == "video"
    assert parse_source(tmp_path).kind == "pictures"
    with pytest.raises(FrameError, match="no file or folder"):
        parse_source("nowhere.mp4")


@pytest.mark.parametrize(
    "text, message",
    [
        ("ftp://a/b", "is not a source"),
        ("rtsp://", "is not a source"),
        ("csi://front", "a CSI camera is a number"),
        ("v4l2://../../etc/passwd", "is a device"),
        ("v4l2:///dev/video0?widht=3", "'widht' is not known here; there are format, fps, height"),
        ("v4l2:///dev/video0?fps=1&fps=2", "given twice"),
        ("v4l2:///dev/video0?fps", r"written \?name=value"),
        ("v4l2:///dev/video0?width=640", "go together"),
        ("csi://0?fps=nan", "fps='nan' is not a number of frames"),
        ("csi://0?flip=9", "flip-method"),
        ("-", "how large raw frames are"),
        ("-?width=0&height=4", "width='0' is not a number of pixels"),
        ("-?width=32768&height=32768", "at most 100,000,000 pixels"),
        ("-?width=3&height=4&color=nv12", "even"),
        ("-?width=4&height=4&color=pink", "one of bgr"),
        ("gst:videotestsrc ! fakesink", "does not end in an appsink"),
    ],
)
def test_a_malformed_source_is_said(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://bob:geheim@10.0.0.2:554/h264?channel=1",
        "rtsp://bob:ge@geheim@host/x",
        "http://cam/x.mjpg?usr=bob&password=geheim&channel=1",
        "http://cam/x.mjpg?access_token=geheim#geheim_token=geheim",
        "rtsp://10.0.0.2/user=bob_password=geheim_channel=1_stream=0.sdp",
        "gst:rtspsrc location=rtsp://h/x user-id=bob user-pw=geheim ! appsink",
        'gst:rtspsrc location="rtsp://bob:geheim@h/x" user-pw="geheim x" ! appsink',
        "ftp://bob:geheim@host/x",
    ],
)
def test_secrets_are_never_shown(text: str) -> None:
    try:
        spec = parse_source(text)
        said = spec.shown + repr(spec)
        assert "channel=1" in said or "channel=1" not in text
    except DataError as error:
        said = str(error)
    assert "geheim" not in said.replace("geheim_token", "") and "bob" not in said
    assert hide_secrets("rtsp://host/a?channel=1") == "rtsp://host/a?channel=1"


def test_a_csi_camera_becomes_a_pipeline() -> None:
    pipeline = csi_pipeline(parse_source("csi://1?width=640&height=480&fps=15&flip=2"))
    assert "sensor-id=1" in pipeline and "width=640,height=480,framerate=15/1" in pipeline
    assert "flip-method=2" in pipeline and "appsink drop=true max-buffers=1" in pipeline


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr("runtime.capture.can_read", lambda spec: False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailable, match="OpenCV with GStreamer"):
        open_capture(parse_source("csi://0"))
    with pytest.raises(BackendUnavailable, match="there is no ffmpeg; pip install"):
        open_capture(parse_source(data / "video" / "cockatoo.mp4"))


def test_a_camera_that_is_not_there_is_said() -> None:
    pytest.importorskip("cv2")
    with pytest.raises(FrameError, match="is it plugged in"):
        open_capture(parse_source("/dev/video77"))


def test_pictures_come_by_name_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    for name, level in (("b.png", 20), ("a.png", 10), ("d.png", 30)):
        (tmp_path / name).write_bytes(solid(level))
    (tmp_path / "c.png").write_bytes(b"no picture")
    grabber = Grabber(parse_source(tmp_path), fps=2)
    found = taken(grabber, 4)
    assert [int(g.frame[0, 0, 0]) for g in found] == [10, 20, 30]
    assert [(g.number, g.time, g.color) for g in found] == [
        (0, 0, "rgb"),
        (1, 0.5, "rgb"),
        (3, 1.5, "rgb"),
    ]
    assert grabber.counters.broken == 1 and grabber.state == "ended"
    grabber.close()


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="holds no pictures"):
        open_capture(parse_source(tmp_path))


def test_a_video_comes_whole_in_order_and_with_its_times(data: Path) -> None:
    pytest.importorskip("cv2")
    grabber = Grabber(parse_source(data / "video" / "cockatoo.mp4"), fps=2)
    found = taken(grabber, 1000)
    assert len(found) == 28 and [g.number for g in found[:3]] == [0, 10, 20]
    np.testing.assert_allclose([g.time for g in found], np.arange(28) / 2, atol=0.001)
    counters = grabber.counters
    assert counters.seen == 280 == counters.taken + counters.thinned
    assert (grabber.state, grabber.reason, grabber.over) == ("ended", "", True)
    grabber.close()


def test_a_video_that_is_cut_off_says_so(data: Path, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    path = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for level in range(40):
        writer.write(np.random.default_rng(level).integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    grabber = Grabber(parse_source(path))
    found = taken(grabber, 100)
    assert 0 < len(found) < 40 and "damaged or cut off" in grabber.reason
    path.write_bytes(b"no video")
    grabber = Grabber(parse_source(path))
    assert grabber.take(5) is None and "not a video" in str(grabber.error)


@pytest.mark.parametrize(
    "color, shape",
    [("bgr", (2, 4, 3)), ("bgra", (2, 4, 4)), ("gray", (2, 4)), ("nv12", (3, 4))],
)
def test_raw_frames_come_from_a_pipe(color: str, shape: tuple[int, ...]) -> None:
    read, write = os.pipe()
    frames = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    os.write(write, frames.tobytes() + b"half")
    os.close(write)
    spec = parse_source(f"-?width=4&height=2&color={color}&fps=10")
    capture = StdinCapture(spec, read)
    np.testing.assert_array_equal(frames_of(capture), frames)
    assert "the last frame has 4 of" in capture.ended and capture.position() == 0.2
    os.close(read)


def test_a_pipe_that_is_silent_stalls_and_goes_on() -> None:
    read, write = os.pipe()
    spec = parse_source("-?width=4&height=2&color=gray")
    grabber = Grabber(spec, stall=0.1, opens=lambda spec, _: StdinCapture(spec, read))
    until(lambda: grabber.state == "stalled")
    os.write(write, b"12345678")
    assert taken(grabber, 1)[0].frame.tobytes() == b"12345678"
    assert grabber.counters.hangs == 1 and grabber.counters.reconnects == 0
    grabber.close()
    os.close(read)
    os.close(write)


FFMPEG = """#!{python}
import sys
if sys.argv[0].endswith("ffprobe"):
    print("10/1")
else:
    for width in (4, 6):
        sys.stdout.buffer.write(b"P6\\n%d 2\\n255\\n" % width + bytes([width]) * width * 6)
    print("rtsp://bob:geheim@h: moved", file=sys.stderr)
    sys.exit("fail" in sys.argv[-2] or "rtsp" in " ".join(sys.argv))
"""


def test_without_opencv_ffmpeg_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ffmpeg", "ffprobe"):
        (tmp_path / name).write_text(FFMPEG.format(python=sys.executable))
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("runtime.capture.can_read", lambda spec: False)
    (tmp_path / "a.mp4").write_bytes(b"")
    capture = open_capture(parse_source(tmp_path / "a.mp4"))
    assert isinstance(capture, FfmpegCapture) and capture.fps == 10
    assert [f.shape for f in frames_of(capture)] == [(2, 4, 3), (2, 6, 3)]
    assert capture.ended == "" and capture.position() == 0.1
    capture = open_capture(parse_source("rtsp://bob:geheim@h/x"))
    frames_of(capture)
    assert capture.ended == "ffmpeg ended with code 1: rtsp://***@h: moved"


def test_ffmpeg_is_told_what_a_camera_was_asked_for() -> None:
    spec = parse_source("v4l2://1?width=64&height=48&fps=5&format=YUYV")
    told = " ".join(ffmpeg_arguments(spec))
    assert "-f v4l2 -video_size 64x48 -framerate 5 -input_format yuyv -i /dev/video1" in told


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


class V4l2:
    """Stands for cv2.VideoCapture on a camera that can do 640 x 480 alone."""

    def __init__(self, address: object, backend: int, parameters: list[int]) -> None:
        self.values = {3: 640.0, 4: 480.0, 5: 30.0}

    def isOpened(self) -> bool:
        return True

    def get(self, option: int) -> float:
        return self.values.get(option, 0.0)

    def set(self, option: int, value: float) -> None:
        if option not in (3, 4):
            self.values[option] = value

    def getBackendName(self) -> str:
        return "V4L2"

    def release(self) -> None:
        pass


def test_a_camera_does_what_it_is_asked_for_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "VideoCapture", V4l2)
    capture = open_capture(parse_source("v4l2://0?width=640&height=480&fps=15&format=mjpg"))
    assert capture.fps == 15 and "V4L2" in capture.reader
    with pytest.raises(DataError, match="gives 640 x 480 pixels, not what was asked for"):
        open_capture(parse_source("v4l2://0?width=1280&height=720"))


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


def test_a_camera_that_is_lost_is_opened_again() -> None:
    fakes = Fakes(FrameError("no"), Fake(2, fps=200), FrameError("no"), Fake(2, fps=200))
    grabber = Grabber(CAMERA, opens=fakes)
    assert [g.number for g in taken(grabber, 4)] == [0, 1, 2, 3]
    until(lambda: grabber.state == "lost" and grabber.reason == "it is unplugged")
    assert grabber.counters.reconnects >= 4 and fakes.opened >= 5
    grabber.close()
    assert grabber.state == "closed" and grabber.take(0.1) is None


def test_a_driver_that_raises_anything_ends_nothing() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(RuntimeError("ioctl"), Fake(1)))
    assert taken(grabber, 1)
    grabber.close()


def test_a_camera_that_hangs_is_left_and_opened_again() -> None:
    hanging = Fake(1, hangs=True)
    grabber = Grabber(CAMERA, stall=0.1, opens=Fakes(hanging, Fake(fps=100)))
    assert [g.number for g in taken(grabber, 3)] == [0, 1, 2]
    assert (grabber.counters.hangs, grabber.state) == (1, "live")
    hanging.freed.set()
    until(lambda: hanging.closed)
    grabber.close()


def test_no_more_than_a_few_threads_hang() -> None:
    before = threading.active_count()
    hanging = [Fake(0, hangs=True) for _ in range(20)]
    fakes = Fakes(*hanging)
    grabber = Grabber(CAMERA, stall=0.05, opens=fakes)
    until(lambda: grabber.state == "stalled" and "hang too" in grabber.reason)
    assert grabber.counters.hangs == 3
    assert threading.active_count() - before == 4 and fakes.opened == 4
    hanging[0].freed.set()
    until(lambda: grabber.state == "stalled" and fakes.opened == 5)
    for fake in hanging:
        fake.freed.set()
    grabber.close()
    until(lambda: threading.active_count() == before)


def test_many_broken_frames_in_a_row_open_the_camera_again() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(Fake(broken=range(1000)), Fake(1)))
    assert taken(grabber, 1)[0].number == 100
    assert grabber.counters.broken == 100
    grabber.close()


def test_a_missing_reader_is_no_camera_to_wait_for() -> None:
    grabber = Grabber(CAMERA, opens=Fakes(BackendUnavailable("no GStreamer")))
    assert grabber.take(5) is None and grabber.state == "ended"
    assert isinstance(grabber.error, BackendUnavailable) and grabber.reason == "no GStreamer"


def test_a_file_waits_for_who_takes_its_frames() -> None:
    grabber = Grabber(FILE, opens=Fakes(Fake(5, fps=1000, live=False)))
    time.sleep(0.05)
    assert [g.number for g in taken(grabber, 9)] == [0, 1, 2, 3, 4]
    assert grabber.counters.dropped == 0


def test_a_file_in_real_time_drops_what_comes_too_late() -> None:
    grabber = Grabber(FILE, realtime=True, opens=Fakes(Fake(20, fps=50, live=False)))
    start = time.monotonic()
    found = []
    while grabbed := grabber.take(5):
        found.append(grabbed)
        assert abs(grabbed.time_captured - start - grabbed.time) < 0.1
        time.sleep(0.1)
    assert 0.35 < time.monotonic() - start < 0.9
    counters = grabber.counters
    assert 3 <= len(found) <= 6 and counters.dropped + len(found) == 20 == counters.seen


def test_closing_ends_a_reader_that_waits() -> None:
    grabber = Grabber(FILE, opens=Fakes(Fake(5, live=False)))
    until(lambda: grabber.has_news)
    grabber.close()
    assert not any("edgeclip reads" in t.name for t in threading.enumerate() if t.is_alive())


@pytest.mark.parametrize("native, limit, wanted", [(30, 10, 100), (25, 10, 100), (12.5, 20, 125)])
def test_frames_are_thinned_to_the_rate(native: float, limit: float, wanted: int) -> None:
    pace, rng = Pace(limit, paced=False), np.random.default_rng(0)
    times = np.arange(round(10 * native)) / native
    assert abs(sum(pace.wants(time) for time in times) - wanted) <= 1
    pace = Pace(limit, paced=False)
    shaken = np.sort(times + rng.uniform(-0.3, 0.3, len(times)) / native)
    assert abs(sum(pace.wants(time) for time in shaken) - wanted) <= wanted * 0.06
