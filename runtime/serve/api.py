"""What is answered at each address (see `openapi.py`)."""

import re
import time
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from ..errors import DataError, FrameError
from ..label_sets import read_json
from .live import Live
from .metrics import TYPE
from .openapi import LONGEST_POLL, MOST_LISTED, MOST_TOP, NARROWEST, WIDEST, document
from .pictures import WIDTH
from .refusal import Refusal
from .service import Service

_PICTURES = ("image/", "application/octet-stream", "application/x-www-form-urlencoded")
"""Content types of a picture; the last is what `curl --data-binary` says."""


class Api:
    """The handlers of a service."""

    def __init__(self, service: Service, max_body: int, locked: bool) -> None:
        self._service = service
        self._live = Live(service)
        self._document = _json(document(max_body, locked))

    async def sources(self, request: Request) -> Response:
        """What became of each source's frames."""
        return _json(self._service.sources())

    async def frame(self, request: Request) -> Response:
        """The newest frame of a source."""
        index = self._index(request)
        width = _whole(request, "width", WIDTH, NARROWEST, WIDEST)
        made = await self._service.pictures.newest(self._service.hub.sources[index], width)
        if made is None:
            raise Refusal(503, "the source has not given a frame yet", {"Retry-After": "1"})
        return Response(made[1], media_type="image/jpeg")

    async def history(self, request: Request) -> Response:
        """The labels of a source over time."""
        look = partial(self._service.history, self._index(request))
        return _json(await self._service.reading.run(look))

    async def classify(self, request: Request) -> Response:
        """What a picture shows."""
        top = _whole(request, "top", 5, 1, MOST_TOP)
        kind = request.headers.get("content-type", "application/octet-stream").lower()
        if not kind.startswith(_PICTURES):
            raise Refusal(415, "send the picture's bytes as image/* or application/octet-stream")
        content = await request.body()
        try:
            work = partial(self._service.classify, content, top)
            return _json(await self._service.classifying.run(work))
        except FrameError as error:
            raise Refusal(422, str(error)) from None

    async def labels(self, request: Request) -> Response:
        """The labels; PUT sets others."""
        if request.method != "PUT":
            return _json(self._service.labels())
        if not _is_json(request):
            raise Refusal(415, "send the labels as application/json")
        given = _decoded(await request.body())
        try:
            work = partial(self._service.set_labels, given)
            return _json(await self._service.labelling.run(work))
        except (DataError, RecursionError) as error:
            raise Refusal(422, str(error)) from None

    async def events(self, request: Request) -> Response:
        """What happened; waits where nothing did."""
        after = _whole(request, "after", None, 0, 2**53)
        limit = _whole(request, "limit", 100, 1, MOST_LISTED)
        until = time.monotonic() + _whole(request, "wait", 0, 0, LONGEST_POLL)
        hub = self._service.hub
        while True:
            version = hub.event_news.version
            found, last = hub.events(after, limit)
            left = until - time.monotonic()
            if found or left <= 0 or hub.event_news.closed:
                return _json({"events": found, "last": last})
            await hub.event_news.wait(version, left)

    async def info(self, request: Request) -> Response:
        """What runs here."""
        return _json(self._service.info())

    async def health(self, request: Request) -> Response:
        """Whether the process and its camera loop are well."""
        return _told(self._service.problem, "ok")

    async def ready(self, request: Request) -> Response:
        """Whether it does its work already."""
        return _told(self._service.unready, "ready")

    async def metrics(self, request: Request) -> Response:
        """Numbers for Prometheus."""
        text = self._service.metrics.text(self._service, self._live.clients)
        return Response(text, headers={"Content-Type": TYPE})

    async def openapi(self, request: Request) -> Response:
        """This description."""
        return self._document

    async def live(self, socket: WebSocket) -> None:
        """The newest of everything, as fast as the client takes it."""
        await self._live(socket)

    def _index(self, request: Request) -> int:
        text, count = request.path_params["n"], len(self._service.hub.sources)
        if not re.fullmatch("[0-9]{1,4}", text) or int(text) >= count:
            raise Refusal(404, f"there is no such source; there are {count}, from 0")
        return int(text)


def _json(shown: Any) -> Response:
    return Response(msgspec.json.encode(shown), media_type="application/json")


def _told(problem: str | None, well: str) -> Response:
    """An answer to a probe: it is no refusal, and is not logged."""
    return Refusal(503, problem).response() if problem else _json({"status": well})


def _whole(request: Request, name: str, default: Any, least: int, most: int) -> Any:
    """A whole number of the query. Raises Refusal."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,16}", text) or not least <= int(text) <= most:
        raise Refusal(422, f"{name} is a whole number of {least} to {most}")
    return int(text)


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "application/json")
    return kind.partition(";")[0].strip().lower() == "application/json"


def _decoded(content: bytes) -> Any:
    """The JSON of a body. Raises Refusal."""
    try:
        return read_json(content)
    except DataError as error:
        raise Refusal(422, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Refusal(422, f"the body is not valid JSON: {error}") from None
