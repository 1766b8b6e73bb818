"""The server's application: its addresses, and the layers around them."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp

from .access import Access
from .api import Api
from .front import Front
from .limits import MOST_JSON, Limits
from .service import Service

PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript",
          ".svg": "image/svg+xml"}  # fmt: skip
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    service: Service,
    *,
    token: str | None = None,
    host: str = "127.0.0.1",
    max_body: int = 16 << 20,
    rate: float | None = 100.0,
) -> ASGIApp:
    """The whole application. `max_body` is the most bytes of a picture, `rate` how many requests
    with a body a second are taken from one address (None: any)."""
    api = Api(service, max_body, locked=token is not None)
    routes = [
        *(_page(file) for file in sorted(PAGE.iterdir()) if file.suffix in _TYPES),
        _route("/sources", api.sources),
        _route("/sources/{n}/frame.jpg", api.frame),
        _route("/sources/{n}/history", api.history),
        _route("/classify", api.classify, "POST"),
        _route("/labels", api.labels, "GET", "PUT"),
        _route("/events", api.events),
        _route("/info", api.info),
        _route("/health", api.health),
        _route("/ready", api.ready),
        _route("/metrics", api.metrics),
        _route("/openapi.json", api.openapi),
        WebSocketRoute("/live", api.live),
    ]
    app = Limits(
        _Router(routes=routes), {"/classify": max_body, "/labels": min(MOST_JSON, max_body)}, rate
    )
    return Front(Access(app, token, host), service.metrics)


def _route(path: str, handler: Handler, *methods: str) -> Route:
    async def endpoint(request: Request) -> Response:
        request.scope["edgeclip.path"] = path  # by which it is counted
        return await handler(request)

    return Route(path, endpoint, methods=methods or ("GET",))


def _page(file: Path) -> Route:
    """A file of the page; no other is ever opened."""

    async def page(request: Request) -> Response:
        headers = {"Cache-Control": "no-cache"}
        return Response(file.read_bytes(), headers=headers, media_type=_TYPES[file.suffix])

    return _route("/" if file.name == "index.html" else f"/{file.name}", page)


class _Router(Starlette):
    """Of starlette's layers none: `Front` answers errors too."""

    def build_middleware_stack(self) -> ASGIApp:
        return self.router
