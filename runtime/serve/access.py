"""Who may come in: those who have the token, or on a machine's own address whoever is on it.

Without a token a page elsewhere on the web could reach the server through the user's browser, under
a name that leads to 127.0.0.1 (DNS rebinding): so the Host must be this machine's. No page of
another origin may call the server in any case.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import DataError
from .limits import Buckets
from .refusal import Refusal, client_of

OPEN = ("/health", "/ready")  # for whoever looks after the process
COOKIE = "edgeclip_token"
SHORTEST = 16  # characters, which nobody guesses
GUESSES = 20  # wrong tokens of an address, before it is sent away for two seconds each
_LOCAL = ("localhost", "127.0.0.1", "::1")


def check_token(token: str | None, host: str) -> None:
    """Raises DataError where a token is needed, or can be guessed."""
    if token is None:
        if not is_loopback(host):
            raise DataError(
                f"--host {host} can be reached by others: give --token, or set EDGECLIP_TOKEN "
                "(for one: python -c 'import secrets; print(secrets.token_urlsafe())')"
            )
    elif len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise DataError(f"a token has {SHORTEST} or more ASCII letters, digits or signs")


def is_loopback(host: str) -> bool:
    """Whether a server at this address is only reached from its own machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Passes on requests that have the token, or where none is set are for this machine's name."""

    def __init__(self, app: ASGIApp, token: str | None, host: str = "127.0.0.1") -> None:
        self._app, self._token = app, token
        self._hosts = {*_LOCAL, host}
        self._cookie = hashlib.sha256(f"edgeclip cookie {token}".encode()).hexdigest()
        self._wrong = Buckets(rate=0.5, burst=GUESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN:
            self._check_origin(Headers(scope=scope))
            if self._token is None:
                self._check_host(Headers(scope=scope))
            elif scope["type"] == "http" and (given := _token_of_page(scope)) is not None:
                return await self._enter(given, scope, receive, send)
            else:
                self._check_token(scope)
        await self._app(scope, receive, send)

    async def _enter(self, given: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Has a browser keep the token, and opens the page without it in its address."""
        self._check(scope, given)
        rest = parse_qsl(scope["query_string"].decode("latin-1"))
        query = urlencode([(key, value) for key, value in rest if key != "token"])
        response = RedirectResponse(f"/?{query}" if query else "/", 303)
        response.set_cookie(COOKIE, self._cookie, httponly=True, samesite="strict",
                            secure=scope.get("scheme") == "https")  # fmt: skip
        await response(scope, receive, send)

    def _check_token(self, scope: Scope) -> None:
        connection = HTTPConnection(scope)
        kind, _, token = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self._check(scope, token.strip())
        if cookie := connection.cookies.get(COOKIE):
            if _same(cookie, self._cookie):
                return
            self._count_guess(scope)
            raise _unauthorized("the token is another one by now: open /?token=... again")
        raise _unauthorized(
            "this server needs its token: open /?token=... in a browser, or send the header "
            "Authorization: Bearer ..."
        )

    def _check(self, scope: Scope, given: str) -> None:
        """Compares in constant time. Raises Refusal."""
        if _same(given, self._token or ""):
            return
        self._count_guess(scope)
        raise _unauthorized("the token is wrong")

    def _count_guess(self, scope: Scope) -> None:
        """Raises Refusal, 429, for who guesses on and on. The right token is let in all the same:
        nobody is locked out by what others do behind the same address."""
        if pause := self._wrong.take(client_of(scope)):
            headers = {"Retry-After": str(pause)}
            raise Refusal(429, "too many wrong tokens from this address: wait", headers)

    def _check_host(self, headers: Headers) -> None:
        name = host_name(headers.get("host", ""))
        if name not in self._hosts:
            raise Refusal(
                403, "the Host header names another machine: use localhost, or start with --token"
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        try:
            theirs = urlsplit(origin).netloc.lower()
        except ValueError:
            theirs = ""
        if not theirs or theirs != headers.get("host", "").lower():
            raise Refusal(403, "pages of other origins may not call this server")


def host_name(host: str) -> str:
    """The name or address of a Host header, without its port; "" where there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _token_of_page(scope: Scope) -> str | None:
    """What `GET /?token=` gives."""
    if scope["path"] != "/" or scope["method"] != "GET":
        return None
    return HTTPConnection(scope).query_params.get("token")


def _same(given: str, right: str) -> bool:
    """Whether they are equal; it takes as long where they are not."""
    return hmac.compare_digest(given.encode(errors="replace"), right.encode())


def _unauthorized(why: str) -> Refusal:
    return Refusal(401, why, {"WWW-Authenticate": 'Bearer realm="edgeclip"'})
