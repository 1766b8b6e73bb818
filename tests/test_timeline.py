"""Labels in time: smoothing, hysteresis and dwell; what is drawn and written of them."""

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from watching import prediction, seen

from runtime.annotate import annotate
from runtime.errors import DataError
from runtime.event import Event
from runtime.event_file import EventFile
from runtime.history import MOST_SAMPLES, History
from runtime.outputs import Annotated, Callback, JsonLines
from runtime.rules import Rule
from runtime.smoother import Smoother
from runtime.stream_run import write_timeline
from runtime.timeline import Timeline, TimelineOptions
from runtime.timeline_chart import draw_timeline
from runtime.video_out import VideoOut, open_out
from runtime.watch import Watch

CALM = TimelineOptions(smooth=0.0, enter=0.6, leave=0.4, dwell=1.0)


def events_of(options: TimelineOptions, scores: list[float], fps: float = 10.0) -> list[Event]:
    """The events of one label with these scores, a frame each, to the end of the source."""
    timeline = Timeline(options)
    found = [
        event
        for number, score in enumerate(scores)
        for event in timeline.update("door", number / fps, prediction({"cat": score, "dog": 0.0}))
    ]
    return found + timeline.close()


def test_smoothing_is_by_time_not_by_frames() -> None:
    ends = []
    for fps in (5, 50):
        smoother = Smoother(0.5)
        smoother.update(0.0, prediction({"cat": 0.0}))
        for number in range(1, 2 * fps + 1):
            scores = smoother.update(number / fps, prediction({"cat": 1.0}))
        ends.append(scores["cat"])
    assert ends == pytest.approx([1 - np.exp(-4)] * 2, abs=1e-9)


def test_an_unknown_frame_is_of_no_label_and_time_does_not_go_back() -> None:
    smoother = Smoother(1.0)
    assert smoother.update(5.0, prediction({"cat": 0.8}))["cat"] == pytest.approx(0.8)
    assert smoother.update(4.0, prediction({"cat": 0.0}))["cat"] == pytest.approx(0.8)
    unknown = prediction({"cat": 0.8}, threshold=0.9)
    assert smoother.update(6.0, unknown)["cat"] == pytest.approx(0.8 * np.exp(-1))


def test_a_label_starts_after_the_dwell_and_ends_below_leave() -> None:
    started, ended = events_of(CALM, [0.1] * 5 + [0.7] * 15 + [0.5] * 10 + [0.3] * 5)
    assert (started.kind, started.label, started.source) == ("started", "cat", "door")
    assert (started.time, started.duration) == pytest.approx((1.5, 1.0))
    assert started.score == pytest.approx(0.7)
    assert ended.kind == "ended"
    assert (ended.time, ended.duration) == pytest.approx((3.0, 2.5))
    assert ended.score == pytest.approx((15 * 0.7 + 10 * 0.5 + 0.3) / 26, abs=0.02)


def test_what_flickers_never_starts() -> None:
    assert events_of(CALM, ([0.9] * 9 + [0.1]) * 10) == []


def test_a_label_stays_for_the_dwell_once_it_has_started() -> None:
    started, ended = events_of(CALM, [0.9] * 11 + [0.0] * 30)
    assert ended.time - started.time == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_no_label_is_shorter_than_the_dwell(seed: int) -> None:
    scores = np.random.default_rng(seed).random(3000) ** 0.5
    options = TimelineOptions(smooth=0.2, enter=0.65, leave=0.6, dwell=0.7)
    found = events_of(options, scores.tolist())
    assert len(found) > 20
    assert [event.kind for event in found] == ["started", "ended"] * (len(found) // 2)
    assert min(event.duration for event in found) >= 0.7 - 1e-9
    assert found == events_of(options, scores.tolist())


def test_sources_are_apart_and_labels_may_change() -> None:
    timeline = Timeline(TimelineOptions(smooth=0, dwell=0))
    assert timeline.update("a", 0.0, prediction({"cat": 0.9}))[0].source == "a"
    assert timeline.active("a") == ["cat"] and timeline.active("b") == []
    ended, started = timeline.update("a", 1.0, prediction({"dog": 0.9}))
    assert (ended.kind, ended.label, started.label) == ("ended", "cat", "dog")


def test_thumbnails_are_small_pictures_of_the_frame() -> None:
    timeline = Timeline(TimelineOptions(dwell=0), thumbnails=32)
    frame = np.zeros((120, 240, 3), dtype=np.uint8)
    frame[..., 2] = 200  # red in BGR
    (event,) = timeline.update("a", 0.0, prediction({"cat": 0.9}), frame)
    content = base64.b64decode(event.as_json()["thumbnail"])
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    assert picture.size == (32, 16)
    red, green, blue = np.asarray(picture)[8, 16]
    assert red > 180 and green < 20 and blue < 20


@pytest.mark.parametrize(
    "wrong", [{"enter": 0.3, "leave": 0.4}, {"dwell": -1}, {"smooth": float("nan")}, {"enter": 2}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError):
        TimelineOptions(**wrong)


def test_a_watch_tells_every_output_and_ends_what_goes_on(tmp_path: Path) -> None:
    told: list[Event] = []
    path = tmp_path / "events.jsonl"
    watch = Watch(
        TimelineOptions(smooth=0, dwell=0.5),
        ["cat > 0.5 and not dog for 1s"],
        [Callback(told.append), EventFile(path)],
    )
    for number in range(21):
        watch.see(seen(number / 10, {"cat": 0.9, "dog": 0.1}))
    watch.close()
    kinds = [(event.kind, event.label, round(event.time, 1)) for event in told]
    rule = "cat > 0.5 and not dog for 1s"
    assert kinds == [("started", "cat", 0.5), ("fired", rule, 1.0),
                     ("ended", "cat", 2.0), ("cleared", rule, 2.0)]  # fmt: skip
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [event.as_json() for event in told]
    assert [span.label for span in watch.history.sources["door"].spans] == ["cat", rule]


class Fails:
    """An output that cannot write."""

    def frame(self, seen: object, scores: object, active: object) -> None:
        raise OSError("the disk is full")

    def event(self, event: Event) -> None:
        raise OSError("the disk is full")

    def close(self) -> None:
        raise OSError("the disk is full")


def test_an_output_that_fails_keeps_no_other_from_its_end(tmp_path: Path) -> None:
    video = Annotated(tmp_path / "out", ["door", "0"])
    fails = [Fails(), Fails()]
    watch = Watch(TimelineOptions(smooth=0, dwell=0.5), outputs=[fails[0], video, fails[1]])
    for output in (video, fails[1]):
        with contextlib.suppress(OSError):
            output.frame(seen(0.0, {"cat": 0.9}), {"cat": 0.9}, ["cat"])
    with pytest.raises(OSError, match="full"):
        watch.close()
    assert [path.name for path in video.written] == ["out-door"]


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_events_outlive_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = EventFile(tmp_path / "events.jsonl")
    event = Event("started", "cat", "door", 1.0, 0.5)
    out.event(event)
    with file_limit(150):  # one line and a half
        out.event(event)
        out.event(event)
    out.event(event)
    out.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == [event.as_json()] * 2 and out.dropped == 2
    assert "cannot be written to" in caplog.text and "2 events were dropped" in caplog.text


def test_a_video_that_was_not_written_whole_is_none(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    out, rng = VideoOut(tmp_path / "out.avi", fps=10), np.random.default_rng(0)
    with file_limit(30_000):
        for number in range(30):
            out.write(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8), number / 10)
        with pytest.raises(DataError, match="out.avi cannot be written whole"):
            out.close()
    out.discard()
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    out = open_out(tmp_path / "out")
    with file_limit(100), pytest.raises(DataError, match="000001.jpg cannot be written"):
        out.write(np.zeros((480, 640, 3), np.uint8), 0.0)
    with file_limit(100), pytest.raises(OSError):
        write_timeline(tmp_path / "out" / "out.png", History(), [], [], False)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_camera_that_is_away_for_long_ends_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("runtime.watch.monotonic", lambda: clock[0])
    told: list[Event] = []
    watch = Watch(TimelineOptions(dwell=0), outputs=[Callback(told.append)])
    watch.see(seen(1.0, {"cat": 0.9}))
    watch.state("door", "lost", "no more frames")
    assert [event.kind for event in told] == ["started"]
    clock[0] += 6
    watch.state("door", "connecting", "")
    watch.state("never seen", "lost", "")
    assert [event.kind for event in told] == ["started", "ended"]
    watch.see(seen(30.0, {"cat": 0.9}))
    assert [event.kind for event in told] == ["started", "ended", "started"]


def test_rules_outlive_their_labels() -> None:
    watch = Watch(TimelineOptions(smooth=0, dwell=0), ["cat > 0.6"])
    watch.see(seen(1.0, {"cat": 0.9}))
    watch.lost("door")
    assert [e.kind for e in watch.see(seen(9.0, {"dog": 0.9})) if e.label == "cat > 0.6"] == []
    watch.see(seen(9.0, {"dog": 0.9}, "a source that comes late"))
    fired = watch.see(seen(9.1, {"cat": 0.9}, "a source that comes late"))
    assert [e.kind for e in fired if e.label == "cat > 0.6"] == ["fired"]
    with pytest.raises(DataError, match="no label"):
        Watch(rules=["cat > 0.6"]).see(seen(1.0, {"dog": 0.9}))
    early = Watch(rules=[Rule.parse("cat > 0.6", ["cat"])])
    early.see(seen(1.0, {"dog": 0.9}))


def test_json_lines_of_frames_are_thinned_by_time() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream, every=0.5)
    for number in range(11):
        lines.frame(seen(number / 10, {"cat": 0.9, "dog": 0.1}), {}, ["cat"])
    shown = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["time"] for line in shown] == [0.0, 0.5, 1.0]
    assert shown[0]["label"] == "cat" and shown[0]["active"] == ["cat"]


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (120, 160), (480, 640), (640, 360), (100, 900)])
def test_frames_of_every_size_are_drawn_on(size: tuple[int, int]) -> None:
    frame = np.full((*size, 3), 90, dtype=np.uint8)
    labels = ["person", "a label that is much too long for the room that there is", "鳥"]
    scores = dict.fromkeys(labels, 1.0)
    drawn = annotate(frame, "bgr", labels, scores, labels, "somewhere 1:23")
    assert min(drawn.shape[:2]) >= 240 or min(drawn.shape[:2]) == min(size)
    assert (drawn != 90).any() and (frame == 90).all()


@pytest.mark.parametrize("color", ["bgr", "rgb", "bgra", "gray", "nv12"])
def test_every_channel_order_keeps_its_colours(color: str) -> None:
    shape = {"bgra": (300, 400, 4), "gray": (300, 400), "nv12": (450, 400)}.get(
        color, (300, 400, 3)
    )
    frame = np.full(shape, 128, dtype=np.uint8)
    if color in ("bgr", "rgb"):
        frame[..., 0] = 250
    drawn = annotate(frame, color, ["cat"], {"cat": 0.5})  # type: ignore[arg-type]
    assert drawn.shape == (300, 400, 3)
    blue, _, red = drawn[10, 200].tolist()
    assert (blue > red) == (color == "bgr") and (red > blue) == (color == "rgb")


def read_video(path: Path) -> tuple[float, list[int]]:
    """Frames a second, and the mean gray of every frame."""
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(path))
    means = []
    while (read := capture.read())[0]:
        means.append(round(read[1].mean()))
    return capture.get(cv2.CAP_PROP_FPS), means


def test_a_video_shows_each_frame_for_as_long_as_it_was_the_newest(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    out = VideoOut(tmp_path / "out.mp4", fps=10)
    for level, time in ((50, 3.0), (100, 3.1), (150, 3.5), (152, 3.51), (200, 3.7)):
        out.write(np.full((48, 64, 3), level, dtype=np.uint8), time)
    assert not (tmp_path / "out.mp4").exists()
    assert out.close() == tmp_path / "out.mp4"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    fps, means = read_video(tmp_path / "out.mp4")
    assert fps == 10
    assert means == pytest.approx([50, 100, 100, 100, 100, 150, 152, 200], abs=6)


def test_a_video_goes_on_in_another_resolution_and_finds_its_speed(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    out = VideoOut(tmp_path / "out.avi")
    for number in range(20):
        size = (49, 65, 3) if number < 10 else (200, 100, 3)
        out.write(np.full(size, 120, dtype=np.uint8), number / 12.5)
    out.close()
    fps, means = read_video(tmp_path / "out.avi")
    assert fps == 12.5 and len(means) == 20
    assert means[5] == pytest.approx(120, abs=4) and 20 < means[15] < 80


def test_nothing_is_left_where_no_frame_came_and_nothing_is_overwritten(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    out = VideoOut(tmp_path / "out.mp4")
    assert out.close() is None and list(tmp_path.iterdir()) == []
    (tmp_path / "out.mp4").write_text("mine")
    for path, message in (
        (tmp_path / "out.mp4", "exists already"),
        (tmp_path / "no" / "out.mp4", "no folder"),
        (tmp_path / "out.txt", "name one of .mp4"),
    ):
        with pytest.raises(DataError, match=message):
            open_out(path)


def test_pictures_and_videos_of_several_sources(tmp_path: Path) -> None:
    sources = ["rtsp://a/door.mjpg", "rtsp://b/door.mjpg", "0"]
    output = Annotated(tmp_path / "out", sources)
    for source in sources:
        output.frame(seen(0.0, {"cat": 0.9}, source), {"cat": 0.9}, ["cat"])
    output.close()
    assert {path.name for path in output.written} == {"out-door", "out-door-2", "out-0"}
    with Image.open(tmp_path / "out-0" / "000001.jpg") as picture:
        assert picture.size == (320, 240)


def test_history_stays_small() -> None:
    history = History()
    for number in range(5 * MOST_SAMPLES):
        history.frame("door", number / 10, ["cat"], {"cat": number / 1e4})
    past = history.sources["door"]
    assert past.frames == 5 * MOST_SAMPLES and len(past.samples) <= MOST_SAMPLES
    assert len(past.recent) == past.frames / 10  # one a second
    times = [time for time, _ in past.curve("cat")]
    assert times == sorted(times) and times[-1] > 0.99 * past.end


def test_the_timeline_picture_shows_labels_where_they_were() -> None:
    watch = Watch(TimelineOptions(smooth=0, dwell=0))
    for number in range(101):
        there = 25 <= number < 75
        watch.see(seen(number / 10, {"cat": 0.9 if there else 0.1, "<b>": 0.0}))
    watch.close()
    picture = np.asarray(draw_timeline(watch.history, ["cat", "<b>"], {"door": "101 frames"}, 1000))
    blue = (picture.astype(int) - (46, 134, 222) == 0).all(axis=2).any(axis=0).nonzero()[0]
    room = 1000 - 190 - 120
    assert blue.min() == pytest.approx(190 + room / 4, abs=4)
    assert blue.max() == pytest.approx(190 + room * 3 / 4, abs=4)
    assert draw_timeline(History(), [], {}).size[0] == 1200
