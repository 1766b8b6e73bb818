"""Runs the application until it is ended: by a signal, or because the cameras cannot go on."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from .. import systemd
from ..errors import DataError
from ..log import log
from .connections import Sweeper, connection_class
from .live import MOST_MESSAGE
from .service import Service

STUCK = 10.0  # seconds in which the event loop must have come round
BACKLOG = 128
logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # refusals are told by ourselves
GRACE = 5  # seconds for requests that are under way when it ends


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address, on which nobody is listened to yet. Raises DataError."""
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
        return found
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "another program uses that port: end it, or give another --port"
        elif error.errno in (errno.EACCES, errno.EPERM):
            why = "this user may not: ports below 1024 need rights, others are --port 8080 and up"
        else:
            why = f"{error.strerror or error}: --host is a name or address of this machine"
        raise DataError(f"the server cannot listen on {host}:{port}: {why}") from error


class Server(uvicorn.Server):
    """uvicorn, with an end of its own: who waits for news is sent home first."""

    def __init__(self, service: Service, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_class(service.metrics),
                ws="websockets-sansio",
                ws_max_size=MOST_MESSAGE,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self.service = service
        self._sweeper = Sweeper(self.server_state, service.metrics)

    @property
    def alive(self) -> bool:
        """Whether requests are answered, and cameras watched. May be asked by any thread."""
        return time.monotonic() - self._sweeper.looked < STUCK and self.service.problem is None

    def stop(self) -> None:
        """Ends it soon. May be called by any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self._sweep = asyncio.ensure_future(self._sweeper.run())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, answers what is under way, and ends the others."""
        self.service.hub.end()
        await super().shutdown(sockets)
        self._sweep.cancel()


def run(server: Server, listening: socket.socket) -> str:
    """Serves from now on until a signal, `server.stop`, or until the cameras cannot go on; returns
    why it ended.

    What is under way is answered, and what goes on in the cameras is ended, and written. A second
    signal meanwhile does what it does elsewhere.
    """
    service, cameras = server.service, server.service.cameras
    try:
        with _signals(server) as reasons:
            listening.listen(BACKLOG)
            if cameras:
                cameras.on_error = server.stop
                cameras.start()
            log.info("serving on http://%s", shown_address(listening))
            with systemd.service(lambda: server.alive):
                server.run(sockets=[listening])
    finally:
        if cameras:
            cameras.stop()
        service.close()
        listening.close()
    return reasons[0] if reasons else "the cameras could not go on"


def shown_address(listening: socket.socket) -> str:
    """The host and port of a socket, as in a browser."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def _signals(server: Server) -> Iterator[list[str]]:
    """Notes what ends the server. uvicorn raises the signal that it was ended by again, when it has
    ended; one that comes before uvicorn begins ends it too."""
    reasons: list[str] = []

    def noted(number: int, frame: Any) -> None:
        server.stop()
        reasons.append("interrupted" if number == signal.SIGINT else "asked to end by SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield reasons
        return
    before = {n: signal.signal(n, noted) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield reasons
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
