"""Classifies what cameras and videos show, frame after frame, never behind the newest.

with runtime.Stream(classifier, ["0", "rtsp://door/stream"]) as stream:
    for seen in stream:
        print(seen.source, seen.time, seen.prediction.label)
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from .capture import open_capture
from .errors import DataError
from .frames import Color, Colors, Frame
from .grabbed import Grabbed, State
from .grabber import CLOSING, Grabber, Opens
from .prediction import Prediction
from .source_uri import SourceSpec, parse_source
from .still import CHANGE, Thumbnail, changed, thumbnail
from .stream_stats import Ages, SourceStats
from .warm_up import warm_up

Source = str | Path | SourceSpec
Sources = Source | Sequence[Source] | Mapping[str, Source]
STILL_FOR = 5.0  # seconds: then a still scene is classified again all the same
TICK = 1.0  # seconds
WAIT = 0.1  # seconds between two looks at whether sources hang, or the stream is to stop


class Classifies(Protocol):
    """What a stream needs of a classifier."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The same tuple until they, or their prompts, are changed."""

    def classify_batch(self, frames: Sequence[Frame], color: Colors = ...) -> list[Prediction]: ...


@dataclass(frozen=True, eq=False)
class Seen:
    """One frame and what it was taken for.

    `source` is the name of where it is from, `number` its number there (from 0; frames that were
    dropped have one too). `time` is in seconds: of a file the frame's place in it, of a live source
    since the stream began; `wall` is when it came, as `time.time()`. `frame` is uint8 in the
    channel order `color`. `dropped` counts that source's frames which were replaced by newer ones,
    until now; `age_ms` is how old the frame was when it was classified. A `still` frame was not
    classified: it shows what the last one did, and has its prediction.
    """

    source: str
    number: int
    time: float
    prediction: Prediction
    frame: Frame
    dropped: int
    age_ms: float
    wall: float = 0.0
    color: Color = "bgr"
    still: bool = False


class Stream:
    """An iterator of what is `Seen`; ends when all its sources have, or `stop` was called.

    `sources` are texts (see `runtime.source_uri`), or a mapping of names to them. Each round takes
    the newest frame of every source that has news (of at most `batch`, in turn) and classifies them
    in one run of the encoder. Of cameras, and with `realtime` of files too, older frames are
    dropped; otherwise each frame of a file is classified. `fps` takes at most so many frames a
    second of each source. `skip_still` does not classify scenes that have not changed (True, or by
    how many gray levels one 32nd of a side must). `color` is the frames' channel order where it is
    not the one their source tells. A source that gives no answer for `stall` seconds is opened
    again. `on_state` is told (source, state, reason) of each change, `on_tick` is called about once
    a second: both by the thread that iterates.

    Raises DataError and FrameError for sources that do not exist, and, while it is iterated, what
    kept the sources from being read where none of them gave a frame.
    """

    def __init__(
        self,
        classifier: Classifies,
        sources: Sources,
        *,
        color: Color | None = None,
        fps: float | None = None,
        realtime: bool = False,
        skip_still: bool | float = False,
        batch: int = 8,
        stall: float = 10.0,
        on_state: Callable[[str, State, str], None] | None = None,
        on_tick: Callable[[], None] | None = None,
        opens: Opens = open_capture,
    ) -> None:
        named = _named(sources)
        _check(named, fps, realtime, batch, stall)
        self._classifier, self._batch = classifier, batch
        self._on_state, self._on_tick, self._ticked = on_state, on_tick, time.monotonic()
        self._change = CHANGE if skip_still is True else float(skip_still)
        self._news = threading.Condition()
        self._stopped = False
        self._turn = 0
        self._ready: deque[Seen] = deque()
        self.looked = time.monotonic()
        """When it was last asked for a frame, or looked for one."""
        if realtime or any(spec.live for spec in named.values()):
            warm_up(classifier, min(batch, len(named)))
        began = time.monotonic()
        self._sources = [
            _Source(
                Grabber(
                    spec,
                    realtime=realtime,
                    fps=fps,
                    stall=stall,
                    color=color,
                    name=name,
                    began=began,
                    news=self._news,
                    opens=opens,
                )
            )
            for name, spec in named.items()
        ]

    @property
    def names(self) -> list[str]:
        """The sources' names, in their order."""
        return [source.grabber.name for source in self._sources]

    def __iter__(self) -> Iterator[Seen]:
        return self

    def __next__(self) -> Seen:
        self.looked = time.monotonic()
        while not self._ready:
            self.looked = time.monotonic()
            self._tell_states()
            self._tick()
            if self._stopped or all(source.grabber.over for source in self._sources):
                self._raise_where_nothing_came()
                raise StopIteration
            if grabbed := self._round():
                self._classify(grabbed)
        return self._ready.popleft()

    def stats(self) -> list[SourceStats]:
        """What became of each source's frames until now. May be called by any thread."""
        return [source.stats() for source in self._sources]

    def stop(self) -> None:
        """Ends the iteration after the frame that is being classified. May be called by any
        thread, and by a signal's handler."""
        self._stopped = True

    def close(self) -> None:
        """Ends the iteration and lets go of all sources."""
        self.stop()
        for source in self._sources:
            source.grabber.stop()
        limit = time.monotonic() + CLOSING
        for source in self._sources:
            source.grabber.join(max(0.0, limit - time.monotonic()))
        self._tell_states()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _round(self) -> list[tuple["_Source", Grabbed]]:
        """The newest frames of those sources that have news, beginning where the last round ended;
        nothing where none has for a while."""
        with self._news:
            self._news.wait_for(lambda: any(s.grabber.has_news for s in self._sources), WAIT)
        order = self._sources[self._turn :] + self._sources[: self._turn]
        found: list[tuple[_Source, Grabbed]] = []
        for source in order:
            if len(found) < self._batch and (grabbed := source.grabber.take()):
                found.append((source, grabbed))
                self._turn = (self._sources.index(source) + 1) % len(self._sources)
        return found

    def _classify(self, round_: list[tuple["_Source", Grabbed]]) -> None:
        """Makes a round's frames ready: those that are to be classified in one run."""
        moved: list[tuple[_Source, Grabbed]] = []
        for source, grabbed in round_:
            if self._change and source.is_still(grabbed, self._classifier.labels, self._change):
                self._ready.append(source.seen(grabbed, None))
            else:
                moved.append((source, grabbed))
        if not moved:
            return
        frames = [grabbed.frame for _, grabbed in moved]
        found = self._classifier.classify_batch(frames, [grabbed.color for _, grabbed in moved])
        for (source, grabbed), prediction in zip(moved, found, strict=True):
            self._ready.append(source.seen(grabbed, prediction))

    def _tell_states(self) -> None:
        for source in self._sources:
            state = source.grabber.state
            if state != source.told:
                source.told = state
                if self._on_state:
                    self._on_state(source.grabber.name, state, source.grabber.reason)

    def _tick(self) -> None:
        if self._on_tick and self.looked - self._ticked >= TICK:
            self._ticked = self.looked
            self._on_tick()

    def _raise_where_nothing_came(self) -> None:
        errors = [source.grabber.error for source in self._sources if source.grabber.error]
        if errors and not any(s.ages.classified for s in self._sources) and not self._stopped:
            self.close()
            raise errors[0]


@dataclass(eq=False)
class _Source:
    """One source of a stream, and what its last frame was taken for."""

    grabber: Grabber
    ages: Ages = field(default_factory=Ages)
    lock: threading.Lock = field(default_factory=threading.Lock)
    told: State | None = None
    last: Prediction | None = None
    scene: Thumbnail | None = None
    labels: tuple[str, ...] | None = None
    classified_at: float = 0.0

    def is_still(self, grabbed: Grabbed, labels: tuple[str, ...], change: float) -> bool:
        """Whether a frame shows what the last one that was classified did."""
        scene = thumbnail(grabbed.frame, grabbed.color)
        old = abs(grabbed.time - self.classified_at) >= STILL_FOR
        # Other prompts under the same names are other labels: a tuple of their own.
        if self.last is None or self.scene is None or old or self.labels is not labels:
            self.scene, self.labels = scene, labels
            return False
        if changed(self.scene, scene, change):
            self.scene = scene
            return False
        return True

    def seen(self, grabbed: Grabbed, prediction: Prediction | None) -> Seen:
        """The frame with its prediction, or with the last one where it is still; and counts it."""
        still = prediction is None
        if prediction is not None:
            self.last, self.classified_at = prediction, grabbed.time
        assert self.last is not None
        now = time.monotonic()
        age = (now - grabbed.time_captured) * 1e3
        with self.lock:
            self.ages.add(now, age, still)
        return Seen(
            source=grabbed.source,
            number=grabbed.number,
            time=grabbed.time,
            prediction=self.last,
            frame=grabbed.frame,
            dropped=self.grabber.counters.dropped,
            age_ms=age,
            wall=grabbed.wall,
            color=grabbed.color,
            still=still,
        )

    def stats(self) -> SourceStats:
        grabber = self.grabber
        with self.lock:
            return self.ages.stats(
                grabber.name, grabber.state, grabber.reason, grabber.counters, time.monotonic()
            )


def names_of(sources: Sources) -> list[str]:
    """What a stream calls these sources, in their order. Raises as it does."""
    return list(_named(sources))


def _named(sources: Sources) -> dict[str, SourceSpec]:
    if isinstance(sources, Mapping):
        return {name: _spec(source) for name, source in sources.items()}
    if isinstance(sources, str | Path | SourceSpec):
        sources = [sources]
    named: dict[str, SourceSpec] = {}
    for spec in map(_spec, sources):
        name, count = spec.shown, 2
        while name in named:
            name, count = f"{spec.shown} ({count})", count + 1
        named[name] = spec
    return named


def _spec(source: Source) -> SourceSpec:
    return source if isinstance(source, SourceSpec) else parse_source(source)


def _check(
    named: dict[str, SourceSpec], fps: float | None, realtime: bool, batch: int, stall: float
) -> None:
    if not named:
        raise DataError("a stream needs a source, such as a camera's number or a video")
    if fps is not None and not 0 < fps <= 1000:
        raise DataError(f"fps={fps} is not a number of frames a second, up to 1000")
    if batch < 1:
        raise DataError(f"batch={batch} is not a number of frames of 1 or more")
    if not stall > 0:
        raise DataError(f"stall={stall} is not a number of seconds above 0")
    if sum(spec.kind == "stdin" for spec in named.values()) > 1:
        raise DataError("the standard input is one source; it was given more than once")
    for name, spec in named.items():
        if realtime and spec.kind == "pictures" and fps is None:
            raise DataError(f"{name} holds pictures, which have no rate: realtime needs fps")
