"""Follows a stream: its labels in time, its rules, and all the places where both are told."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING

from .event import Event
from .history import History
from .outputs import Output
from .rules import Rule
from .timeline import Timeline, TimelineOptions

if TYPE_CHECKING:
    from .grabbed import State
    from .stream import Seen

PATIENCE = 5.0  # seconds: a camera may be away for so long without its labels ending


class Watch:
    """Labels in time, rules, history and outputs of a stream.

        with runtime.Stream(classifier, ["rtsp://..."]) as stream:
            watch = Watch(outputs=[Callback(print)], rules=["person > 0.6 for 2s"])
            for seen in stream:
                watch.see(seen)
            watch.close()

    Rules are of smoothed scores, and of each source by itself. Labels may change while it runs; a
    rule's name that is no label any more scores 0.
    """

    def __init__(
        self,
        options: TimelineOptions | None = None,
        rules: Sequence[str] = (),
        outputs: Sequence[Output] = (),
        thumbnails: int | None = None,
    ) -> None:
        self.timeline = Timeline(options, thumbnails)
        self.history = History()
        self._texts, self._outputs = rules, outputs
        self._rules: dict[str, list[Rule]] = {}
        self._times: dict[str, float] = {}
        self._came: dict[str, float] = {}

    def see(self, seen: "Seen") -> list[Event]:
        """Takes a frame in; returns its events, which the outputs are told, then the frame.

        Raises DataError at a source's first frame for a rule of what is no label.
        """
        source, time, labels = seen.source, seen.time, seen.prediction.labels
        events = self.timeline.update(source, time, seen.prediction, seen.frame, seen.color)
        scores = self.timeline.scores(source)
        if source not in self._rules:
            self._rules[source] = [Rule.parse(text, scores) for text in self._texts]
        for rule in self._rules[source]:
            events += rule.update(source, time, scores)
        self._times[source], self._came[source] = time, monotonic()
        self.history.frame(source, time, labels, scores)
        self._tell(events)
        active = self.timeline.active(source)
        for output in self._outputs:
            output.frame(seen, scores, active)
        return events

    def state(self, source: str, state: "State", reason: str) -> None:
        """Is told of a source's states (`on_state` of a stream): where it has given no frame for
        `PATIENCE` seconds and is not live, what went on there ends."""
        silent = monotonic() - self._came.get(source, math.inf)
        if state in ("connecting", "stalled", "lost") and silent > PATIENCE:
            self.lost(source)

    def lost(self, source: str) -> list[Event]:
        """Ends what goes on in a source: it has ended, or its camera was lost for a while."""
        events = self.timeline.end(source)
        for rule in self._rules.pop(source, []):
            events += rule.end(source, self._times[source])
        self._came.pop(source, None)
        self._tell(events)
        return events

    def close(self) -> list[Event]:
        """Ends what goes on everywhere, and closes the outputs: all, also where one fails."""
        with ExitStack() as stack:
            for output in reversed(self._outputs):
                stack.callback(output.close)
            return [event for source in list(self._times) for event in self.lost(source)]

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self.history.event(event)
            for output in self._outputs:
                output.event(event)
