"""The thread that watches the cameras, for as long as the server runs."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import EdgeClipError
from ..log import log
from ..outputs import Output
from ..rules import Rule
from ..stream import Classifies, Stream
from ..stream_run import log_state
from ..stream_stats import SourceStats
from ..timeline import TimelineOptions
from ..watch import Watch
from .hub import Hub

if TYPE_CHECKING:
    from ..grabbed import State

THUMBNAIL = 160  # pixels
FRESH = 0.25  # seconds: statistics are not counted more often, whoever asks for them
STUCK = 20.0  # seconds in which some frame of live cameras must have been classified
PATIENCE = 10.0  # seconds for the last frame when it is stopped
OnState = Callable[[str, "State", str], None]


class CameraLoop:
    """Watches what `open_stream` opens, in a thread of its own, from `start` until `stop`.

    What is seen goes to `hub` and the other outputs. A source that ends or is lost does not end it.
    An error does: it is logged, kept in `error`, and `on_error` is called. `fps` is that of the
    stream. May be asked by any thread.
    """

    def __init__(
        self,
        open_stream: Callable[[OnState, Callable[[], None]], Stream],
        calm: TimelineOptions | None = None,
        rules: Sequence[str | Rule] = (),
        outputs: Sequence[Output] = (),
        fps: float | None = None,
    ) -> None:
        self.error: BaseException | None = None
        self.on_error: Callable[[], None] = lambda: None
        self.stream = open_stream(self._told, lambda: self.watch.tick())
        self.hub = Hub(self.stream.names)
        self.watch = Watch(calm, rules, [self.hub, *outputs], THUMBNAIL)
        self._stuck_after = max(STUCK, 3 / fps) if fps else STUCK
        self._stopping = False
        self._lock = threading.Lock()
        self._stats: tuple[float, list[SourceStats]] = (0.0, [])
        self._thread = threading.Thread(target=self._run, name="edgeclip cameras", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream and what goes on in it, and returns when that is written."""
        self._stopping = True
        self.stream.stop()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                log.error("the camera loop hangs: it is left, and its last events with it")
        self.stream.close()

    def stats(self) -> list[SourceStats]:
        """What became of each source's frames, at most a quarter of a second ago."""
        with self._lock:
            at, found = self._stats
            if not found or time.monotonic() - at > FRESH:
                found = self.stream.stats()
                self._stats = time.monotonic(), found
            return found

    @property
    def problem(self) -> str | None:
        """Why the cameras are not watched any more, or None where all is well."""
        if self.error is not None:
            return f"the camera loop ended: {self.error}"
        live = any(stats.state == "live" for stats in self.stats())
        silent = time.monotonic() - self.hub.last_frame
        if live and silent > self._stuck_after:
            return f"cameras are live, but no frame was classified for {silent:.0f} s"
        return None

    @property
    def ready(self) -> bool:
        """Whether a source gives frames."""
        return self.error is None and any(stats.state == "live" for stats in self.stats())

    def _run(self) -> None:
        try:
            try:
                with self.stream as stream:
                    for seen in stream:
                        self.watch.see(seen)
            finally:
                self.watch.close()
        except BaseException as error:
            self.error = error
            unexpected = None if isinstance(error, EdgeClipError | OSError) else error
            log.error("the camera loop ended: %s", error, exc_info=unexpected)
            self.on_error()
        else:
            if not self._stopping:
                log.warning("all sources have ended; the server goes on")

    def _told(self, source: str, state: "State", reason: str) -> None:
        self.watch.state(source, state, reason)
        self.hub.state(source, state, reason)
        log_state(source, state, reason)


def watch_cameras(
    classifier: Classifies,
    sources: Sequence[str],
    calm: TimelineOptions,
    rules: Sequence[str | Rule],
    outputs: Sequence[Output],
    *,
    fps: float | None = None,
    realtime: bool = True,
    skip_still: bool = False,
) -> CameraLoop | None:
    """A camera loop of these sources, not started; None where there are none. Raises as
    `runtime.Stream` does."""
    if not sources:
        return None

    def opened(told: OnState, tick: Callable[[], None]) -> Stream:
        return Stream(classifier, sources, fps=fps, realtime=realtime, skip_still=skip_still,
                      on_state=told, on_tick=tick)  # fmt: skip

    return CameraLoop(opened, calm, rules, outputs, fps)
