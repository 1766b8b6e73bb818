"""Logs on the standard error, a line each: as text for people, or as JSON for programs.

What comes from outside (an address, a label, a path) may hold anything, so control characters are
written as escapes: no message can pass for another one, or change a terminal.
"""

import contextlib
import json
import logging
import re
import sys
import time
from collections import OrderedDict
from typing import Literal, get_args

from .errors import DataError

LogFormat = Literal["text", "json"]
log = logging.getLogger("edgeclip")
# C0 and C1 controls, line separators, and marks that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def set_up(format: str) -> None:
    """From now on all loggers of the process write in this format, "text" or "json"; libraries
    only warnings. Raises DataError for another one."""
    if format not in get_args(LogFormat):
        raise DataError(f"--log-format is {' or '.join(get_args(LogFormat))}, not {format!r}")
    handler = _Stderr()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    log.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    """Writes to what is the standard error by then."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        with contextlib.suppress(OSError, ValueError):  # who read it has gone, or its disk is full
            print(line, file=sys.stderr, flush=True)


def escaped(text: str) -> str:
    """The text with its control characters written as escapes: one line."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class TextFormatter(logging.Formatter):
    """`edgeclip: message`, with the level where it is a warning or worse. Below an error that
    nobody expected stands its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as lines of text."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"edgeclip: {level}{escaped(record.getMessage().strip())}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).splitlines()
        return "\n".join([line, *(f"    {escaped(text)}" for text in trace)])


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, message, and what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        shown = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            shown["trace"] = self.formatException(record.exc_info)
        return json.dumps(shown, ensure_ascii=True, default=str)


class Throttle(logging.Filter):
    """Lets `burst` messages of one kind through, then one in `every` seconds, which says how many
    were left out: whoever is refused a thousand times does not fill the disk."""

    MOST_KINDS = 256

    def __init__(self, burst: int = 10, every: float = 5.0) -> None:
        super().__init__()
        self._burst, self._every = burst, every
        self._kinds: OrderedDict[str, tuple[float, float, int]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is written; where others were not, it says how many."""
        now, kind = time.monotonic(), str(record.msg)
        left, at, omitted = self._kinds.pop(kind, (float(self._burst), now, 0))
        left = min(self._burst, left + (now - at) / self._every)
        written = left >= 1
        if written and omitted:
            record.msg = f"{record.msg} (and {omitted} more like it)"
        self._kinds[kind] = (left - written, now, 0 if written else omitted + 1)
        while len(self._kinds) > self.MOST_KINDS:
            self._kinds.popitem(last=False)
        return written
