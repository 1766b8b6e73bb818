"""Who may come in to `edgeclip serve`: tokens, Host and Origin."""

import http.client
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from serving import Model, Site, serving  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

from runtime.errors import DataError  # noqa: E402
from runtime.serve.access import check_token, host_name, is_loopback  # noqa: E402

TOKEN = "correct-horse_battery"
ADDRESSES = ["/", "/page.js", "/sources", "/labels", "/events", "/info", "/metrics",
             "/openapi.json", "/no-such-thing", "/live"]  # fmt: skip


@pytest.fixture
def locked() -> Iterator[Site]:
    with serving(Model(), token=TOKEN) as site:
        yield site


@pytest.fixture
def open_site() -> Iterator[Site]:
    with serving(Model()) as site:
        yield site


@pytest.mark.parametrize("path", ADDRESSES)
def test_without_the_token_nothing_is_told(locked: Site, path: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN},
                    {"Authorization": "Bearer"}, {"Cookie": f"edgeclip_token={TOKEN}"},
                    {"Authorization": "Bearer \xe4"}):  # fmt: skip
        answer = locked.call("GET", path, headers=headers)
        assert (answer.status, "token" in answer.json["error"]) == (401, True)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert TOKEN not in str(answer.headers) + answer.content.decode()


def test_with_the_token_all_is_open_and_probes_need_none(locked: Site) -> None:
    assert locked.get("/labels", Authorization=f"bearer {TOKEN}").status == 200
    assert locked.get("/labels", Authorization=f"Bearer {TOKEN}", Host="cam.example").status == 200
    assert [locked.get(path).status for path in ("/health", "/ready")] == [200, 200]


def test_a_browser_keeps_the_token_as_a_cookie(locked: Site) -> None:
    answer = locked.get(f"/?token={TOKEN}&theme=dark")
    assert (answer.status, answer.headers["location"]) == (303, "/?theme=dark")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
    kept = {"Cookie": cookie.partition(";")[0]}
    assert locked.call("GET", "/labels", headers=kept).status == 200
    origin = {**kept, "Origin": f"http://127.0.0.1:{locked.port}"}
    with connect(f"ws://127.0.0.1:{locked.port}/live", additional_headers=origin) as socket:
        socket.send("{}")
        assert "labels" in socket.recv(5)
    assert locked.get("/?token=wrong").status == 401
    assert locked.get(f"/labels?token={TOKEN}").status == 401


def test_who_guesses_tokens_has_to_wait(locked: Site) -> None:
    statuses = [locked.get("/labels", Authorization=f"Bearer {n}").status for n in range(30)]
    assert statuses[0] == 401 and statuses[-1] == 429
    assert locked.get("/labels", Authorization=f"Bearer {TOKEN}").status == 200
    assert locked.get("/labels", Cookie="edgeclip_token=guessed").status == 429


def test_other_names_and_origins_are_refused(open_site: Site) -> None:
    here = f"127.0.0.1:{open_site.port}"
    for host in ("localhost", "LOCALHOST:80", "[::1]:80", here):
        assert open_site.get("/labels", Host=host).status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil", "[", "", "::1"):
        assert open_site.get("/labels", Host=host).status == 403
    assert open_site.get("/health", Host="evil.example").status == 200
    for origin in ("http://evil.example", "null", f"http://{here}.evil", "http://[", "file://"):
        for method, path in (("GET", "/labels"), ("PUT", "/labels"), ("POST", "/classify")):
            answer = open_site.call(method, path, headers={"Origin": origin})
            assert (answer.status, "origin" in answer.json["error"]) == (403, True)
    assert open_site.get("/labels", Origin=f"http://{here}").status == 200


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_a_websocket_is_refused_alike(open_site: Site, headers: dict[str, str]) -> None:
    # The library sends a Host of its own: one that is given comes second, which is no HTTP.
    if "Host" in headers:
        connection = http.client.HTTPConnection("127.0.0.1", open_site.port)
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        connection.request("GET", "/live", headers={**upgrade, **headers})
        assert connection.getresponse().status == 403
        connection.close()
        return
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{open_site.port}/live", additional_headers=headers)
    assert refused.value.response.status_code == 403
    assert refused.value.response.headers["x-content-type-options"] == "nosniff"


def test_a_token_is_a_must_beyond_loopback() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_token(None, host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "camera", ""):
        assert not is_loopback(host)
        with pytest.raises(DataError, match="give --token"):
            check_token(None, host)
        check_token(TOKEN, host)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "only-15-signs..",
        "a blank is in it",
        "tab\tbed-token-of-mine",
        "über-geheim-und-lang!",
    ],
)
def test_a_token_that_can_be_guessed_is_refused(token: str) -> None:
    with pytest.raises(DataError, match="16 or more"):
        check_token(token, "127.0.0.1")


def test_host_names() -> None:
    assert [host_name(h) for h in ("a:80", "[::1]:80", "A", "[", "")] == ["a", "::1", "a", "", ""]
