"""Ctrl-C and SIGTERM at the end of a step, so that a run leaves a state to go on from."""

import signal
import threading
import time
from types import FrameType
from typing import Any

TWICE = 1.0  # seconds: `timeout` tells first the program and then its whole group
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_signals_to_parent() -> None:
    """For a worker process: Ctrl-C and the first SIGTERM go to the whole group, and what becomes
    of them is the parent's to say; a worker that died of them would be taken for a fault."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)


def _once(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next one is the parent's own, to end the worker


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted, in `asked`; one that comes
    later than `TWICE` seconds after it acts at once. What is ignored (a shell's `nohup` and `&`
    ignore SIGINT) stays so. Does nothing outside of the main thread, or with `enabled` off."""

    def __init__(self, enabled: bool = True) -> None:
        self.asked: int | None = None
        self._since = 0.0
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if self._enabled:
            heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def leave(self) -> None:
        """Ends the program as the noted signal would have."""
        self._restore()
        assert self.asked is not None
        signal.raise_signal(self.asked)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > TWICE:
            self.leave()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
