"""What happens in a stream: a label comes or goes, a rule fires or is over."""

import base64
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["started", "ended", "fired", "cleared"]


@dataclass(frozen=True)
class Event:
    """One event of a source.

    `kind` is "started" or "ended" of a label, "fired" or "cleared" of a rule; `label` the label, or
    the rule's text. `time` is the frame's that told, in seconds; `duration` the seconds that it has
    been true by then: it began at `time - duration`. `score` is the label's smoothed score: at the
    start that of the frame, at the end the mean since it began; None of a rule. `thumbnail` is a
    small JPEG of the frame, where one was asked for.
    """

    kind: Kind
    label: str
    source: str
    time: float
    duration: float
    score: float | None = None
    thumbnail: bytes | None = None

    def as_json(self) -> dict[str, Any]:
        """For JSON; the thumbnail is written in base64, and left out where there is none."""
        shown: dict[str, Any] = {
            "event": self.kind,
            "label": self.label,
            "source": self.source,
            "time": round(self.time, 3),
            "duration": round(self.duration, 3),
        }
        if self.score is not None:
            shown["score"] = round(self.score, 4)
        if self.thumbnail is not None:
            shown["thumbnail"] = base64.b64encode(self.thumbnail).decode("ascii")
        return shown
