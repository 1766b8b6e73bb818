"""A file of events as JSON lines, which outlives a full disk."""

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DataError
from .event import Event
from .log import Throttle
from .smoother import Scores

if TYPE_CHECKING:
    from .stream import Seen

_log = logging.getLogger("edgeclip.events")
_log.addFilter(Throttle())


class EventFile:
    """Adds events to a file, a line each. What cannot be written, since the disk is full, is
    dropped, counted and told: the stream goes on. Raises DataError where it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.dropped = 0
        try:
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            why = f"events cannot be written to {self.path}: {error.strerror}"
            raise DataError(why) from error

    def event(self, event: Event) -> None:
        """Adds one line, whole or not at all."""
        line = json.dumps(event.as_json(), ensure_ascii=False) + "\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            left = line.encode(errors="replace")
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.dropped += 1
            with contextlib.suppress(OSError):  # a pipe cannot be shortened
                self._file.truncate(before)
            _log.warning("events cannot be written to %s: %s", self.path, error.strerror)

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Frames are of no interest."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        if self.dropped:
            _log.warning("%s: %d events were dropped", self.path, self.dropped)
