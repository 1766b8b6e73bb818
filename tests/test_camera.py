"""deploy/camera.py: a camera that is lost is opened again, one that hangs ends the script."""

import importlib.util
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, square


class Cameras:
    """Stands for cv2.VideoCapture: each camera gives as many red frames as is said, then fails;
    after the last, opening one hangs."""

    def __init__(self, *lengths: int) -> None:
        self._lengths, self._left = list(lengths), 0
        self.sources: list[object] = []
        self.hangs, self._answer = threading.Event(), threading.Event()

    def __call__(self, source: object, *_: object) -> "Cameras":
        self.sources.append(source)
        if not self._lengths:
            self.hangs.set()
            self._answer.wait()
        self._left = self._lengths.pop(0)
        return self

    def read(self) -> tuple[bool, Any]:
        self._left -= 1
        frame = square((220, 40, 40), np.random.default_rng(0))[..., ::-1]
        return (True, frame) if self._left >= 0 else (False, None)

    def release(self) -> None:
        pass


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("camera", ROOT / "deploy" / "camera.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RETRY", 0.2)  # time to take the frame
    return module


def test_frames_become_lines_and_a_lost_camera_is_opened_again(
    camera: ModuleType,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cameras = Cameras(0, 1, 1)
    monkeypatch.setattr(camera.cv2, "VideoCapture", cameras)
    camera.main([str(bundle), "--frames", "2"])
    assert cameras.hangs.wait(10)
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["label"] for line in lines] == ["red", "red"]
    assert set(lines[0]) == {"time", "label", "score", "unknown", "ms"}
    assert cameras.sources[:3] == [0, 0, 0] and "opening it again" in shown.err


def test_a_camera_that_hangs_ends_the_script(
    camera: ModuleType, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras = Cameras()
    monkeypatch.setattr(camera.cv2, "VideoCapture", cameras)
    monkeypatch.setattr(camera, "HANGS", 0.1)
    with pytest.raises(SystemExit, match=r"no frame came from rtsp://x for 0\.1 s"):
        camera.main([str(bundle), "rtsp://x"])


def test_a_wrong_bundle_is_said_in_one_line(camera: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no bundle folder"):
        camera.main([str(tmp_path / "none")])
