"""The WebSocket `/live`: the newest of every source, at the pace of whoever watches.

A client asks for the next state and the pictures that it wants, and is answered as soon as there is
anything newer than what it has had; it asks again when it has drawn that. So a slow client only
gets fewer pictures, always the newest, and nothing waits for it.
"""

import time
from typing import TYPE_CHECKING

import anyio
import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from .pictures import WIDTH
from .pool import Busy
from .refusal import Refusal

if TYPE_CHECKING:
    from .service import Service

MOST_CLIENTS = 16
HEARTBEAT = 2.0  # seconds after which a client is answered without news
SHORTEST = 1 / 30  # seconds between two answers to one client
IDLE = 60.0  # seconds in which a client must ask again
MOST_MESSAGE = 4096  # bytes of a client's message


class Ask(msgspec.Struct):
    """What a client asks for: pictures of the sources `next`, about `width` pixels wide."""

    next: list[int] = []
    width: int = WIDTH


class Viewer:
    """One client, and what it has had."""

    def __init__(self, service: "Service", socket: WebSocket) -> None:
        self._service, self._socket = service, socket
        self._version = -1
        self._had: dict[int, int] = {}  # versions of pictures, by source
        self._event: int | None = None
        self._sent = 0.0

    async def run(self) -> str | None:
        """Answers until the client goes, or the server ends. Returns what the client did wrong."""
        while not self._service.hub.news.closed:
            with anyio.move_on_after(IDLE) as patience:
                message = await self._socket.receive()
            if patience.cancelled_caught:
                return f"asked for nothing in {IDLE:.0f} s"
            if message["type"] == "websocket.disconnect":
                return None
            try:
                ask = msgspec.json.decode(message.get("text") or "", type=Ask)
            except (msgspec.DecodeError, RecursionError) as error:
                return f"sent what is no request: {error}"
            await self._answer(ask)
        return None

    async def _answer(self, ask: Ask) -> None:
        hub = self._service.hub
        await anyio.sleep(max(0.0, self._sent + SHORTEST - time.monotonic()))
        if not self._lacking(ask):
            await hub.news.wait(self._version, HEARTBEAT)
        self._sent, self._version = time.monotonic(), hub.news.version
        pictures = await self._pictures(ask)
        events, self._event = hub.events(self._event, 20)
        text = self._service.state_json(events, [index for index, _ in pictures])
        await self._socket.send_text(text)
        for _, content in pictures:
            await self._socket.send_bytes(content)

    def _lacking(self, ask: Ask) -> list[int]:
        """The sources that are asked for and have a newer picture than the client."""
        sources = self._service.hub.sources
        wanted = sorted({n for n in ask.next if 0 <= n < len(sources)})
        return [n for n in wanted if sources[n].version > self._had.get(n, 0)]

    async def _pictures(self, ask: Ask) -> list[tuple[int, bytes]]:
        """Those that are asked for and newer than what the client has."""
        found: list[tuple[int, bytes]] = []
        for index in self._lacking(ask):
            try:
                source = self._service.hub.sources[index]
                made = await self._service.pictures.newest(source, ask.width)
            except Busy:  # it comes with a later answer
                continue
            if made is not None and made[0] > self._had.get(index, 0):
                self._had[index] = made[0]
                found.append((index, made[1]))
        return found


class Live:
    """The WebSocket's endpoint; counts who watches."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self.clients = 0

    async def __call__(self, socket: WebSocket) -> None:
        if self.clients >= MOST_CLIENTS:
            raise Refusal(503, f"{MOST_CLIENTS} browsers watch already: close one of them")
        self.clients += 1
        try:
            await socket.accept()
            self._service.expect_labels()
            if why := await Viewer(self._service, socket).run():
                self._service.metrics.refuse(socket.scope, 1008, why)
                await socket.close(1008, why[:100])
            else:
                await socket.close(1012)
        except WebSocketDisconnect:
            pass  # it has gone
        finally:
            self.clients -= 1
