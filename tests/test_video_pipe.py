"""H.264 by the command ffmpeg, where it is; MPEG-4 part 2, and a word about it, where it is not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_timeline import read_video

from runtime.errors import BackendUnavailable
from runtime.video_out import VideoOut, note_of
from runtime.video_pipe import H264Writer, has_h264

cv2 = pytest.importorskip("cv2")
with_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no ffmpeg")


@pytest.fixture(autouse=True)
def _looks_anew() -> Iterator[None]:
    has_h264.cache_clear()
    yield
    has_h264.cache_clear()


def written(path: Path) -> str:
    """A second of frames, one brighter than the other; returns the codec."""
    out = VideoOut(path, fps=10)
    for number in range(10):
        out.write(np.full((49, 65, 3), 50 + 10 * number, np.uint8), number / 10)
    assert out.close() == path and [one.name for one in path.parent.iterdir()] == [path.name]
    fps, means = read_video(path)
    assert fps == 10 and means == pytest.approx(range(50, 150, 10), abs=6)
    capture = cv2.VideoCapture(str(path))
    code = int(capture.get(cv2.CAP_PROP_FOURCC))
    capture.release()
    return code.to_bytes(4, "little").decode()


@with_ffmpeg
def test_an_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    assert written(tmp_path / "out.mp4") in ("avc1", "h264") and note_of(Path("out.mp4")) == ""
    moov = (tmp_path / "out.mp4").read_bytes().index(b"moov")
    assert moov < (tmp_path / "out.mp4").read_bytes().index(b"mdat")  # it plays while it loads


def test_without_ffmpeg_it_is_written_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert written(tmp_path / "out.mp4") == "FMP4"
    assert "apt install ffmpeg" in note_of(Path("out.mp4")) and note_of(Path("out.webm")) == ""


def test_a_webm_is_what_browsers_play(tmp_path: Path) -> None:
    assert written(tmp_path / "out.webm") == "VP80"


def test_what_ffmpeg_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "ffmpeg"
    fake.write_text('#!/bin/sh\necho " V... libx264 "; echo "No space left" >&2; exit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/bin:/usr/bin")
    assert has_h264()
    writer = H264Writer(tmp_path / "out.mp4", 10, (640, 480))
    with pytest.raises(BackendUnavailable, match="ffmpeg cannot write out.mp4: No space left"):
        for _ in range(100):
            writer.write(np.zeros((480, 640, 3), np.uint8))
    (tmp_path / "out").mkdir()
    out = VideoOut(tmp_path / "out" / "out.mp4", fps=10)
    for _ in range(2):  # also where it goes on all the same
        with pytest.raises(BackendUnavailable, match="ffmpeg cannot write out.mp4: No space left"):
            for number in range(100):
                out.write(np.zeros((480, 640, 3), np.uint8), number / 10)
    with pytest.raises(BackendUnavailable, match="ffmpeg cannot write out.mp4: No space left"):
        out.close()
    out.discard()
    assert list((tmp_path / "out").iterdir()) == []


CHILD = """
import sys, time, numpy as np
from pathlib import Path
from runtime.video_pipe import H264Writer
writer = H264Writer(Path(sys.argv[1]), 10, (64, 48))
for _ in range(10):
    writer.write(np.zeros((48, 64, 3), np.uint8))
try:
    print("ready", flush=True)
    time.sleep(10)
except KeyboardInterrupt:
    writer.release()
"""


@with_ffmpeg
def test_ctrl_c_ends_the_video_and_does_not_break_it(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout and child.stdout.readline() == "ready\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    assert child.wait(20) == 0
    child.stdout.close()
    assert len(read_video(path)[1]) == 10
