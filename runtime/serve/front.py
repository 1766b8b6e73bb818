"""The outermost layer: every answer has its security headers, and is counted; refusals are logged.

A body that is refused is not read to its end: the connection is closed after the answer. For a
moment what still comes is thrown away, or the client would lose the answer with its connection.
"""

import time

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from ..log import log
from .metrics import Metrics
from .refusal import Refusal

SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LINGER, LINGER_BYTES = 1.0, 8 << 20
_WHY = {404: "there is no such address; /openapi.json lists them",
        405: "this address does not take this method"}  # fmt: skip
_METHODS = ("GET", "HEAD", "POST", "PUT")


class Front:
    """Wraps the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.perf_counter()
        exchange = _Exchange(scope, receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass
        except Exception as error:
            await self._refuse(error, exchange)
        finally:
            path = scope.get("edgeclip.path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests[method, path, exchange.status] += 1
            self._metrics.seconds[path] += time.perf_counter() - start

    async def _refuse(self, error: Exception, exchange: "_Exchange") -> None:
        """Answers with what went wrong."""
        refusal = _refusal_of(error)
        if refusal is None:
            log.error("internal error: %s", error, exc_info=error)
            refusal = Refusal(500, "internal error: the log of the server says more")
        else:
            self._metrics.refuse(exchange.scope, refusal.status, refusal.why)
        if exchange.status:  # half of another answer is sent already
            raise error
        await refusal.response()(exchange.scope, exchange.receive, exchange.send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except (Refusal, HTTPException) as error:
            refusal = _refusal_of(error) or Refusal(500, "internal error")
            self._metrics.refuse(scope, refusal.status, refusal.why)
            response = refusal.response()
            response.headers.update(SECURITY)
            del response.headers["Content-Length"]  # uvicorn up to 0.52 would send a second one
            await WebSocket(scope, receive, send).send_denial_response(response)


def _refusal_of(error: Exception) -> Refusal | None:
    """What is said of an error; None of one that nobody expected."""
    if isinstance(error, HTTPException):
        why = _WHY.get(error.status_code, error.detail)
        return Refusal(error.status_code, why, error.headers)
    return error if isinstance(error, Refusal) else None


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self._unread = length.strip("0") != "" or "transfer-encoding" in headers
        self._receive, self._send = receive, send
        self.status = 0

    async def receive(self) -> Message:
        """Notes when the body was read to its end."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        """Adds the headers that every answer has; reads on where a body is left unread."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY)
            headers.setdefault("Cache-Control", "no-store")
            if self._unread:
                headers["Connection"] = "close"
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _linger(self) -> None:
        left = LINGER_BYTES
        with anyio.move_on_after(LINGER):
            while self._unread and left > 0:
                left -= len((await self.receive()).get("body", b""))
