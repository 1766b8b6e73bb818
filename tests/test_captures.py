"""How sources are read: pictures, videos, pipes and devices."""

import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import solid
from fake_capture import taken, until

from runtime.capture import Capture, open_capture
from runtime.capture_opencv import csi_pipeline
from runtime.capture_pipe import FfmpegCapture, StdinCapture, ffmpeg_arguments
from runtime.errors import BackendUnavailable, DataError, FrameError
from runtime.frames import Frame
from runtime.grabber import Grabber
from runtime.source_uri import parse_source


def frames_of(capture: Capture) -> list[Frame]:
    frames = []
    while capture.grab():
        frames.append(capture.retrieve())
    capture.close()
    return frames


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
