"""Work for threads, of which only so much may wait: what is more is refused at once."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .refusal import Refusal

Result = TypeVar("Result")


class Busy(Refusal):
    """There is too much to do: the client may come again in a second."""

    def __init__(self) -> None:
        super().__init__(503, "there is too much to do", {"Retry-After": "1"})


class Pool:
    """Runs functions in `threads` threads, of one event loop; at most `waiting` more wait."""

    def __init__(self, name: str, threads: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"edgeclip {name}")
        self._most, self.running = threads + waiting, 0

    async def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises. Raises Busy where too much waits already.

        Who does not wait for it any more does not end it: it counts until it is done.
        """
        if self.running >= self._most:
            raise Busy
        self.running += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)

    def close(self) -> None:
        """What runs is waited for, what waits is not begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: "asyncio.Future[Result]") -> None:
        self.running -= 1
        if not future.cancelled():
            future.exception()  # who asked may have gone: it is no error that nobody took
