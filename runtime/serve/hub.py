"""The newest of everything: what the camera loop tells, and where the server's clients find it.

The camera's thread writes it in microseconds and never waits for a client; clients are woken
through the event loop, and take the newest whenever they are ready.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..event import Event
from ..smoother import Scores
from .news import News

if TYPE_CHECKING:
    from ..grabbed import State
    from ..stream import Seen

MOST_EVENTS = 500
BEST = 8  # labels of a source that are told, with their scores


@dataclass(eq=False)
class Newest:
    """What is known of one source. `version` grows with each of its frames."""

    index: int
    source: str
    state: "State" = "connecting"
    reason: str = ""
    version: int = 0
    seen: "Seen | None" = None
    scores: Scores = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    began: dict[tuple[str, bool], float] = field(default_factory=dict)
    """When labels, and rules (True), that are there now began."""

    def row(self) -> dict[str, Any]:
        """For JSON: the newest frame's labels; null before the first one."""
        seen, found = self.seen, self.seen.prediction if self.seen else None
        labels = found.labels if found else ()
        best = sorted(((n, self.scores.get(n, 0.0)) for n in labels), key=lambda pair: -pair[1])
        return {
            "index": self.index,
            "source": self.source,
            "state": self.state,
            "reason": self.reason,
            "time": round(seen.time, 3) if seen else None,
            "wall": round(seen.wall, 3) if seen else None,
            "number": seen.number if seen else None,
            "label": found.label if found else None,
            "score": round(found.score, 4) if found else None,
            "unknown": found.unknown if found else None,
            "active": self.active,
            "scores": [[label, round(score, 4)] for label, score in best[:BEST]],
            "age_ms": round(seen.age_ms, 1) if seen else None,
            "dropped": seen.dropped if seen else 0,
        }


class Hub:
    """The newest of every source, and the last events. It is an output of the watched stream."""

    def __init__(self, names: Sequence[str]) -> None:
        self.sources = [Newest(index, name) for index, name in enumerate(names)]
        self.news, self.event_news = News(), News()
        """Of everything, and of events alone."""
        self.last_frame = time.monotonic()
        self.counts: dict[tuple[str, str], int] = {}
        """Events by source and kind."""
        self._by_name = {source.source: source for source in self.sources}
        self._events: deque[dict[str, Any]] = deque(maxlen=MOST_EVENTS)
        self._next_id = int(time.time() * 1000)  # also after a restart greater than any before
        self._lock = threading.Lock()

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Is told of a frame by the camera's thread."""
        source = self._by_name[seen.source]
        with self._lock:
            source.seen, source.scores, source.active = seen, scores, active
            source.version += 1
        self.last_frame = time.monotonic()
        self.news.tell()

    def event(self, event: Event) -> None:
        """Is told what happened; keeps the newest `MOST_EVENTS`."""
        source = self._by_name[event.source]
        key = event.label, event.kind in ("fired", "cleared")
        with self._lock:
            if event.kind in ("started", "fired"):
                source.began[key] = event.time - event.duration
            else:
                source.began.pop(key, None)
                source.active = [label for label in source.active if label != event.label]
            shown = {"id": self._next_id, "wall": round(time.time(), 3), **event.as_json()}
            self._events.append(shown)
            self._next_id += 1
            kind = event.source, event.kind
            self.counts[kind] = self.counts.get(kind, 0) + 1
        self.event_news.tell()
        self.news.tell()

    def state(self, name: str, state: "State", reason: str) -> None:
        """Is told that a source has become live, lost, ended, ..."""
        source = self._by_name[name]
        with self._lock:
            source.state, source.reason = state, reason
        self.news.tell()

    def close(self) -> None:
        """The stream is over; what it has told stays."""

    def end(self) -> None:
        """Ends all waiting: the server ends."""
        self.news.close()
        self.event_news.close()

    def events(self, after: int | None, limit: int) -> tuple[list[dict[str, Any]], int]:
        """The first `limit` events after the one with the id `after` (None: the newest), and the
        id to go on with."""
        with self._lock:
            known, newest = list(self._events), self._next_id - 1
        if after is None:
            return known[-limit:], newest
        found = [event for event in known if event["id"] > after][:limit]
        return found, found[-1]["id"] if found else newest
