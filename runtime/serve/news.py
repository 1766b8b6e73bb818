"""Tells the event loop's clients that there is news, from whatever thread, in microseconds."""

import asyncio
import threading

import anyio


class News:
    """`version` grows with each `tell`; clients wait for one that is newer than theirs.

    Threads only ever hold the lock for a moment. All that wait are woken by one call into the
    event loop, however often it is told meanwhile.
    """

    def __init__(self) -> None:
        self.version = 0
        self.closed = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """There is something new."""
        with self._lock:
            self.version += 1
            if self._loop is None or self._woken or not self._waiting:
                return
            try:
                self._loop.call_soon_threadsafe(self._wake)
                self._woken = True
            except RuntimeError:  # the loop is closed: nobody waits any more
                self._loop = None

    def close(self) -> None:
        """Nobody waits any more, now and later."""
        self.closed = True
        self.tell()

    async def wait(self, version: int, seconds: float) -> None:
        """Returns when there is anything newer than `version`, at the end, or after so long. For
        one event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self.version != version or self.closed:
                return
            self._loop = loop
            self._waiting.add(future)
        try:
            with anyio.move_on_after(seconds):
                await future
        finally:
            self._waiting.discard(future)

    def _wake(self) -> None:
        with self._lock:
            self._woken = False
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
