"""`edgeclip bench --cameras`: how many cameras a machine carries."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_cli import Edgeclip, edgeclip
from test_stream import Model

from runtime import camera_bench as module
from runtime.camera_bench import CameraRow, measure, most_cameras
from runtime.camera_bench_cli import verdict
from runtime.errors import FrameError
from runtime.frames import Color, Colors, Frame
from runtime.made_cameras import ClipCamera, MadeCamera, check_clip
from runtime.prediction import Prediction
from runtime.source_uri import SourceSpec

__all__ = ["edgeclip"]  # the fixture
BLACK: list[tuple[Frame, Color]] = [(np.zeros((48, 64, 3), np.uint8), "rgb")]


@pytest.fixture(autouse=True)
def _settles_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLE", 0.1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> SourceSpec:
    """Five frames, 50 a second, each brighter."""
    cv2 = pytest.importorskip("cv2")
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 50, (64, 48))
    for level in range(50, 250, 40):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    return SourceSpec("video", str(path))


def row(cameras: int, why: str = "") -> CameraRow:
    return CameraRow(cameras, 15, 15, 0, 2, 3, 0, 1, 0.1, why)


@pytest.mark.realtime
def test_cameras_that_are_carried() -> None:
    model = Model()
    found = measure(model, 3, fps=10, frames=BLACK, seconds=0.9)
    assert found.why == "" and found.cameras == 3
    assert 7 < found.fps_min <= found.fps_mean < 13 and found.dropped == 0
    assert 0 < found.p50_ms <= found.p99_ms < 200 and 0 < found.cpu < 1
    assert {color for _, colors in model.batches for color in colors} == {
        "bgr",
        "rgb",
    }  # to warm up, and the frames'


@pytest.mark.realtime
def test_a_model_that_is_too_slow_drops_frames() -> None:
    found = measure(Model(0.1), 2, fps=40, frames=BLACK, seconds=0.5)
    assert found.dropped > 0.5 and "frames dropped" in found.why
    assert found.inference_ms == pytest.approx(100, rel=0.2)


class Biased(Model):
    """Takes long at times: its frames are old, and none of them dropped."""

    def classify_batch(self, frames: Sequence[Frame], color: Colors = "bgr") -> list[Prediction]:
        self.seconds = 0.0 if len(self.batches) % 5 else 0.09
        return super().classify_batch(frames, color)


@pytest.mark.realtime
def test_frames_that_are_old_are_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DROPPED", 1.0)
    found = measure(Biased(), 1, fps=40, frames=BLACK, seconds=0.6)
    assert "ms old (p99), over" in found.why and found.p99_ms > 80


@pytest.mark.realtime
def test_cameras_that_cannot_be_made_fast_enough_are_said(clip: SourceSpec) -> None:
    found = measure(Model(), 1, fps=1_000_000, clip=clip, seconds=0.3)
    assert "made or decoded in time" in found.why or "dropped" in found.why
    good = measure(Model(), 2, fps=10, clip=clip, seconds=0.5)
    assert good.why == "" and good.fps_mean == pytest.approx(10, rel=0.25)


@pytest.mark.parametrize("limit", [0, 1, 5, 17, 100, 500])
def test_the_greatest_number_is_searched(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def measured(classifier: object, cameras: int, **options: object) -> CameraRow:
        tried.append(cameras)
        return row(cameras, "" if cameras <= limit else "too many")

    monkeypatch.setattr(module, "measure", measured)
    rows = list(most_cameras(Model()))
    assert len(tried) == len(set(tried)) <= 14
    good = max((found.cameras for found in rows if not found.why), default=0)
    assert good == limit if limit < 32 else limit * 15 // 16 <= good <= limit or good == 128


def test_the_verdict_is_a_sentence() -> None:
    assert verdict([row(4)]) == "4 cameras are carried"
    assert verdict([row(1), row(2, "5% dropped")]) == "1 camera is carried (2: 5% dropped)"
    assert verdict([row(1, "too old")]) == "not carried (1: too old)"


@pytest.mark.realtime
def test_made_cameras_keep_time_and_end_when_they_are_told(clip: SourceSpec) -> None:
    camera = MadeCamera(BLACK, 50)
    start = time.monotonic()
    assert all(camera.grab() for _ in range(10)) and camera.retrieve() is BLACK[0][0]
    assert 0.17 < time.monotonic() - start < 0.4
    camera.interrupt()
    assert not camera.grab()
    player = ClipCamera(clip, 500)
    levels = [round(float(player.retrieve().mean()), -1) for _ in range(12) if player.grab()]
    player.close()
    assert levels == [50, 90, 130, 170, 210] * 2 + [50, 90]
    assert check_clip(clip) == (64, 48, 50)
    with pytest.raises(FrameError, match="not a video"):
        check_clip(SourceSpec("video", __file__))


def test_the_command_prints_a_table_or_json(edgeclip: Edgeclip, bundle: Path) -> None:
    base = ["bench", bundle, "--backend", "onnxruntime", "--precision", "fp32", "--size", "64x48"]
    run = edgeclip(*base, "--cameras", 2, "--seconds", 0.3, "--json")
    report = json.loads(run.stdout)
    assert report["fps"] == 15 and report["size"] == [64, 48] and report["source"] is None
    assert [found["cameras"] for found in report["rows"]] == [2]
    assert report["verdict"] and "carried" in report["rows"][0]
    run = edgeclip(*base, "--cameras", 1, "--fps", 30, "--seconds", 0.3)
    assert "Cameras of 30 frames/s, 64x48, from memory" in run.stdout
    assert "carried" in run.stdout.splitlines()[-2]


def test_mistakes_are_said(edgeclip: Edgeclip, bundle: Path, tmp_path: Path) -> None:
    for message, *options in (
        ("neither a number from 1 to 128 nor most", "--cameras", "many"),
        ("neither a number", "--cameras", 0),
        ("--fps does not go without --cameras", "--fps", 5),
        ("--out does not go with --cameras", "--cameras", 1, "--out", tmp_path / "o"),
        ("is no video", "--cameras", 1, "--source", "rtsp://host/x"),
        ("no file or folder", "--cameras", 1, "--source", tmp_path / "none.mp4"),
    ):
        assert message in edgeclip("bench", bundle, *options, code=2).stderr
