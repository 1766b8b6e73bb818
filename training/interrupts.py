"""Ctrl-C and SIGTERM at the end of a step, so that a run leaves a state to go on from."""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is only noted, in `asked`; a second one
    acts at once. Does nothing outside of the main thread, or with `enabled` off."""

    def __init__(self, enabled: bool = True) -> None:
        self.asked: int | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if self._enabled:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def leave(self) -> None:
        """Ends the program as the noted signal would have."""
        self._restore()
        assert self.asked is not None
        signal.raise_signal(self.asked)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
