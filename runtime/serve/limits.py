"""How much one client may ask for: requests a second, bytes of a body, and time to send it."""

import math
import time
from collections import OrderedDict
from collections.abc import Mapping

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusal import Refusal, client_of

MOST_ADDRESSES = 4096  # whose rates are known; the oldest are forgotten
SILENCE, LONGEST = 10.0, 60.0  # seconds without a byte of a body, and for all of it
MOST_JSON = 256 << 10  # bytes of what is no picture
LONGEST_NAME = 200  # letters of a label: all browsers are sent it with every frame
BODIES = 8  # of the greatest size may be held at one time


class Buckets:
    """A token bucket for each address: `rate` a second, and `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> int:
        """0, or where the bucket is empty after how many seconds to come again."""
        now = time.monotonic()
        left, at = self._left.pop(address, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate)
        empty = left < 1
        self._left[address] = left - (not empty), now
        while len(self._left) > MOST_ADDRESSES:
            self._left.popitem(last=False)
        return math.ceil((1 - left) / self._rate) if empty else 0


class Limits:
    """Passes on requests whose bodies are read within these limits.

    `sizes` are the most bytes of a body by address; others take none. `rate` is how many requests
    with a body an address may send a second, and three seconds' worth at once (None: any).
    """

    def __init__(self, app: ASGIApp, sizes: Mapping[str, int], rate: float | None) -> None:
        self._app, self._sizes = app, sizes
        self._buckets = Buckets(rate, max(1.0, 3 * rate)) if rate else None
        self._most_held = BODIES * max(sizes.values())
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        self._check_rate(scope)
        most = self._sizes.get(scope["path"], 0)
        _check_length(scope, most)
        body = _Body(self, receive, most)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.size

    def _check_rate(self, scope: Scope) -> None:
        if self._buckets and scope["method"] in ("POST", "PUT"):
            if pause := self._buckets.take(client_of(scope)):
                why = "too many requests from this address"
                raise Refusal(429, why, {"Retry-After": str(pause)})

    def hold(self, size: int) -> None:
        """Counts what is held of bodies. Raises Refusal where it is too much."""
        if self._held + size > self._most_held:
            raise Refusal(503, "too many large requests at one time", {"Retry-After": "1"})
        self._held += size


class _Body:
    """A request's body as it comes."""

    def __init__(self, limits: Limits, receive: Receive, most: int) -> None:
        self._limits, self._receive, self._most = limits, receive, most
        self._began = time.monotonic()
        self.size = 0

    async def receive(self) -> Message:
        """The next part. Raises Refusal where it is late, or the whole is too large."""
        left = self._began + LONGEST - time.monotonic()
        with anyio.move_on_after(max(0.0, min(SILENCE, left))) as patience:
            message = await self._receive()
        if patience.cancelled_caught:
            raise Refusal(408, "the body came too slowly")
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            if self.size + size > self._most:
                raise _too_large(self._most)
            self._limits.hold(size)
            self.size += size
        return message


def _check_length(scope: Scope, most: int) -> None:
    length = Headers(scope=scope).get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most)


def _too_large(most: int) -> Refusal:
    if most == 0:
        return Refusal(413, "no body is taken here")
    shown = f"{most / 2**20:g} MiB" if most >= 1 << 20 else f"{most / 2**10:g} KiB"
    return Refusal(413, f"the body is larger than {shown}")
