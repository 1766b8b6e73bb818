"""Follows a stream: its labels in time, its rules, and all the places where both are told."""

import math
from collections.abc import Iterable, Sequence
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
SETTLED = 1.0  # seconds after which no frame of a source that has ended is on its way any more


class Watch:
    """Labels in time, rules, history and outputs of a stream.

        watch = Watch(outputs=[Callback(print)], rules=["person > 0.6 for 2s"])
        with runtime.Stream(
            classifier, ["rtsp://..."], on_state=watch.state, on_tick=watch.tick
        ) as stream:
            for seen in stream:
                watch.see(seen)
        watch.close()

    Rules are texts, or parsed already. They are of smoothed scores, and of each source by itself.
    Labels may change while it runs; a rule's name that is no label any more scores 0.
    """

    def __init__(
        self,
        options: TimelineOptions | None = None,
        rules: Sequence[str | Rule] = (),
        outputs: Sequence[Output] = (),
        thumbnails: int | None = None,
    ) -> None:
        self.timeline = Timeline(options, thumbnails)
        self.history = History()
        self._given, self._outputs = rules, outputs
        self._rules: dict[str, list[Rule]] = {}
        self._times: dict[str, float] = {}
        self._came: dict[str, float] = {}
        self._away: dict[str, float] = {}

    def see(self, seen: "Seen") -> list[Event]:
        """Takes a frame in; returns its events, which the outputs are told, then the frame.

        Raises DataError at the first frame for the text of a rule of what is no label.
        """
        source, time, labels = seen.source, seen.time, seen.prediction.labels
        events = self.timeline.update(source, time, seen.prediction, seen.frame, seen.color)
        scores = self.timeline.scores(source)
        if source not in self._rules:
            self._given = parsed = [_parsed(rule, scores) for rule in self._given]
            self._rules[source] = [rule.anew() for rule in parsed]
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
        """Is told of a source's states (`on_state` of a stream)."""
        self._away.pop(source, None)
        if state != "live":
            self._away[source] = SETTLED if state == "ended" else PATIENCE
        self.tick()

    def tick(self) -> None:
        """Ends what goes on where no frame has come for so long that none is to be expected: is to
        be called now and then (`on_tick` of a stream)."""
        now = monotonic()
        for source, patience in self._away.items():
            if now - self._came.get(source, math.inf) > patience:
                self.lost(source)

    def lost(self, source: str) -> list[Event]:
        """Ends what goes on in a source: it has ended, or its camera was lost for a while."""
        events = self.timeline.end(source)
        for rule in self._rules.get(source, []):
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


def _parsed(rule: str | Rule, names: Iterable[str]) -> Rule:
    return rule if isinstance(rule, Rule) else Rule.parse(rule, names)
