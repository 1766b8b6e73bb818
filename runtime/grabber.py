"""The newest frame of one source, whatever happens to it.

A thread reads the source and keeps one frame. A camera that is lost is opened again, after pauses
that double; one that hangs is left with its thread, and opened by another.

    connecting -> live -> lost (no more frames, or it cannot be opened) -> connecting ...
                       -> stalled (it hangs) -> connecting ...
                       -> ended (a file)    closed
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from .capture import Capture, open_capture
from .errors import BackendUnavailable, DataError, EdgeClipError, FrameError
from .frames import Color, Frame, check_frame
from .grabbed import Counters, Grabbed, State
from .pace import Pace, Rhythm
from .source_uri import SourceSpec

Opens = Callable[[SourceSpec, float], Capture]
MAX_HUNG = 3
"""So many threads may hang in one source; then it is not opened again before one returns."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds between two attempts to open a source
STEADY = 5.0  # seconds: a connection that lasted so long was no failed attempt
CLOSING = 2.0  # seconds in which a source that is closed must have returned
MAX_BROKEN = 100  # broken frames in a row: opening the source again may help


class Grabber:
    """Reads `spec` in a thread of its own, from now on until `close`.

    Of a live source, and of any with `realtime`, there is only ever the newest frame; files are
    then read as fast as they were filmed (pictures: `fps` a second). A camera's frame that waits
    for over two frame times, since the camera has died, is dropped too. Otherwise every frame is
    delivered in order. `fps` delivers at most so many a second; `stall` is after how many seconds
    without an answer a source hangs, which is looked at whenever a frame or the state is asked for.
    `news` is notified of each change. Several threads may use it.
    """

    def __init__(
        self,
        spec: SourceSpec,
        *,
        realtime: bool = False,
        fps: float | None = None,
        stall: float = 10.0,
        color: Color | None = None,
        name: str = "",
        began: float | None = None,
        news: threading.Condition | None = None,
        opens: Opens = open_capture,
    ) -> None:
        self.spec, self.name = spec, name or spec.shown
        self.error: EdgeClipError | None = None
        """What no further attempt can mend, so that the source has ended."""
        self._newest = spec.live or realtime
        self._realtime, self._fps, self._stall, self._color = realtime, fps, stall, color
        self._began = time.monotonic() if began is None else began
        self._news = news or threading.Condition()
        self._opens = opens
        self._waiting: Grabbed | None = None
        self._waiting_since = 0.0
        self._rhythm = Rhythm()
        self._counters = Counters()
        self._state: State = "connecting"
        self._reason = ""
        self._hung: list[_Reader] = []
        self._reader = _Reader(self)
        self._reader.thread.start()

    @property
    def state(self) -> State:
        """What the source is doing; `reason` says why."""
        with self._news:
            self._watch()
            return self._state

    @property
    def reason(self) -> str:
        """Why the source is not live; empty where it is, and for a file that was read whole."""
        with self._news:
            return self._reason

    @property
    def counters(self) -> Counters:
        """A copy of the counters as they are now."""
        with self._news:
            return replace(self._counters)

    @property
    def has_news(self) -> bool:
        """Whether a frame waits to be taken."""
        return self._waiting is not None

    @property
    def over(self) -> bool:
        """Whether no frame will come any more, and none waits."""
        with self._news:
            return self._waiting is None and self._state in ("ended", "closed")

    def take(self, timeout: float = 0.0) -> Grabbed | None:
        """The newest frame that was not taken yet; waits `timeout` seconds for one. None where
        none came, or the source has ended."""
        limit = time.monotonic() + timeout
        with self._news:
            self._drop_stale()
            while self._waiting is None and not self.over:
                self._watch()
                left = limit - time.monotonic()
                if left <= 0:
                    return None
                self._news.wait(min(left, 0.25))  # the watch goes on
            taken, self._waiting = self._waiting, None
            self._counters.taken += taken is not None
            self._news.notify_all()
            return taken

    def _drop_stale(self) -> None:
        """Holds the lock."""
        waiting = self._waiting
        if waiting and self.spec.live:
            if self._rhythm.is_stale(self._waiting_since, time.monotonic()):
                self._waiting = None
                self._counters.dropped += 1

    def close(self) -> None:
        """Ends the reading, and waits for its thread unless that hangs."""
        self.stop()
        self.join(CLOSING)

    def stop(self) -> None:
        """Ends the reading."""
        with self._news:
            if self._state != "ended":  # why it ended is kept
                self._state = "closed"
            self._counters.dropped += self._waiting is not None
            self._waiting = None
            self._news.notify_all()
            readers = [self._reader, *self._hung]
        for reader in readers:
            reader.interrupt()

    def join(self, timeout: float) -> None:
        """Waits so many seconds at most until its thread has ended."""
        self._reader.thread.join(timeout)

    def _watch(self) -> None:
        """Leaves a reader that hangs, and starts another. Holds the lock."""
        reader = self._reader
        self._hung = [other for other in self._hung if other.thread.is_alive()]
        waited = reader.waits_for()
        if self._state == "closed" or waited < self._stall:
            return
        if not self.spec.live:  # a file or pipe cannot be opened where it was left
            self._counters.hangs += self._state != "stalled"
            self._say("stalled", f"no answer for {waited:.0f} s")
            return
        if len(self._hung) >= MAX_HUNG:
            self._say("stalled", f"no answer; {MAX_HUNG} earlier attempts hang too")
            return
        self._counters.hangs += 1
        self._say("stalled", f"no answer for {waited:.1f} s")
        self._hung.append(reader)
        self._counters.reconnects += 1
        self._reader = _Reader(self, attempts=reader.attempts + 1)
        self._reader.thread.start()
        reader.interrupt()

    def _say(self, state: State, reason: str = "") -> None:
        """Holds the lock."""
        if self._state != "closed":
            # A picture's name in it may be no UTF-8, which no JSON can say.
            self._state, self._reason = state, reason.encode(errors="replace").decode()
            self._news.notify_all()


class _Reader:
    """One thread that opens and reads the source of a grabber until it ends, or hangs."""

    def __init__(self, grabber: Grabber, attempts: int = 0) -> None:
        self._of = grabber
        self.attempts = attempts
        self._capture: Capture | None = None
        self._busy_since: float | None = None
        self._broken, self._last_broken = 0, ""
        self.thread = threading.Thread(
            target=self._run, name=f"edgeclip reads {grabber.name}", daemon=True
        )

    def waits_for(self) -> float:
        """Seconds since the source was asked for what it has not answered yet."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def interrupt(self) -> None:
        """Makes the source return where it hangs, if that is possible."""
        if capture := self._capture:
            capture.interrupt()

    @property
    def _left(self) -> bool:
        """Whether nobody listens any more. Asked with the lock held."""
        return self._of._state in ("closed", "ended") or self._of._reader is not self

    def _run(self) -> None:
        of = self._of
        if self.attempts:
            self._pause()
        while True:
            with of._news:
                if self._left:
                    return
                if self.attempts == 0:
                    of._say("connecting")
            start = time.monotonic()
            reason = self._read_once()
            if time.monotonic() - start > STEADY:
                self.attempts = 0
            ended = self._say_why(reason)
            self._let_go()
            if ended:
                return
            self.attempts += 1
            self._pause()

    def _say_why(self, reason: str) -> bool:
        """Says why the source gives no more frames; whether it is not to be opened again."""
        of = self._of
        with of._news:
            if self._left:
                return True
            if not of.spec.live or of.error:
                of._say("ended", reason)
                return True
            of._say("lost", reason or "it gives no more frames")
            of._counters.reconnects += 1
            return False

    def _let_go(self) -> None:
        """Closes the source; a camera that hangs may take its time for that."""
        if self._capture:
            self._busy_since = time.monotonic()
            with contextlib.suppress(Exception):  # whatever a driver raises
                self._capture.close()
            self._busy_since = None
        self._capture = None

    def _pause(self) -> None:
        """Waits before the next attempt: doubled each time, and never at one time with others."""
        pause = min(FIRST_PAUSE * 2 ** (self.attempts - 1), LONGEST_PAUSE)
        self._sleep(pause * random.uniform(0.5, 1.0))

    def _sleep(self, seconds: float) -> None:
        with self._of._news:
            self._of._news.wait_for(lambda: self._left, seconds)

    def _read_once(self) -> str:
        """Opens the source and reads it to its end. Returns why it ended."""
        of = self._of
        try:
            self._busy_since = time.monotonic()
            self._capture = of._opens(of.spec, of._stall * 0.8)
            self._read(self._capture)
            return self._capture.ended or self._last_broken
        except EdgeClipError as error:
            if not of.spec.live or isinstance(error, BackendUnavailable | DataError):
                of.error = error
            return str(error)
        except Exception as error:  # whatever a driver raises: a camera must not end the others
            return f"{type(error).__name__}: {error}"
        finally:
            self._busy_since = None

    def _read(self, capture: Capture) -> None:
        of = self._of
        of._rhythm.begin()
        pace = Pace(of._fps, paced=of._realtime and not of.spec.live)
        rate = of._fps if of.spec.kind == "pictures" else None  # pictures have none of their own
        while True:
            self._busy_since = time.monotonic()
            if not capture.grab():
                return
            self._busy_since = None
            position = capture.position()
            if rate and position is not None:
                position /= rate
            if not self._deliver(capture, pace, position):
                return

    def _deliver(self, capture: Capture, pace: Pace, position: float | None) -> bool:
        """Hands on the frame that was grabbed, if it is wanted. False where nobody listens."""
        of, now = self._of, time.monotonic()
        captured = now if capture.came is None else capture.came
        wall = time.time() - (now - captured)
        with of._news:
            if self._left:
                return False
            of._counters.seen += capture.missed
            of._counters.dropped += capture.missed
            number = of._counters.seen
            of._counters.seen += 1
            if not pace.wants(captured if position is None else position):
                of._counters.thinned += 1
                return True
            of._rhythm.came(captured, capture.missed)
        frame = self._pixels(capture)
        if frame is None:
            return self._broken < MAX_BROKEN or not of.spec.live
        if position is not None and (early := pace.early(position, captured)) > 0:
            self._sleep(early)
            captured, wall = time.monotonic(), time.time()
        at = captured - of._began if position is None else position
        color = of._color or capture.color
        return self._put(Grabbed(frame, color, number, at, captured, wall, of.name))

    def _pixels(self, capture: Capture) -> Frame | None:
        """The frame that was grabbed; None, and counted, where it is broken."""
        of = self._of
        self._busy_since = time.monotonic()
        try:
            frame = check_frame(capture.retrieve(), of._color or capture.color)
        except Exception as error:  # a FrameError, or whatever a driver raises
            said = error if isinstance(error, FrameError) else f"{type(error).__name__}: {error}"
            self._broken += 1
            self._last_broken = f"{self._broken} broken frames in a row; the last: {said}"
            with of._news:
                of._counters.broken += 1
            return None
        finally:
            self._busy_since = None
        self._broken = 0
        return frame

    def _put(self, grabbed: Grabbed) -> bool:
        of = self._of
        with of._news:
            if not of._newest:
                of._news.wait_for(lambda: self._left or of._waiting is None)
            if self._left:
                of._counters.dropped += 1
                return False
            of._counters.dropped += of._waiting is not None
            of._waiting, of._waiting_since = grabbed, time.monotonic()
            of._say("live")
            of._news.notify_all()
            return True
