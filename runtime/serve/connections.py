"""Connections: how many there are, and how long each may dawdle.

uvicorn bounds neither the time in which a client sends a request's head, nor that in which it reads
an answer. Both are looked at here, once a second. (Of a WebSocket it does the second: its pings
must be answered.)
"""

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .front import SECURITY
from .metrics import Metrics

MOST, MOST_OF_ONE = 200, 100  # connections, and those of one address
PATIENCE = {"head": 10.0, "answer": 60.0, "closing": 10.0}
"""Seconds to send a request's head, to read an answer, and to read what is left at the end."""


class Connection(H11Protocol):
    """One client's. It is refused where there are too many; what is not HTTP is answered as any
    other mistake."""

    metrics = Metrics()
    """Where refusals are counted."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        of_one = sum(_address(other) == _address(self) for other in self.connections)
        if len(self.connections) > MOST or of_one > MOST_OF_ONE:
            self._refuse(503, "too many connections", {"Retry-After": "1"})

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(400, "this is no HTTP request, or its head is too large")
        else:  # it is being answered, or was
            self.transport.close()

    def _refuse(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        self.metrics.refuse({"method": "connection", "client": self.client}, status, why)
        body = json.dumps({"error": why}).encode()
        shown = {"Content-Type": "application/json", "Content-Length": str(len(body)),
                 "Connection": "close", **SECURITY, **(headers or {})}  # fmt: skip
        response = h11.Response(status_code=status, headers=list(shown.items()))
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_class(metrics: Metrics) -> type[Connection]:
    """Connections whose refusals are counted there."""
    return type("Connection", (Connection,), {"metrics": metrics})


class Sweeper:
    """Cuts connections off that dawdle."""

    def __init__(self, state: ServerState, metrics: Metrics) -> None:
        self._state, self._metrics = state, metrics
        self.looked = time.monotonic()
        self._since: dict[Any, tuple[tuple[str, Any], float]] = {}

    async def run(self) -> None:
        """Looks once a second, for ever."""
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(1.0)

    def look(self, now: float) -> None:
        """Cuts off those that have done the same for longer than they may."""
        before, self._since, self.looked = self._since, {}, now
        connections: list[Any] = list(self._state.connections)
        for connection in connections:
            doing = _doing(connection)
            if doing is None:
                continue
            known, since = before.get(connection, (None, now))
            if known != doing:
                since = now
            if now - since > PATIENCE[doing[0]]:
                if not _is_spare(connection):
                    who = {"method": "connection", "client": connection.client}
                    self._metrics.refuse(who, 408, f"it took too long ({doing[0]})")
                connection.transport.abort()
            else:
                self._since[connection] = doing, since


def _doing(connection: Any) -> tuple[str, Any] | None:
    """What a connection is waited for, and in which request; None where it is not."""
    unread = connection.transport is not None and connection.transport.get_write_buffer_size()
    cycle = getattr(connection, "cycle", None)
    if unread and connection.transport.is_closing():
        return "closing", None
    if not isinstance(connection, H11Protocol):
        return None
    if unread:
        return "answer", cycle
    return ("head", cycle) if connection.conn.their_state is h11.IDLE else None


def _is_spare(connection: Any) -> bool:
    """Whether nothing has come on it, or nothing after its last request: browsers keep some."""
    return isinstance(connection, H11Protocol) and not connection.conn.trailing_data[0]


def _address(connection: Any) -> str:
    client = connection.client
    return str(client[0]) if client else "?"
