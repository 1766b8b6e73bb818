"""What a client is refused: one status, one clear sentence, one line in the log."""

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from ..log import Throttle

_log = logging.getLogger("edgeclip.refused")
_log.addFilter(Throttle())
_LONGEST = 120  # characters of an address that are logged


class Refusal(Exception):
    """Ends a request with this status and sentence."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, dict(headers or {})

    def response(self) -> Response:
        """For the client."""
        return JSONResponse({"error": self.why}, self.status, self.headers)


def log_refusal(scope: Mapping[str, Any], status: int, why: str) -> None:
    """Writes one line of who was refused what, and why; not where thousands are."""
    what = f"{scope.get('method', 'WebSocket')} {scope.get('path', '')[:_LONGEST]}".rstrip()
    _log.warning(f"refused {status}: %s from %s: %s", what, client_of(scope), why)


def client_of(scope: Mapping[str, Any]) -> str:
    """The address of the client; "?" where it has none."""
    client = scope.get("client")
    return str(client[0]) if client else "?"
