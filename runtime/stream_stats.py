"""What became of a source's frames, and how long they took."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from .grabbed import Counters, State

LAST = 1000
"""So many of the newest frames the percentiles are of."""


@dataclass(frozen=True)
class SourceStats:
    """Counters of one source since the stream began.

    seen = classified + skipped + dropped + broken + thinned, but for frames on their way: one that
    is decoded, one that waits and one that is classified; none when the stream was closed.
    `skipped` scenes were still, `dropped` frames replaced by newer ones, or too old when a camera
    died, `thinned` ones passed over for `fps`. Latencies are milliseconds from a frame's arrival to
    its prediction, of the newest 1000; `fps` is of the same, the predictions a second.
    """

    source: str
    state: State
    reason: str
    seen: int
    classified: int
    skipped: int
    dropped: int
    broken: int
    thinned: int
    reconnects: int
    hangs: int
    fps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Ages:
    """How old frames were when they were classified, and when that was."""

    def __init__(self) -> None:
        self.classified = self.skipped = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=LAST)

    def add(self, now: float, age_ms: float, still: bool) -> None:
        self.skipped += still
        self.classified += not still
        self._times.append((now, age_ms))

    def stats(
        self, source: str, state: State, reason: str, counters: Counters, now: float
    ) -> SourceStats:
        """What became of a source's frames, with the percentiles of their ages."""
        times, ages = zip(*self._times, strict=True) if self._times else ((), ())
        p50, p90, p99 = np.percentile(ages, (50, 90, 99)).tolist() if ages else (0.0, 0.0, 0.0)
        end = now if state in ("stalled", "lost") else times[-1] if times else 0.0
        fps = (len(times) - 1) / (end - times[0]) if len(times) > 1 and end > times[0] else 0.0
        return SourceStats(
            source=source,
            state=state,
            reason=reason,
            seen=counters.seen,
            classified=self.classified,
            skipped=self.skipped,
            dropped=counters.dropped,
            broken=counters.broken,
            thinned=counters.thinned,
            reconnects=counters.reconnects,
            hangs=counters.hangs,
            fps=fps,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
        )
