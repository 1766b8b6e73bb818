"""The description of the server's addresses: OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0)."""

from importlib.metadata import version
from typing import Any, get_args

from ..event import Kind
from ..grabbed import State
from .limits import LONGEST_NAME, MOST_JSON

Json = dict[str, Any]
MOST_TOP, MOST_LISTED, LONGEST_POLL = 1000, 500, 30
NARROWEST, WIDEST = 16, 1920  # pixels

_TEXT: Json = {"type": "string"}
_NUMBER: Json = {"type": "number"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_YES: Json = {"type": "boolean"}


def document(max_body: int, locked: bool = False) -> Json:
    """The whole description. `max_body` is the most bytes of a picture; `locked` whether a token
    is needed."""
    paths: Json = {
        "/classify": {"post": _classify(max_body)},
        "/labels": {"get": _get("The labels.", _LABELS), "put": _put_labels()},
        "/sources": {"get": _get("What became of each source's frames.", _list(_SOURCE))},
        "/sources/{n}/frame.jpg": {"get": _frame()},
        "/sources/{n}/history": {"get": _history()},
        "/events": {"get": _events()},
        "/info": {"get": _get("What runs here.", _INFO)},
        "/metrics": {"get": _get("Numbers for Prometheus.", _TEXT, "text/plain")},
        "/openapi.json": {"get": _get("This description.", {"type": "object"})},
        "/": {"get": _get("The page.", _TEXT, "text/html")},
    }
    if locked:
        for operation in (operation for path in paths.values() for operation in path.values()):
            operation["security"] = [{"token": []}, {"cookie": []}]
            operation["responses"] |= _errors(401, 429)
    paths["/health"] = {"get": _probe("Whether the process and its cameras are well.", "ok")}
    paths["/ready"] = {"get": _probe("Whether a source gives frames, or there is none.", "ready")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "edgeclip",
            "version": version("edgeclip"),
            "description": "What cameras show, named by labels given as text. The page uses the "
            "WebSocket /live besides, which sends the newest of every source.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": _object(error=_TEXT)},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "edgeclip_token"},
            },
        },
    }


def _classify(max_body: int) -> Json:
    picture = {"schema": {"type": "string", "format": "binary", "maxLength": max_body}}
    described = f"A picture file of up to {max_body:,} bytes: JPEG, PNG, WebP, BMP, TIFF, GIF, PPM."
    return _get("What a picture shows.", _FOUND, errors=(408, 413, 415, 422, 429, 503)) | {
        "parameters": [_query("top", 5, 1, MOST_TOP, "How many labels to name.")],
        "requestBody": {
            "required": True,
            "description": described,
            "content": {"image/*": picture, "application/octet-stream": picture},
        },
    }


def _put_labels() -> Json:
    described = (
        "A list of labels, a mapping of labels to synonyms, or a set with groups, negative prompts "
        f"and background; up to {MOST_JSON:,} bytes."
    )
    name = {"type": "string", "pattern": r"\S", "maxLength": LONGEST_NAME}
    names = {**_list(name), "minItems": 1, "uniqueItems": True}
    given = {"anyOf": [names, {"type": "object", "minProperties": 1}]}
    body = {
        "required": True,
        "description": described,
        "content": {"application/json": {"schema": given}},
    }
    errors = 408, 413, 415, 422, 429, 503
    return _get("Other labels, from the next frame on.", _LABELS, errors=errors) | {
        "requestBody": body
    }


def _frame() -> Json:
    width = _query("width", 640, NARROWEST, WIDEST, "About so many pixels wide.")
    picture = {"type": "string", "format": "binary"}
    return _get("The newest frame.", picture, "image/jpeg", (404, 422, 503)) | {
        "parameters": [_INDEX, width]
    }


def _history() -> Json:
    return _get("The labels of a source over time.", _PAST, errors=(404, 503)) | {
        "parameters": [_INDEX]
    }


def _events() -> Json:
    after = _query("after", None, 0, 2**53, "Those after the event with this id; else the newest.")
    limit = _query("limit", 100, 1, MOST_LISTED, "At most so many.")
    wait = _query("wait", 0, 0, LONGEST_POLL, "Where there is none, wait so many seconds for one.")
    shown = _object(events=_list(_EVENT), last=_COUNT)
    return _get("What happened.", shown, errors=(422,)) | {"parameters": [after, limit, wait]}


def _probe(summary: str, status: str) -> Json:
    return _get(summary, _object(status={"const": status}), errors=(503,))


def _get(summary: str, schema: Json, kind: str = "application/json", errors: Any = ()) -> Json:
    """An operation, its answer and its errors."""
    well = {"description": "It is well.", "content": {kind: {"schema": schema}}}
    return {"summary": summary, "responses": {"200": well, **_errors(403, *errors)}}


def _errors(*statuses: int) -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(s): {"description": _WHY[s], "content": content} for s in sorted(set(statuses))}


_WHY = {
    401: "The token is missing, or wrong.",
    403: "The Host or Origin is another one.",
    404: "There is no such source.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The content type is another one.",
    422: "A parameter or the body is not right; the error says what.",
    429: "Too many requests; Retry-After says when to come again.",
    503: "There is too much to do, or nothing to show yet.",
}


def _query(name: str, default: int | None, least: int, most: int, described: str) -> Json:
    schema: Json = {"type": "integer", "minimum": least, "maximum": most}
    if default is not None:
        schema["default"] = default
    return {"name": name, "in": "query", "description": described, "schema": schema}


_INDEX: Json = {"name": "n", "in": "path", "required": True, "schema": {**_COUNT, "maximum": 9999},
                "description": "The source's place in /sources, from 0."}  # fmt: skip


def _object(*optional: str, **fields: Json) -> Json:
    """An object of these fields, which are all there but for those that are `optional`."""
    needed = [name for name in fields if name not in optional]
    return {"type": "object", "properties": fields, "required": needed}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _pairs(first: str, second: str) -> Json:
    items = {"type": sorted({first, second})}
    described = f"Pairs: a {first}, a {second}."
    return {**_list({"type": "array", "items": items, "minItems": 2, "maxItems": 2}),
            "description": described}  # fmt: skip


_COUNTS = ("seen", "classified", "skipped", "dropped", "broken", "thinned", "reconnects", "hangs")
_SOURCE = _object(
    source=_TEXT,
    state={"enum": list(get_args(State))},
    reason=_TEXT,
    **dict.fromkeys(_COUNTS, _COUNT),
    **dict.fromkeys(("fps", "p50_ms", "p90_ms", "p99_ms"), _NUMBER),
)
_FOUND = _object(
    label=_TEXT,
    score=_NUMBER,
    cosine=_NUMBER,
    unknown=_YES,
    path=_list(_TEXT),
    background={"type": ["string", "null"]},
    top=_pairs("string", "number"),
    ms={"type": "object", "additionalProperties": _NUMBER},
)
_LABELS = _object(labels=_list(_TEXT), set={"type": ["object", "null"]})
_EVENT = _object(
    "score",
    "thumbnail",
    id=_COUNT,
    wall=_NUMBER,
    event={"enum": list(get_args(Kind))},
    label=_TEXT,
    source=_TEXT,
    time=_NUMBER,
    duration=_NUMBER,
    score=_NUMBER,
    thumbnail={"type": "string", "contentEncoding": "base64", "contentMediaType": "image/jpeg"},
)
_PAST = _object(
    labels=_list(_TEXT),
    start=_NUMBER,
    end=_NUMBER,
    spans=_list(_object(label=_TEXT, start=_NUMBER, end=_NUMBER, rule=_YES)),
    curves={"type": "object", "additionalProperties": _pairs("number", "number")},
)
_INFO = _object(
    bundle=_TEXT,
    model=_TEXT,
    backend=_TEXT,
    precision=_TEXT,
    labels=_COUNT,
    version=_TEXT,
    uptime_s=_NUMBER,
    sources=_list(_TEXT),
)
