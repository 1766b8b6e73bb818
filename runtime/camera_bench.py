"""How many cameras a machine carries with a bundle: through `runtime.Stream`, as they would run.

import runtime.camera_bench

for row in runtime.camera_bench.most_cameras(classifier, fps=15):
    print(row.cameras, row.why or "carried")
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .capture import Capture
from .frames import Colors, Frame
from .made_cameras import ClipCamera, MadeCamera
from .prediction import Prediction
from .source_uri import SourceSpec
from .stream import Classifies, Seen, Stream
from .stream_stats import SourceStats

if TYPE_CHECKING:
    from .bench import Frames

MOST = 128
SETTLE = 1.0  # seconds that do not count
DROPPED, UNFAIR = 0.01, 0.10  # so much is still carried
LATE = 0.97  # of the frames that should come: fewer cannot be made, or decoded
Tell = Callable[[str], None]


@dataclass(frozen=True)
class CameraRow:
    """What so many cameras came to. `why` is empty where they are carried: at most 1 % of the
    frames dropped, 99 % of them no older than two frame times and one inference when they were
    classified, no camera served over 10 % less than another, each as fast as it should be.

    `fps_min` and `fps_mean` are predictions a second of a camera; `dropped` and `unfair` shares of
    1; `inference_ms` the median of a run with all that were due; `cpu` the share of all cores that
    this process took, with making and, of a clip, decoding the frames.
    """

    cameras: int
    fps_min: float
    fps_mean: float
    dropped: float
    p50_ms: float
    p99_ms: float
    unfair: float
    inference_ms: float
    cpu: float
    why: str = ""


def most_cameras(
    classifier: Classifies,
    *,
    fps: float = 15.0,
    frames: "Frames" = (),
    clip: SourceSpec | None = None,
    seconds: float = 5.0,
    tell: Tell = lambda _: None,
) -> Iterator[CameraRow]:
    """Yields what 1, 2, 4, ... cameras come to until so many are not carried, then what numbers
    between come to until the greatest that is carried is found (128 at most; of many to 1/16).

    The cameras give `frames` (default: made ones of 1280 x 720) from memory, so that decoding is
    left out, or play a `clip`.
    """
    good, bad, number = 0, MOST + 1, 1
    while bad - good > max(1, good // 16):
        tell(f"Measuring {number} cameras")
        row = measure(classifier, number, fps=fps, frames=frames, clip=clip, seconds=seconds)
        yield row
        good, bad = (good, number) if row.why else (number, bad)
        number = min(2 * good, MOST) if bad > MOST else (good + bad) // 2


def measure(
    classifier: Classifies,
    cameras: int,
    *,
    fps: float = 15.0,
    frames: "Frames" = (),
    clip: SourceSpec | None = None,
    seconds: float = 5.0,
) -> CameraRow:
    """What so many cameras come to in `seconds`, after one that does not count."""
    timed = _Timed(classifier)
    made = frames or made_frames()

    def opens(spec: SourceSpec, timeout: float) -> Capture:
        return MadeCamera(made, fps) if clip is None else ClipCamera(clip, fps)

    names = {f"camera {n + 1}": SourceSpec("rtsp", f"camera {n + 1}") for n in range(cameras)}
    with Stream(timed, names, opens=opens) as stream:
        for _ in _seen_for(stream, SETTLE):
            pass
        timed.runs.clear()
        before, cpu, start = stream.stats(), time.process_time(), time.monotonic()
        ages = [seen.age_ms for seen in _seen_for(stream, seconds)]
        after, cpu, took = stream.stats(), time.process_time() - cpu, time.monotonic() - start
    return _row(before, after, ages, timed.runs, took, cpu, fps)


def _seen_for(stream: Stream, seconds: float) -> Iterator[Seen]:
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, stream)


def made_frames(width: int = 1280, height: int = 720) -> "Frames":
    """A few frames that differ, BGR."""
    from .bench import camera_frame

    return [(camera_frame(width, height, seed), "bgr") for seed in range(4)]


class _Timed:
    """A classifier whose runs are timed, in milliseconds."""

    def __init__(self, classifier: Classifies) -> None:
        self._classifier = classifier
        self.runs: list[float] = []

    @property
    def labels(self) -> tuple[str, ...]:
        return self._classifier.labels

    def classify_batch(self, frames: Sequence[Frame], color: Colors = "bgr") -> list[Prediction]:
        start = time.perf_counter()
        found = self._classifier.classify_batch(frames, color)
        self.runs.append((time.perf_counter() - start) * 1e3)
        return found


def _row(
    before: list[SourceStats],
    after: list[SourceStats],
    ages: list[float],
    runs: list[float],
    took: float,
    cpu: float,
    fps: float,
) -> CameraRow:
    pairs = list(zip(before, after, strict=True))
    served = np.array([late.classified - early.classified for early, late in pairs], np.int64)
    seen = sum(late.seen - early.seen for early, late in pairs)
    dropped = sum(late.dropped - early.dropped for early, late in pairs)
    p50, p99 = np.percentile(ages, (50, 99)).tolist() if ages else (0.0, 0.0)
    row = CameraRow(
        cameras=len(pairs),
        fps_min=float(served.min() / took),
        fps_mean=float(served.mean() / took),
        dropped=dropped / max(1, seen),
        p50_ms=p50,
        p99_ms=p99,
        unfair=_unfair(served),
        inference_ms=float(np.median(runs)) if runs else 0.0,
        cpu=cpu / took / (os.cpu_count() or 1),
    )
    return replace(row, why=_why(row, seen / len(pairs), fps * took, 2e3 / fps))


def _unfair(served: NDArray[np.int64]) -> float:
    """How much less than the first the last camera was served, of 1; a frame more or less comes of
    where the measurement begins and ends."""
    most, least = int(served.max()), int(served.min())
    return max(0, most - least - 1) / max(1, most)


def _why(row: CameraRow, came: float, due: float, oldest: float) -> str:
    """What keeps a machine from carrying so many cameras, each of which gave `came` frames of
    those that were due; none is to be older than `oldest` ms and one inference."""
    oldest += row.inference_ms
    if row.dropped > DROPPED:
        return f"{row.dropped:.1%} of the frames dropped"
    if came + 1 < LATE * due:
        return f"only {came / due:.0%} of the frames could be made or decoded in time"
    if row.p99_ms > oldest:
        return f"frames are {row.p99_ms:.0f} ms old (p99), over {oldest:.0f} ms"
    if row.unfair > UNFAIR:
        return f"one camera is served {row.unfair:.0%} less than another"
    return ""
