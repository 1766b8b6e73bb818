"""Where a watched stream goes: lines of text or JSON, and annotated pictures."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .annotate import annotate
from .event import Event
from .smoother import Scores
from .video_out import PicturesOut, VideoOut, open_out

if TYPE_CHECKING:
    from .stream import Seen


class Output(Protocol):
    """What is told of every frame and every event, in their order."""

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """A frame that was classified, the smoothed scores, and the labels that are there."""

    def event(self, event: Event) -> None:
        """What happened; the frame that told comes right after."""

    def close(self) -> None:
        """The stream is over: what was written takes its place."""


class Callback:
    """Calls a function with each event."""

    def __init__(self, on_event: Callable[[Event], object]) -> None:
        self._on_event = on_event

    def event(self, event: Event) -> None:
        """Calls the function."""
        self._on_event(event)

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Frames are of no interest."""

    def close(self) -> None:
        """There is nothing to close."""


class EventLines:
    """Events as lines of text for people."""

    def __init__(self, several: bool) -> None:
        self._several = several

    def event(self, event: Event) -> None:
        """Prints one line."""
        score = "" if event.score is None else f"  {event.score:.0%}"
        lasted = f"  after {event.duration:.1f} s" if event.kind in ("ended", "cleared") else ""
        source = f"{event.source}  " if self._several else ""
        line = f"{event.time:9.2f}  {source}{event.kind:7}  {event.label}{score}{lasted}"
        print(line, flush=True)

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Frames are not printed."""

    def close(self) -> None:
        """There is nothing to close."""


class JsonLines:
    """Events as JSON, a line each; and frames, where `every` is not None: each source's at most
    one in `every` seconds."""

    def __init__(self, stream: TextIO, every: float | None = None) -> None:
        self._stream, self._every = stream, every
        self._last: dict[str, float] = {}

    def event(self, event: Event) -> None:
        """Writes one line."""
        self._write(event.as_json())

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Writes one line, or none."""
        last = self._last.get(seen.source)
        if self._every is None or (last is not None and seen.time - last < self._every - 1e-6):
            return
        self._last[seen.source] = seen.time
        found = seen.prediction
        self._write({
            "source": seen.source,
            "frame": seen.number,
            "time": round(seen.time, 3),
            "label": found.label,
            "score": round(found.score, 4),
            "unknown": found.unknown,
            "active": active,
            "top": [[label, round(score, 4)] for label, score in found.top(3)],
            "dropped": seen.dropped,
            "age_ms": round(seen.age_ms, 1),
        })  # fmt: skip

    def close(self) -> None:
        """Closes a file; the standard output stays open."""
        if self._stream not in (sys.stdout, sys.stderr):
            self._stream.close()

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)


class Annotated:
    """Frames with what they show drawn on them: a video or a folder of pictures of each of the
    sources with these names, in their `places`."""

    def __init__(self, path: Path, sources: Sequence[str], overwrite: bool = False) -> None:
        self._places, self._overwrite = places(path, sources), overwrite
        self._outs: dict[str, VideoOut | PicturesOut] = {}
        self.written: list[Path] = []
        """What `close` put in its place."""

    def event(self, event: Event) -> None:
        """Events show in the frames."""

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Draws and writes one frame."""
        out = self._outs.get(seen.source)
        if out is None:
            out = open_out(self._places[seen.source], self._overwrite)
            self._outs[seen.source] = out
        caption = f"{seen.time:.1f} s"
        drawn = annotate(seen.frame, seen.color, seen.prediction.labels, scores, active, caption)
        out.write(drawn, seen.time)

    def close(self) -> None:
        """Finishes every video; where one cannot be, nothing of it is left."""
        with ExitStack() as stack:
            for out in reversed(self._outs.values()):
                stack.callback(self._finish, out)

    def _finish(self, out: VideoOut | PicturesOut) -> None:
        try:
            place = out.close()
        finally:
            out.discard()
        if place:
            self.written.append(place)


def places(path: Path, sources: Sequence[str]) -> dict[str, Path]:
    """Where each source's frames go: one's to `path`; of several the last part of a source's name
    is put before the ending, and a number where that is not enough: out-door.mp4, out-door-2.mp4.
    """
    if len(sources) == 1:
        return {sources[0]: path}
    found: dict[str, Path] = {}
    for source in sources:
        last = source.rstrip("/").rpartition("/")[2].partition(".")[0]
        name = re.sub(r"[^\w-]+", "-", last).strip("-")[:60]
        numbered = (name if n == 1 else f"{name}-{n}" for n in count(1))
        named = (path.with_name(f"{path.stem}-{name}{path.suffix}") for name in numbered)
        found[source] = next(place for place in named if place not in found.values())
    return found
