"""Streams: frames of several sources through one classifier, none of them late or lost."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from conftest import COLORS, solid
from fake_capture import CAMERA, FILE, Fake, Fakes, until
from mjpeg_server import MjpegServer, jpeg, steady

import runtime
from runtime import grabber as grabber_module
from runtime.errors import BackendUnavailable, DataError, FrameError
from runtime.event import Event
from runtime.frames import Color, Colors, Frame
from runtime.outputs import Callback
from runtime.prediction import Prediction
from runtime.source_uri import SourceSpec
from runtime.still import changed, thumbnail
from runtime.stream import Seen, Stream
from runtime.stream_run import run
from runtime.stream_stats import SourceStats
from runtime.timeline import TimelineOptions
from runtime.watch import Watch


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grabber_module, "FIRST_PAUSE", 0.02)


class Model:
    """A classifier that takes `seconds`, and tells dark frames from bright ones."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.labels: tuple[str, ...] = ("dark", "bright")
        self.batches: list[tuple[int, list[Color]]] = []

    def classify_batch(self, frames: Sequence[Frame], color: Colors = "bgr") -> list[Prediction]:
        time.sleep(self.seconds)
        colors: list[Color] = [color] * len(frames) if isinstance(color, str) else list(color)
        self.batches.append((len(frames), colors))
        means = [float(frame.mean()) / 255 for frame in frames]
        scores = [np.array([1 - mean, mean], np.float32) for mean in means]
        return [Prediction(self.labels, score, score) for score in scores]


def camera(number: int) -> SourceSpec:
    return SourceSpec("rtsp", f"rtsp://bob:geheim@door{number}/stream")


def adds_up(stats: SourceStats) -> bool:
    """Whether it is known what became of each frame, but for one on its way."""
    known = stats.classified + stats.skipped + stats.dropped + stats.broken + stats.thinned
    return stats.seen - known in (0, 1)


def test_a_video_is_classified_frame_by_frame(data: Path, bundle: Path) -> None:
    pytest.importorskip("cv2")
    classifier = runtime.load(bundle, labels=list(COLORS))
    with runtime.Stream(classifier, data / "video" / "cockatoo.mp4", fps=2) as stream:
        found = list(stream)
    assert [seen.number for seen in found] == list(range(0, 280, 10))
    assert found[3].time == pytest.approx(1.5) and found[3].frame.shape == (720, 1280, 3)
    assert found[3].prediction.label == classifier.classify(found[3].frame).label
    [stats] = stream.stats()
    assert (stats.seen, stats.classified, stats.thinned, stats.state) == (280, 28, 252, "ended")
    assert stats.fps > 0 and 0 < stats.p50_ms <= stats.p90_ms <= stats.p99_ms


def test_it_ends_when_all_its_sources_have(tmp_path: Path) -> None:
    for folder, count in (("a", 3), ("b", 1)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.png").write_bytes(solid(200))
    model = Model()
    with Stream(model, {"front": tmp_path / "a", "back": str(tmp_path / "b")}) as stream:
        found = list(stream)
    assert stream.names == ["front", "back"]
    assert sorted((seen.source, seen.number) for seen in found) == [
        ("back", 0),
        ("front", 0),
        ("front", 1),
        ("front", 2),
    ]
    assert {color for _, colors in model.batches for color in colors} == {"rgb"}


@pytest.mark.realtime
def test_cameras_are_served_alike_and_never_late() -> None:
    fakes = Fakes(*(Fake(fps=50) for _ in range(4)))
    found: list[Seen] = []
    with Stream(Model(0.03), [camera(n) for n in range(4)], opens=fakes) as stream:
        start = time.monotonic()
        for seen in stream:
            found.append(seen)
            if time.monotonic() - start > 1.0:
                break
    counts = [sum(seen.source == name for seen in found) for name in stream.names]
    assert min(counts) > 15 and max(counts) - min(counts) <= 2
    assert np.percentile([seen.age_ms for seen in found], 90) < 2 * 20 + 2 * 30
    for stats in stream.stats():
        assert adds_up(stats) and stats.dropped > 0 and stats.state == "closed"
    assert "geheim" not in str(stream.stats())


def test_small_batches_take_turns() -> None:
    model = Model(0.005)
    fakes = Fakes(*(Fake(live=False) for _ in range(3)))
    files = [SourceSpec("video", f"{n}.mp4") for n in range(3)]
    with Stream(model, files, batch=2, opens=fakes) as stream:
        found = list(itertools.islice(stream, 60))
    counts = [sum(seen.source == name for seen in found) for name in stream.names]
    assert counts == pytest.approx([20, 20, 20], abs=3)
    assert max(count for count, _ in model.batches) == 2


def test_frames_of_other_channel_orders_are_classified_in_one_run() -> None:
    model = Model()
    fakes = Fakes(Fake(3, live=False), Fake(3, live=False, color="rgb"))
    files = [SourceSpec("video", "a.mp4"), SourceSpec("video", "b.mp4")]
    with Stream(model, files, opens=fakes) as stream:
        found = list(stream)
    assert sorted(color for _, colors in model.batches for color in colors) == (
        ["bgr"] * 3 + ["rgb"] * 3
    )
    assert any(set(colors) == {"bgr", "rgb"} for _, colors in model.batches)
    assert all(seen.color == ("bgr" if seen.source == "a.mp4" else "rgb") for seen in found)
    with Stream(Model(), FILE, color="gray", opens=Fakes(Fake(3, live=False))) as stream:
        assert list(stream) == []
        assert "a gray frame has" in stream.stats()[0].reason


def test_one_camera_that_hangs_or_dies_holds_nobody_up() -> None:
    hanging = Fake(3, fps=100, hangs=True)

    def opens(spec: SourceSpec, timeout: float) -> Fake:
        if "door0" in spec.address:
            return Fake(fps=100)
        return hanging if "door1" in spec.address else Fake(2, fps=100)

    told: list[tuple[str, str]] = []
    with Stream(
        Model(),
        [camera(n) for n in range(3)],
        stall=0.2,
        opens=opens,
        on_state=lambda source, state, reason: told.append((source, state)),
    ) as stream:
        found = list(itertools.islice(stream, 80))
        gaps = np.diff([seen.wall for seen in found if seen.source == stream.names[0]])
        hanging.freed.set()
    assert gaps.max() < 0.15
    assert (stream.names[1], "stalled") in told and (stream.names[2], "lost") in told
    assert stream.stats()[1].hangs >= 1 and stream.stats()[2].reconnects >= 2


@pytest.mark.realtime
def test_a_real_camera_that_dies_and_stutters_loses_no_frame_uncounted() -> None:
    def script(connection: int) -> Iterator[bytes | float]:
        yield from itertools.islice(steady(100), 30)
        yield b"garbage"
        yield 0.15
        yield jpeg(90, (32, 24))

    before = threading.active_count()
    with MjpegServer(script) as server, Stream(Model(0.02), server.url) as stream:
        found = list(itertools.islice(stream, 40))
        [stats] = stream.stats()
    assert adds_up(stats) and stats.broken >= 1 and stats.reconnects >= 1
    assert len({seen.number for seen in found}) == 40
    assert max(seen.age_ms for seen in found) < 150
    assert not any("edgeclip reads" in thread.name for thread in threading.enumerate())
    assert threading.active_count() <= before + 1


def test_still_scenes_are_not_classified_but_seen() -> None:
    class Scene(Fake):
        def retrieve(self) -> Frame:
            frame = np.full((*self.size, 3), 100, np.uint8)
            if self.count > 20:
                frame[10:20, 10:20] = 200  # something small comes in
            return frame

    model = Model()
    fakes = Fakes(Scene(40, fps=10, live=False))
    with Stream(model, FILE, skip_still=True, opens=fakes) as stream:
        found = []
        for seen in stream:
            found.append(seen)
            if seen.number == 30:
                model.labels = ("shade", "light")
    [stats] = stream.stats()
    fresh = [seen.number for seen in found if not seen.still]
    assert fresh[:2] == [0, 20] and fresh[2] in (31, 32) and len(fresh) == 3
    assert (stats.classified, stats.skipped, len(found)) == (3, 37, 40)
    assert found[10].prediction is found[0].prediction


def test_a_still_scene_is_classified_again_after_a_while() -> None:
    class Scene(Fake):
        def retrieve(self) -> Frame:
            return np.full((*self.size, 3), 100, np.uint8)

    with Stream(
        Model(), FILE, skip_still=True, opens=Fakes(Scene(120, fps=10, live=False))
    ) as stream:
        assert [seen.number for seen in stream if not seen.still] == [0, 50, 100]


def test_other_prompts_of_the_same_names_are_asked_at_once() -> None:
    model = Model()
    with Stream(model, CAMERA, skip_still=300, opens=Fakes(Fake(fps=100))) as stream:
        assert [next(stream).still for _ in range(3)] == [False, True, True]
        model.labels = tuple(list(model.labels))
        until(lambda: not next(stream).still, 1.0)
        assert next(stream).still


def test_a_summary_counts_what_was_under_way_at_the_end() -> None:
    with MjpegServer(lambda connection: steady(100)) as server:
        done = run(cast(Any, Model(0.05)), [server.url], Watch(), seconds=0.7)
    [stats] = done.stats
    assert stats.state == "live" and stats.dropped > 10 and done.why == "after 0.7 s"
    assert stats.seen == stats.classified + stats.dropped + stats.broken


def test_many_sources_that_hang_are_closed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.stream.CLOSING", 0.3)
    hanging = [Fake(0, hangs=True) for _ in range(5)]
    stream = Stream(Model(), [camera(n) for n in range(5)], opens=Fakes(*hanging))
    time.sleep(0.1)
    began = time.monotonic()
    stream.close()
    assert 0.2 < time.monotonic() - began < 1.0
    for fake in hanging:
        fake.freed.set()


def test_a_camera_that_stays_lost_ends_its_labels_and_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.watch.PATIENCE", 0.3)
    monkeypatch.setattr("runtime.stream.TICK", 0.05)
    monkeypatch.setattr("runtime.grabber.FIRST_PAUSE", 0.1)
    told: list[Event] = []
    options = TimelineOptions(smooth=0, enter=0.3, leave=0.2, dwell=0)
    watch = Watch(options, ["dark > 0.5 for 1s"], [Callback(told.append)])
    fakes = Fakes(Fake(3, fps=50), *[FrameError("it is unplugged")] * 4, Fake(fps=50))
    with Stream(Model(), CAMERA, opens=fakes, on_state=watch.state, on_tick=watch.tick) as stream:
        threading.Timer(5.0, stream.stop).start()
        for seen in stream:
            watch.see(seen)
            if fakes.opened > 5:
                break
    watch.close()
    kinds = [event.kind for event in told]
    assert kinds == ["started", "ended", "started", "ended"]  # and the rule has never fired


@pytest.mark.parametrize("fate", [[Fake(fps=50)], []])
def test_it_ticks_whether_frames_come_or_not(
    fate: list[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.stream.TICK", 0.05)
    ticks: list[float] = []
    with Stream(
        Model(), CAMERA, opens=Fakes(*fate), on_tick=lambda: ticks.append(time.monotonic())
    ) as stream:
        threading.Timer(0.6, stream.stop).start()
        for _ in stream:
            pass
    assert 3 <= len(ticks) <= 12


@pytest.mark.parametrize("color", ["bgr", "bgra", "gray", "nv12"])
def test_thumbnails_of_all_channel_orders(color: Color) -> None:
    shape = {"bgr": (48, 64, 3), "bgra": (48, 64, 4), "gray": (48, 64), "nv12": (72, 64)}[color]
    frame = np.full(shape, 90, np.uint8)
    before = thumbnail(frame, color)
    assert before.shape == (32, 32) and (before == 90).all()
    frame[20:24, 30:34] = 180
    assert changed(before, thumbnail(frame, color))
    noise = np.random.default_rng(0).integers(-8, 9, shape)
    assert not changed(before, thumbnail((90 + noise).astype(np.uint8), color))


def test_it_stops_from_another_thread() -> None:
    with Stream(Model(), CAMERA, opens=Fakes(Fake(1, hangs=False))) as stream:
        threading.Timer(0.1, stream.stop).start()
        assert len(list(stream)) == 1  # and waits for the camera no longer


def test_it_stops_while_frames_come() -> None:
    stream = Stream(Model(), CAMERA, opens=Fakes(Fake(fps=200)))
    for seen in stream:
        if seen.number >= 5:
            stream.close()
    assert stream.stats()[0].state == "closed"


def test_what_kept_every_source_from_being_read_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="holds no pictures"):
        list(Stream(Model(), tmp_path))
    fakes = Fakes(BackendUnavailable("no GStreamer"))
    with pytest.raises(BackendUnavailable, match="no GStreamer"):
        list(Stream(Model(), CAMERA, opens=fakes))
    with Stream(Model(), [tmp_path, FILE], opens=Fakes(FrameError("x"), Fake(2, live=False))) as s:
        assert len(list(s)) == 2
        assert "x" in {stats.reason for stats in s.stats()}


def test_the_same_source_twice_has_two_names(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(solid(9))
    with Stream(Model(), [tmp_path, tmp_path]) as stream:
        assert stream.names == [str(tmp_path), f"{tmp_path} (2)"]
        assert {seen.source for seen in stream} == set(stream.names)


@pytest.mark.parametrize(
    "sources, options, message",
    [
        ([], {}, "needs a source"),
        ("0", {"fps": 0}, "fps=0 is not"),
        ("0", {"fps": float("nan")}, "fps=nan is not"),
        ("0", {"batch": 0}, "batch=0 is not"),
        ("0", {"stall": 0}, "stall=0 is not"),
        (["-?width=2&height=2", "-?width=4&height=2"], {}, "the standard input is one source"),
        (SourceSpec("pictures", "x"), {"realtime": True}, "realtime needs fps"),
        ("ftp://x", {}, "is not a source"),
    ],
)
def test_a_wrong_stream_is_said(sources: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Stream(Model(), sources, **options)  # type: ignore[arg-type]
