"""How fast a bundle is on this machine: backends and precisions, in turns within one run.

import runtime.bench

for row in runtime.bench.bench("bundle", backend="all", precision="all"):
    print(row.backend, row.precision, row.error or row.stages["total"].p50)
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from .backends import NAMES, ON_CPU
from .bundle import Bundle
from .classifier import Classifier
from .conditions import MIB, process_memory
from .cuda import Cuda, open_cuda
from .errors import BackendUnavailable, BundleError, DataError, EdgeClipError
from .frames import MAX_PIXELS, Color, Frame
from .prompts import PromptBank
from .sources import find_files, frames_of

MOST_FRAMES = 16
TURNS = 10
LABELS = 100  # of a bundle without a prompt bank
Tell = Callable[[str], None]
Frames = Sequence[tuple[Frame, Color]]


@dataclass(frozen=True)
class Spread:
    """Percentiles of times in milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Row:
    """What a backend reached in a precision; `error` says why it did not run.

    `load_ms` is the time to a classifier that is ready, `first_ms` that of its first frame after
    it. `rss_growth_mib` is by how much both let this process grow, `gpu_growth_mib` by how much the
    GPU's free memory shrank; None where nothing tells. `stages` are preprocess, encode, head and
    total, and for `tensorrt` the GPU's own times of upload, engine and download. `runs` says what
    ran, `notes` why "auto" took nothing else.
    """

    backend: str
    precision: str
    error: str = ""
    runs: str = ""
    notes: tuple[str, ...] = ()
    load_ms: float = 0.0
    first_ms: float = 0.0
    rss_growth_mib: float | None = None
    gpu_growth_mib: float | None = None
    frames: int = 0
    frames_per_second: float = 0.0
    stages: dict[str, Spread] = field(default_factory=dict)


class _Contender:
    """A classifier on its turns, with what was measured of it so far."""

    def __init__(self, classifier: Classifier, row: Row) -> None:
        self.classifier, self.row = classifier, row
        self._times: dict[str, list[float]] = {}
        self._next = 0

    def turn(self, frames: Frames, seconds: float) -> None:
        """Classifies frames for so long, one at least, after one that does not count: another
        contender has emptied the caches."""
        self._classified(frames)
        end = time.perf_counter() + seconds
        while True:
            for stage, ms in self._classified(frames).items():
                self._times.setdefault(stage, []).append(ms)
            if time.perf_counter() >= end:
                break
        frame, color = frames[0]
        for stage, ms in self.classifier.gpu_stages(frame, color).items():
            self._times.setdefault(f"GPU {stage}", []).append(ms)

    def _classified(self, frames: Frames) -> dict[str, float]:
        frame, color = frames[self._next % len(frames)]
        self._next += 1
        start = time.perf_counter()
        timings = self.classifier.classify(frame, color).timings
        return {**timings, "total": (time.perf_counter() - start) * 1e3}

    def result(self) -> Row:
        totals = self._times["total"]
        return replace(
            self.row,
            frames=len(totals),
            frames_per_second=1e3 / float(np.mean(totals)),
            stages={stage: _spread(times) for stage, times in self._times.items()},
        )


def bench(
    bundle: str | Path,
    *,
    backend: str = "auto",
    precision: str = "auto",
    frames: Frames = (),
    seconds: float = 5.0,
    threads: int | None = None,
    tell: Tell = lambda _: None,
) -> list[Row]:
    """Measures a backend, or "all", in a precision, "auto", or "all" that the bundle accepts, for
    so many seconds each. `frames` are arrays and their colour orders; by default `camera_frame()`.

    All are loaded first, then classify in turns, a frame at a time: what slows the machine for a
    while slows all of them. Of "all", what cannot run is a row with an error. Raises what
    `runtime.load` does where a backend that was named cannot run.
    """
    opened = Bundle(bundle)
    frames = frames or [(camera_frame(), "bgr")]
    strict = "all" not in (backend, precision)
    entries: list[Row | _Contender] = []
    for name, level in _pairs(opened, backend, precision):
        tell(f"Loading {name}, {level}")
        try:
            entries.append(_opened(opened.folder, name, level, frames[0], threads))
        except EdgeClipError as error:
            entries.append(_failed(Row(name, level), error, strict))
    _require_one(entries, backend)
    for turn in range(TURNS):
        tell(f"Measuring, turn {turn + 1} of {TURNS}")
        for place, entry in enumerate(entries):
            if isinstance(entry, Row):
                continue
            try:
                entry.turn(frames, seconds / TURNS)
            except BackendUnavailable as error:
                entries[place] = _failed(entry.row, error, strict)
    _require_one(entries, backend)
    return [e.result() if isinstance(e, _Contender) else e for e in entries]


def _pairs(bundle: Bundle, backend: str, precision: str) -> Iterator[tuple[str, str]]:
    have = bundle.manifest.precisions
    if precision not in ("auto", "all", *have):
        raise BundleError(
            f"{bundle.folder} has no precision {precision!r}; it has: {', '.join(have)}"
        )
    accepted = [name for name, entry in have.items() if entry.status == "accepted"]
    for name in NAMES if backend == "all" else [backend]:
        for level in accepted if precision == "all" else [precision]:
            yield name, level


def _failed(row: Row, error: EdgeClipError, strict: bool) -> Row:
    if strict:
        raise error
    return replace(row, error=str(error))


def _require_one(entries: Sequence[Row | _Contender], backend: str) -> None:
    """A backend that was named has to run in one precision at least."""
    errors = [entry.error for entry in entries if isinstance(entry, Row)]
    if backend != "all" and len(errors) == len(entries):
        raise BackendUnavailable(errors[0] if errors else "the bundle accepts no precision")


def _opened(
    folder: Path, backend: str, precision: str, first: tuple[Frame, Color], threads: int | None
) -> _Contender:
    """A contender that has classified a frame."""
    gc.collect()
    memory = process_memory()
    cuda = None if backend in ON_CPU else _cuda()
    free, start = cuda and cuda.memory()[0], time.perf_counter()
    opened = Bundle(folder)
    classifier = Classifier(opened, backend=backend, precision=precision, threads=threads)
    give_labels(classifier)
    loaded = time.perf_counter()
    classifier.classify(*first)
    done, after = time.perf_counter(), process_memory()
    if classifier.backend in ON_CPU:
        cuda = None
    row = Row(
        classifier.backend,
        classifier.precision,
        runs=repr(classifier),
        notes=classifier.notes,
        load_ms=(loaded - start) * 1e3,
        first_ms=(done - loaded) * 1e3,
        rss_growth_mib=after[0] - memory[0] if after and memory else None,
        gpu_growth_mib=(free - cuda.memory()[0]) / MIB if cuda and free else None,
    )
    return _Contender(classifier, row)


def _cuda() -> Cuda | None:
    """CUDA, to ask it for its memory."""
    try:
        return open_cuda()
    except BackendUnavailable:
        return None


def give_labels(classifier: Classifier) -> None:
    """The bundle's own, or random ones: their number is what takes time."""
    prompts = classifier.bundle.manifest.prompts
    if prompts:
        classifier.use_prompts("default" if "default" in prompts else next(iter(prompts)))
        return
    dim = classifier.bundle.manifest.model.embedding_dim
    rows = np.random.default_rng(0).standard_normal((LABELS, dim)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    classifier.bank = PromptBank(tuple(f"label {n}" for n in range(LABELS)), rows, (), "")


def _spread(times: Sequence[float]) -> Spread:
    return Spread(*(float(value) for value in np.percentile(times, (50, 90, 99))))


def camera_frame(width: int = 1920, height: int = 1080, seed: int = 0) -> Frame:
    """What a camera may give, uint8 BGR [height, width, 3]: gradients, texture of several sizes and
    a sensor's noise. Raises DataError for a size that is not one of frames."""
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise DataError(f"a frame of {width} x {height} pixels: at most {MAX_PIXELS:,} are read")
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 60, width)[:, None] + np.linspace(0, 60, height)[:, None, None]
    picture = np.broadcast_to(ramp, (height, width, 3)).astype(np.int16)
    for cell in (96, 24, 6):
        size = (height // cell + 2, width // cell + 2, 3)
        texture = Image.fromarray(rng.integers(0, 60, size, dtype=np.uint8))
        picture += np.asarray(texture.resize((width, height), Image.Resampling.BICUBIC))
    picture += rng.integers(-8, 9, picture.shape, dtype=np.int16)
    return picture.clip(0, 255).astype(np.uint8)


def read_frames(paths: list[Path]) -> list[tuple[Frame, Color]]:
    """The first frames of pictures, videos and folders of them, 16 at most, to keep in memory.

    Raises FrameError where one cannot be read.
    """
    frames = (frame for path in find_files(paths) for frame in frames_of(path))
    return [(frame, color) for _, frame, color in islice(frames, MOST_FRAMES)]
