"""What was in a stream, for a summary at the end: when labels were there, and their scores.

It stays small however long a stream runs: of scores it keeps at most `MOST_SAMPLES` of each source,
half as many at twice the distance whenever that is reached, beside one a second of the last half
hour, and of labels the latest `MOST_SPANS`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .event import Event
from .smoother import Scores

MOST_SAMPLES, MOST_SPANS = 2000, 5000
RECENT, RECENT_STEP = 1800, 1.0  # samples of the last half hour, and the seconds between two
Sample = tuple[float, tuple[str, ...], NDArray[np.float32]]


@dataclass(frozen=True)
class Span:
    """A label that was there, or a rule that held, from `start` to `end` in seconds."""

    label: str
    start: float
    end: float
    rule: bool = False


@dataclass
class Past:
    """What a source has shown: its spans, and samples of (time, labels, scores [N])."""

    start: float
    end: float
    frames: int = 0
    spans: deque[Span] = field(default_factory=lambda: deque(maxlen=MOST_SPANS))
    samples: list[Sample] = field(default_factory=list)
    recent: deque[Sample] = field(default_factory=lambda: deque(maxlen=RECENT))
    step: float = 0.0

    def sample(self, time: float, labels: tuple[str, ...], scores: Scores) -> None:
        """Counts a frame, and keeps its scores unless the last ones are less than `step` old."""
        self.end, self.frames = max(time, self.end), self.frames + 1
        wanted = not self.samples or time - self.samples[-1][0] >= self.step
        fresh = not self.recent or time - self.recent[-1][0] >= RECENT_STEP
        if not wanted and not fresh:
            return
        values = np.array([scores.get(label, 0.0) for label in labels], dtype=np.float32)
        if fresh:
            self.recent.append((time, labels, values))
        if wanted:
            self._keep((time, labels, values))

    def _keep(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) > MOST_SAMPLES:
            del self.samples[1::2]
            self.step = (sample[0] - self.start) / (MOST_SAMPLES // 2)

    def curve(self, label: str) -> list[tuple[float, float]]:
        """The (time, score) of a label, 0 while it was not asked for."""
        return [
            (time, float(values[labels.index(label)]) if label in labels else 0.0)
            for time, labels, values in self.samples
        ]


class History:
    """The past of every source, by its name."""

    def __init__(self) -> None:
        self.sources: dict[str, Past] = {}

    def frame(self, source: str, time: float, labels: Sequence[str], scores: Scores) -> None:
        """Notes a frame's smoothed scores."""
        past = self.sources.get(source)
        if past is None:
            past = self.sources[source] = Past(time, time)
        past.sample(time, tuple(labels), scores)

    def event(self, event: Event) -> None:
        """Notes what is over: a label that ended, a rule that was cleared."""
        past = self.sources.get(event.source)
        if past is not None and event.kind in ("ended", "cleared"):
            start = event.time - event.duration
            past.spans.append(Span(event.label, start, event.time, event.kind == "cleared"))
