"""H.264 through the command `ffmpeg`: browsers play it, and OpenCV's own FFmpeg cannot write it."""

import contextlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from .errors import BackendUnavailable
from .frames import Frame


@cache
def has_h264() -> bool:
    """Whether there is an `ffmpeg` with x264."""
    if not shutil.which("ffmpeg"):
        return False
    asked = ["ffmpeg", "-hide_banner", "-encoders"]
    return b" libx264 " in subprocess.run(asked, capture_output=True, check=False).stdout


class H264Writer:
    """Writes BGR frames [height, width, 3] of one size with even sides into an MP4 file, for as
    little work as MPEG-4 part 2 takes. Raises BackendUnavailable where ffmpeg fails, which calls
    the file `name`."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int], name: str = "") -> None:
        told = f"-nostdin -loglevel error -y -f rawvideo -pix_fmt bgr24 -s {size[0]}x{size[1]}"
        coded = "-c:v libx264 -preset ultrafast -crf 23 -pix_fmt yuv420p -movflags +faststart"
        command = ["ffmpeg", *told.split(), "-r", f"{fps:g}", "-i", "-", *coded.split()]
        self._name, self._why = name or path.name, ""
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [*command, f"file:{path}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C is for this process, which ends the video itself
        )

    def write(self, frame: Frame) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(np.ascontiguousarray(frame).data)
        except (BrokenPipeError, ValueError):  # it has ended, or was
            self.release()

    def release(self) -> None:
        """Ends the file."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit code says so
            self._process.stdin.close()
        failed = self._process.wait()
        if not self._said.closed:
            with self._said as said:
                said.seek(0)
                self._why = said.read().decode(errors="replace").strip().partition("\n")[0]
        if failed:
            raise BackendUnavailable(f"ffmpeg cannot write {self._name}: {self._why}")
