"""Which backend runs a bundle fastest on this CPU, and in which precision: candidates are timed
when a bundle is first loaded here, and what was found is remembered."""

import contextlib
import ctypes
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from .backends import Encoder
from .conditions import MIB, free_memory
from .errors import BackendUnavailable, UnsupportedFormat
from .frames import Frame
from .manifest import FileEntry
from .remembered import place, recall, remember, this_machine

KIND = "fastest"
SECONDS = 1.0  # of timing, for all candidates together
RUNS = 20  # of one candidate at most
FAR = 1.5  # times the best time: such a candidate is not timed further
NEEDS = 3  # times the bytes of its file: the memory that opening a candidate may take


class Candidate(NamedTuple):
    """A backend and a precision of the image encoder."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.precision} on {self.backend}"


class Timed(msgspec.Struct, frozen=True):
    """A candidate's shortest time for a frame, in milliseconds."""

    backend: str
    precision: str
    ms: float

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.backend, self.precision)

    def __str__(self) -> str:
        return f"{self.candidate} {self.ms:.1f} ms"


class Choice(msgspec.Struct, frozen=True):
    """What was timed, the fastest first, and why the others were not; of these by name the ones
    that there was too little memory for."""

    timed: tuple[Timed, ...]
    left_out: tuple[str, ...] = ()
    too_large: tuple[str, ...] = ()


def choose(
    files: Mapping[Candidate, FileEntry],
    frame: Frame,
    threads: int | None,
    check: Callable[[], object],
    opened: Callable[[Candidate], Encoder],
) -> tuple[Choice, str]:
    """What is fastest here among candidates, each with its file, and in words how that is known.

    `frame` is uint8 [1, H, W, 3]. Before anything is measured `check` raises what is wrong with the
    bundle. `opened` opens a candidate; where it raises BackendUnavailable or UnsupportedFormat the
    candidate is left out. Raises the first of these where none is left.

    Remembered is only what holds the next time: not where a backend failed, and not for longer than
    memory is short.
    """
    hashes = {str(candidate): file.sha256 for candidate, file in files.items()}
    key = {"format": 1, "files": hashes, "threads": threads, **this_machine()}
    skipped, known = _too_large(files), recall(KIND, key, Choice)
    if known and _still_holds(known, files, skipped):
        return known, f"measured before; remembered in {place(KIND, key)}"
    check()
    choice, failed = _measured(files, skipped, frame, opened)
    if any(isinstance(error, BackendUnavailable) for error in failed):
        return choice, "measured now; not remembered: what failed may work the next time"
    return choice, f"measured now; {remember(KIND, key, choice)}"


def _still_holds(
    known: Choice, files: Mapping[Candidate, FileEntry], skipped: Mapping[Candidate, str]
) -> bool:
    """Whether it is of these candidates, and what had no room then has none now."""
    of_these = {one.candidate for one in known.timed} <= set(files)
    return bool(known.timed) and of_these and set(known.too_large) <= {*map(str, skipped)}


def _measured(
    files: Mapping[Candidate, FileEntry],
    skipped: Mapping[Candidate, str],
    frame: Frame,
    opened: Callable[[Candidate], Encoder],
) -> tuple[Choice, list[Exception]]:
    """Opens, times and closes one candidate after the other: memory holds one at a time. Returns
    also what those raised that failed."""
    timed: list[Timed] = []
    failed: dict[Candidate, Exception] = {}
    for candidate in files:
        if candidate in skipped:
            continue
        best = min((one.ms for one in timed), default=float("inf"))
        try:
            ms = _milliseconds(opened(candidate), frame, SECONDS / len(files), best)
            timed.append(Timed(*candidate, ms))
        except (BackendUnavailable, UnsupportedFormat) as error:
            failed[candidate] = error
        trim_memory()
    if not timed:
        raise next(iter(failed.values()))
    left_out = [f"{name} was left out: {why}" for name, why in {**failed, **skipped}.items()]
    fastest_first = tuple(sorted(timed, key=lambda one: one.ms))
    choice = Choice(fastest_first, tuple(left_out), tuple(map(str, skipped)))
    return choice, list(failed.values())


def _milliseconds(encoder: Encoder, frame: Frame, seconds: float, best: float) -> float:
    """The shortest of some runs, one at least: what else the machine does only adds to a time."""
    shortest, end = float("inf"), time.perf_counter() + seconds
    for run in range(RUNS):
        start = time.perf_counter()
        encoder(frame)
        now = time.perf_counter()
        shortest = min(shortest, 1e3 * (now - start))
        if now >= end or (run and shortest > FAR * best):
            break
    return round(shortest, 3)


def _too_large(files: Mapping[Candidate, FileEntry]) -> dict[Candidate, str]:
    """Those that this device may not have the memory for, but never the smallest: to try them could
    end the process."""
    free, smallest = free_memory(), min(file.bytes for file in files.values())
    return {
        candidate: f"it may take {NEEDS * file.bytes // MIB} MiB, and {free // MIB} are free"
        for candidate, file in files.items()
        if free is not None and NEEDS * file.bytes > free and file.bytes > smallest
    }


def noise(height: int, width: int) -> Frame:
    """A frame to time encoders on, uint8 [1, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def trim_memory() -> None:
    """Has the C library give back what it keeps of freed memory, hundreds of MiB after a large
    encoder. Only glibc has this call, and keeps so much."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
