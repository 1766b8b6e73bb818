"""When frames are due: a file as fast as it was filmed, and at most so many frames a second; and
when they are too old."""

from collections import deque
from itertools import pairwise


class Pace:
    """Thins the frames of one source to `limit` a second (None: all are wanted), and paces those
    of a file in real time. Times are seconds: of a live source those of a clock, of a file the
    frame's place in it."""

    def __init__(self, limit: float | None, paced: bool) -> None:
        self._limit, self._paced = limit, paced
        self._next: float | None = None
        self._begin: float | None = None

    def wants(self, time: float) -> bool:
        """Whether the frame of that time is one of the `limit` a second."""
        if not self._limit:
            return True
        apart = 1 / self._limit
        due = time if self._next is None else self._next
        if time < due - 1e-3:  # files give times in whole milliseconds
            return False
        # What comes late takes nothing from the next, but a pause is not made up for.
        self._next = max(due + apart, time)
        return True

    def early(self, position: float, now: float) -> float:
        """Seconds to wait until the frame at that place of a file is due; 0 or less: none."""
        if not self._paced:
            return 0.0
        if self._begin is None:
            self._begin = now - position
        return self._begin + position - now


class Rhythm:
    """How far apart a camera's frames have come lately, and whether one has waited for too long:
    for more than two of those times, in which a camera that lives has sent a newer one."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=17)

    def begin(self) -> None:
        """Forgets the frames before a pause."""
        self._times.clear()

    def came(self, time: float, missed: int = 0) -> None:
        """Notes a frame, and so many before it that were passed over for it."""
        self._times.extend([time] * (1 + missed))

    def is_stale(self, came: float, now: float) -> bool:
        """Whether a frame that came then has waited for too long by now."""
        gaps = sorted(after - before for before, after in pairwise(self._times))
        if not gaps:
            return False
        # A quarter is not misled by pauses; of frames that come in bursts it is nothing.
        mean = sum(gaps[:-1]) / max(1, len(gaps) - 1)
        return now - came > 2 * max(gaps[len(gaps) // 4], mean / 2)
