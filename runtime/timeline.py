"""Labels in time: from the scores of single frames to labels that start, stay and end.

A label starts when its smoothed score has been over `enter` for `dwell` seconds, and ends when the
score falls below `leave` (hysteresis), but not before it was shown for `dwell` seconds. So no label
is ever shorter than the dwell, and one that flickers does not start at all. Everything is driven by
the frames' own times: the same frames give the same events.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .errors import DataError
from .event import Event, Kind
from .frames import Color, Frame
from .prediction import Prediction
from .smoother import Scores, Smoother
from .thumbnail import thumbnail


@dataclass(frozen=True)
class TimelineOptions:
    """How calm labels are in time."""

    smooth: float = 0.5
    """Time constant of the smoothing in seconds; 0: none."""
    enter: float = 0.5
    """The smoothed score over which a label may start."""
    leave: float = 0.35
    """The smoothed score below which it ends; at most `enter`."""
    dwell: float = 1.0
    """Seconds for which a label must be over `enter`, and for which it then stays at least."""

    def __post_init__(self) -> None:
        for name in ("smooth", "dwell"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise DataError(f"{name} is a time of 0 seconds or more, not {value:g}")
        if not 0 <= self.leave <= self.enter <= 1:
            raise DataError(
                f"labels enter over {self.enter:g} and leave below {self.leave:g}: give scores of "
                "0 to 1, of which leave is not the greater"
            )


@dataclass
class _Stay:
    """A label over `enter`: since when, from when on it was shown, and the sum of its scores."""

    since: float
    shown: float = math.inf
    total: float = 0.0
    frames: int = 0


class _Track:
    """The labels of one source."""

    def __init__(self, source: str, options: TimelineOptions) -> None:
        self._source, self._options = source, options
        self._smoother = Smoother(options.smooth)
        self._stays: dict[str, _Stay] = {}
        self._time = -math.inf
        self.scores: Scores = {}

    def update(self, time: float, prediction: Prediction) -> list[Event]:
        """Takes one frame's prediction; returns what started and ended with it."""
        self._time = max(time, self._time)
        self.scores = self._smoother.update(time, prediction)
        events = self._leave(prediction.labels)
        for label in prediction.labels:
            if self.scores[label] > self._options.enter:
                self._stays.setdefault(label, _Stay(self._time))
        for label, stay in self._stays.items():
            stay.total, stay.frames = stay.total + self.scores[label], stay.frames + 1
        return events + self._show()

    def active(self) -> list[str]:
        return [label for label, stay in self._stays.items() if stay.shown < math.inf]

    def end(self) -> list[Event]:
        ended = [self._event("ended", label) for label in self.active()]
        self._stays.clear()
        return ended

    def _leave(self, labels: Sequence[str]) -> list[Event]:
        """Forgets what did not last, and labels that are no longer asked for."""
        events: list[Event] = []
        known = frozenset(labels)
        for label, stay in list(self._stays.items()):
            score = self.scores.get(label, 0.0)
            if stay.shown == math.inf:
                over = score <= self._options.enter
            else:
                calm = self._time - stay.shown >= self._options.dwell
                over = calm and score < self._options.leave
            if label not in known or over:
                if stay.shown < math.inf:
                    events.append(self._event("ended", label))
                del self._stays[label]
        return events

    def _show(self) -> list[Event]:
        """Starts the labels that have been there for the dwell."""
        ripe = [
            label
            for label, stay in self._stays.items()
            if stay.shown == math.inf and self._time - stay.since >= self._options.dwell
        ]
        for label in ripe:
            self._stays[label].shown = self._time
        return [self._event("started", label) for label in ripe]

    def _event(self, kind: Kind, label: str) -> Event:
        stay = self._stays[label]
        score = self.scores[label] if kind == "started" else stay.total / stay.frames
        return Event(kind, label, self._source, self._time, self._time - stay.since, score)


class Timeline:
    """The labels in time of any number of sources.

        timeline = Timeline(TimelineOptions(dwell=2))
        for seen in stream:
            for event in timeline.update(seen.source, seen.time, seen.prediction):
                print(event.kind, event.label)

    `thumbnails` is the longer side in pixels of the pictures that `started` events carry, where
    `update` is given the frames; None: none.
    """

    def __init__(
        self, options: TimelineOptions | None = None, thumbnails: int | None = None
    ) -> None:
        self.options = options or TimelineOptions()
        self._thumbnails = thumbnails
        self._tracks: dict[str, _Track] = {}

    def update(
        self,
        source: str,
        time: float,
        prediction: Prediction,
        frame: Frame | None = None,
        color: Color = "bgr",
    ) -> list[Event]:
        """What a frame of a source starts and ends. `time` is the frame's own, in seconds from any
        beginning; where it goes back it is taken for the time before."""
        track = self._tracks.get(source)
        if track is None:
            track = self._tracks[source] = _Track(source, self.options)
        events = track.update(time, prediction)
        if self._thumbnails is None or frame is None:
            return events
        side = self._thumbnails
        return [
            replace(event, thumbnail=thumbnail(frame, color, side))
            if event.kind == "started"
            else event
            for event in events
        ]

    def scores(self, source: str) -> Scores:
        """The smoothed scores of a source's labels and groups; empty before its first frame."""
        track = self._tracks.get(source)
        return track.scores if track else {}

    def active(self, source: str) -> list[str]:
        """The labels that are there now, first the one that has been there longest."""
        track = self._tracks.get(source)
        return track.active() if track else []

    def end(self, source: str) -> list[Event]:
        """Ends what is there at the time of the source's last frame: it has ended, or was lost. A
        later frame begins anew."""
        track = self._tracks.pop(source, None)
        return track.end() if track else []

    def close(self) -> list[Event]:
        """Ends what is there in every source."""
        return [event for source in list(self._tracks) for event in self.end(source)]
