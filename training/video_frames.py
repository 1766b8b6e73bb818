"""Videos as pictures: frames at an even rate, without near-duplicates, in a folder of files."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from calibration.likeness import Distinct
from runtime.errors import DataError, FrameError
from runtime.folders import new_folder
from runtime.frames import Frame
from runtime.sources import check_name, frames_of

SIDE = 512  # pixels at most, of the short side: more than any model's crops need
WINDOW = 1000  # so many frames before it a frame is held against
QUALITY = 95
_LIST = "frames.json"


def frames_of_video(video: Path, fps: float, room: Path) -> tuple[list[Path], str]:
    """The frames of a video at `fps` a second as JPEG files, in a folder of `room` that is found
    again. Near-duplicates of one that is there (`calibration.likeness`) are left out.

    What can be decoded of a damaged video is used; also returned is what is wrong with it, or the
    empty text. Raises DataError where nothing can be used, or where the video says no frame rate.
    """
    folder = room / _key(video, fps)
    if not (folder / _LIST).is_file():
        every = _every(video, fps)
        with new_folder(folder, _LIST, True) as made:
            count, fault = _write(video, every, made)
            if not count:
                raise DataError(f"no frame of {video} can be used: {fault}")
            note = {"video": str(video), "fps": fps, "every": every, "fault": fault, "count": count}
            (made / _LIST).write_text(json.dumps(note) + "\n", encoding="utf-8")
    fault = json.loads((folder / _LIST).read_text(encoding="utf-8"))["fault"]
    return sorted(folder.glob("*.jpg")), fault


def _key(video: Path, fps: float) -> str:
    stat = video.stat()
    what = os.path.realpath(video), stat.st_size, stat.st_mtime_ns, fps, SIDE
    return f"{video.stem}-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"


def _every(video: Path, fps: float) -> int:
    import cv2

    check_name(video)
    capture = cv2.VideoCapture(str(video))
    try:
        rate = float(capture.get(cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    if not (math.isfinite(rate) and 0 < rate <= 1000):
        raise DataError(
            f"{video} is no video that can be read, or says no frame rate: write it anew "
            "(ffmpeg -i), or take its frames out into a folder"
        )
    return max(1, round(rate / fps))


def _write(video: Path, every: int, folder: Path) -> tuple[int, str]:
    """How many frames were written, and what is wrong with the video, if anything."""
    count, seen = 0, Distinct(WINDOW)
    try:
        for number, frame in _frames(video, every):
            if not seen.add(frame):
                continue
            image = Image.fromarray(frame)
            scale = SIDE / min(image.size)
            if scale < 1:
                image = image.resize((round(image.width * scale), round(image.height * scale)))
            image.save(folder / f"{number:08d}.jpg", quality=QUALITY)
            count += 1
            if count % WINDOW == 0:
                seen = Distinct(WINDOW)
    except FrameError as error:
        return count, str(error)
    return count, ""


def _frames(video: Path, every: int) -> Iterator[tuple[int, Frame]]:
    for turn, (_, frame, color) in enumerate(frames_of(video, every)):
        yield turn * every, frame[..., ::-1] if color == "bgr" else frame
