"""`edgeclip stream` on real files, from the command line to what it leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, ROOT, square
from PIL import Image
from test_cli import Edgeclip, edgeclip

__all__ = ["edgeclip"]  # the fixture
cv2 = pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of a red square, three of a blue one; 10 frames a second."""
    path = tmp_path_factory.mktemp("video") / "squares.avi"
    rng = np.random.default_rng(3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for color in ("red", "blue"):
        for _ in range(30):
            writer.write(np.ascontiguousarray(square(COLORS[color], rng, 64)[..., ::-1]))
    writer.release()
    return path


def test_a_video_becomes_events_a_video_and_a_timeline(
    edgeclip: Edgeclip, bundle: Path, video: Path, tmp_path: Path
) -> None:
    run = edgeclip(
        "stream", bundle, "--source", video, "--save", tmp_path / "out.mp4",
        "--timeline", tmp_path / "out.png", "--events", tmp_path / "out.jsonl",
        "--rule", "blue > 0.5 for 1s", "--thumbnails", 32, "--precision", "fp32",
        "--backend", "onnxruntime",
    )  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    told = {(event["event"], event["label"]) for event in events}
    assert {("started", "red"), ("ended", "red"), ("started", "blue"), ("ended", "blue"),
            ("fired", "blue > 0.5 for 1s"), ("cleared", "blue > 0.5 for 1s")} <= told  # fmt: skip
    assert all(event["duration"] >= 1 for event in events if event["event"] == "ended")
    assert [e["label"] for e in events if "thumbnail" in e] == ["red", "blue"]
    assert len(run.stdout.splitlines()) == len(events)
    assert "all sources have ended" in run.stderr and "Traceback" not in run.stderr
    capture = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (60, 10)
    capture.release()
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1200
    assert {path.name for path in tmp_path.iterdir()} == {"out.mp4", "out.png", "out.jsonl"}


def test_json_is_a_line_for_each_frame_and_event(
    edgeclip: Edgeclip, bundle: Path, video: Path
) -> None:
    run = edgeclip("stream", bundle, "--source", video, "--json", "--every", 1, "--dwell", 0.3)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["time"] for line in lines if "frame" in line] == [0, 1, 2, 3, 4, 5]
    assert {line["label"] for line in lines if "event" in line} == {"red", "blue"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    number: signal.Signals, bundle: Path, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    command = [sys.executable, "-c", "from export.cli import main; main()", "stream", str(bundle),
               "--source", str(video), "--realtime", "--save", str(out), "--json",
               "--precision", "fp32", "--backend", "onnxruntime"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert ("interrupted" if number == signal.SIGINT else "SIGTERM") in said
    capture = cv2.VideoCapture(str(out))
    assert 1 <= capture.get(cv2.CAP_PROP_FRAME_COUNT) < 60
    capture.release()
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_mistakes_are_said_before_anything_is_done(
    edgeclip: Edgeclip, bundle: Path, video: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.mp4").write_text("mine")
    (tmp_path / "two-door.mp4").write_text("mine")
    base = ["stream", bundle, "--source", video]
    for message, *more in (
        ("exists already", "--save", tmp_path / "out.mp4"),
        (
            "two-door.mp4 exists already",
            "--save",
            tmp_path / "two.mp4",
            "--source",
            "http://127.0.0.1:9/door.mjpg",
        ),
        ("no video that is written", "--save", tmp_path / "out.gif"),
        ("ends in .png", "--timeline", tmp_path / "out.jpg"),
        ("no label or group 'cat'", "--rule", "cat > 0.5"),
        ("leave is not the greater", "--enter", 0.2, "--leave", 0.5),
        ("no address of an MQTT broker", "--mqtt", "http://host"),
        ("cannot be written", "--events", tmp_path / "no" / "out.jsonl"),
        ("no file or folder", "--source", tmp_path / "none.mp4"),
    ):
        run = edgeclip(*base, *more, code=2)
        assert message in run.stderr, (message, run.stderr)
        assert run.stdout == ""
    assert (tmp_path / "out.mp4").read_text() == "mine"


def test_of_a_camera_that_cannot_be_reached_edgeclip_alone_tells(bundle: Path) -> None:
    command = [sys.executable, "-c", "from export.cli import main; main()", "stream", str(bundle),
               "--source", "rtsp://bob:geheim@127.0.0.1:9/x", "--seconds", "0.5",
               "--precision", "fp32", "--backend", "onnxruntime"]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0 and "refused" in run.stderr
    assert "geheim" not in run.stderr
    assert "[tcp @" not in run.stderr and "WARN" not in run.stderr
