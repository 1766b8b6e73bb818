"""Hostile clients of `edgeclip serve`: they are refused, logged, and harm nobody."""

import io
import json
import logging
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mjpeg_server import jpeg
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from serving import Model, Site, serving, until  # noqa: E402

from runtime.log import TextFormatter, Throttle  # noqa: E402
from runtime.serve import connections, front, limits  # noqa: E402
from runtime.serve.limits import Buckets  # noqa: E402
from runtime.serve.service import MOST_SCANS  # noqa: E402

MOST = 100_000


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What other tests were refused does not count, and nobody lingers."""
    monkeypatch.setattr(front, "LINGER", 0.2)
    logger, throttle = logging.getLogger("edgeclip.refused"), Throttle()
    before = logger.filters[:]
    logger.filters[:] = [throttle]
    yield
    logger.filters[:] = before


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Model(), max_body=MOST, rate=None) as site:
        yield site


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "edgeclip.refused"]


def said(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except ConnectionResetError:
        pass
    return content


def test_a_huge_body_is_refused_before_it_is_sent(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in said(connection)
    assert any("413" in line and "larger than" in line for line in lines(caplog))


def test_a_body_that_is_too_large_still_gets_its_answer(site: Site) -> None:
    for path, size in (("/classify", 4_000_000), ("/labels", 1_000_000), ("/info", 1_000_000)):
        method = {"/classify": "POST", "/labels": "PUT", "/info": "GET"}[path]
        answer = site.call(method, path, b"x" * size, {"Content-Type": "application/octet-stream"})
        assert answer.status == 413 and answer.headers["connection"] == "close"


def test_an_endless_body_is_cut_off(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        with pytest.raises(OSError):
            while sent < 1 << 30:
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                sent += 65536
        assert sent < 1 << 26


@pytest.mark.parametrize("length", ["-1", "1e9", "9" * 5000, "0x10", "10, 20"])
def test_an_odd_length_is_refused(site: Site, length: str) -> None:
    with site.connect() as connection:
        head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        answer = said(connection)
        assert b" 400 " in answer or b" 413 " in answer, answer
    assert site.get("/health").status == 200


def test_slow_senders_are_sent_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE", 0.1)
    with site.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx"
        )
        assert b" 408 " in said(connection)
    monkeypatch.setattr(limits, "SILENCE", 10)
    monkeypatch.setattr(limits, "LONGEST", 0.2)
    with site.connect() as connection:
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
        )
        start = time.monotonic()
        while time.monotonic() - start < 0.3:
            connection.sendall(b"x")
            time.sleep(0.02)
        assert b" 408 " in said(connection)


def test_who_sends_no_head_or_reads_nothing_is_cut_off(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", dict.fromkeys(connections.PATIENCE, 0.5))
    with site.connect() as silent, site.connect() as kept, site.connect() as dribbling:
        start = time.monotonic()
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        dribbling.sendall(b"GET / HTTP/1.1\r\n")
        assert said(silent) == b"" and said(dribbling) == b""
        assert b" 200 " in said(kept)
        assert time.monotonic() - start < 5
    assert site.get("/health").status == 200
    assert caplog.text.count("took too long") == 1  # browsers open spare connections: no offence


def test_who_asks_much_and_reads_nothing_is_cut_off(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", dict.fromkeys(connections.PATIENCE, 0.5))
    assert site.call("PUT", "/labels", {"labels": {"x": ["x" * 90_000]}}).status == 200
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(b"GET /labels HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        until(lambda: site.server.server_state.connections)
        until(lambda: not site.server.server_state.connections)
    assert site.get("/health").status == 200


def test_a_thousand_connections(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    opened = []
    try:
        for _ in range(1000):
            connection = socket.create_connection(("127.0.0.1", site.port), timeout=10)
            opened.append(connection)
        until(lambda: len(site.server.server_state.connections) <= connections.MOST_OF_ONE)
        assert b" 503 " in said(opened[-1])
    finally:
        for connection in opened:
            connection.close()
    until(lambda: not site.server.server_state.connections)
    assert site.get("/health").status == 200
    assert 1 <= len(lines(caplog)) <= 30  # not nine hundred


def test_the_rate_of_an_address_is_limited() -> None:
    with serving(Model(), rate=2) as site:
        answers = [site.call("POST", "/classify", jpeg(90)) for _ in range(8)]
        assert [answer.status for answer in answers].count(200) in (6, 7)
        assert answers[-1].status == 429 and int(answers[-1].headers["retry-after"]) >= 1
        assert site.get("/labels").status == 200


def test_buckets_fill_again_and_are_no_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_ADDRESSES", 3)
    buckets = Buckets(rate=20, burst=1)
    assert buckets.take("a") == 0 and buckets.take("a") == 1 and buckets.take("b") == 0
    time.sleep(0.06)
    assert buckets.take("a") == 0 and buckets.take("a") == 1
    for name in "bcde":
        buckets.take(name)
    assert buckets.take("a") == 0  # it was forgotten


def test_too_much_work_is_refused_at_once() -> None:
    model = Model(seconds=0.05)
    with serving(model, rate=None) as site:
        with ThreadPoolExecutor(60) as clients:
            asked = clients.map(lambda _: site.call("POST", "/classify", jpeg(90)), range(60))
            statuses = [answer.status for answer in asked]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 33


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/page.css/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc",
     "/..%2f..%2fetc/passwd", "/page.css%00", "/sources/..%2f..%2f/frame.jpg", "/\\..\\..\\etc",
     "/sources/%d9%a1/frame.jpg", "/sources/0x0/frame.jpg", "/static/app.py", "/index.html"],
)  # fmt: skip
def test_tricks_with_paths_find_nothing(site: Site, path: str) -> None:
    with site.connect() as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = said(connection)
    assert b" 404 " in answer.partition(b"\r\n")[0]
    assert b"root:" not in answer and b"nosniff" in answer


@pytest.mark.parametrize(
    "junk",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\r\n" * 5000,
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET /" + b"a" * 100_000,
     b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_refused(
    site: Site, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with site.connect() as connection:
        try:
            connection.sendall(junk)
        except OSError:
            pass  # it was refused before all of it was sent
        connection.settimeout(1)
        try:
            answer = said(connection)
        except TimeoutError:
            answer = b""
    assert answer == b"" or b" 400 " in answer or b" 503 " in answer
    assert site.get("/health").status == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_a_line_of_the_log_cannot_be_forged(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.get("/x%0aedgeclip:%20all%20is%20well%1b[2J")
    [record] = [r for r in caplog.records if r.name == "edgeclip.refused"]
    line = TextFormatter().format(record)
    assert "\n" not in line and "\x1b" not in line and "\\nedgeclip" in line


def test_a_script_in_a_label_is_only_ever_json(site: Site) -> None:
    script = "<script>alert(1)</script>"
    answer = site.call("PUT", "/labels", [script, "cat"])
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    for path in ("/labels", "/info", "/sources"):
        assert site.get(path).headers["content-type"] == "application/json"
    assert script not in site.get("/").content.decode()
    assert script.encode() not in site.get("/metrics").content


def bomb() -> bytes:
    """A PNG of 400 million pixels in 400 kB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    packer, parts = zlib.compressobj(9), []
    for _ in range(50):
        parts.append(packer.compress(b"\0" * 1_000_000))
    data = b"".join(parts) + packer.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wide() -> bytes:
    """A PNG of 25 million pixels and a bit."""
    content = io.BytesIO()
    Image.new("1", (5001, 5000)).save(content, "PNG")
    return content.getvalue()


def endless_scans() -> bytes:
    """A JPEG that repeats its one scan: each is decoded again, at the cost of the picture."""
    content = jpeg(90)
    start = content.index(b"\xff\xda")
    return content[:-2] + content[start:-2] * MOST_SCANS + b"\xff\xd9"


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "empty"),
        (b"<svg onload=alert(1)>", "not a picture"),
        (b"GIF89a" + b"\xff" * 100, "picture"),
        (bomb(), "pixels"),
        (wide(), "at most 25,000,000 are read"),
        (endless_scans(), "scans"),
        (jpeg(90)[:-200], "cannot be read"),
    ],
    ids=["empty", "svg", "gif", "bomb", "wide", "scans", "cut"],
)
def test_bad_pictures_are_refused_at_once(site: Site, content: bytes, why: str) -> None:
    start = time.monotonic()
    answer = site.call("POST", "/classify", content)
    assert (answer.status, why in answer.json["error"]) == (422, True), answer.json
    assert "0x" not in answer.json["error"]  # no address of an object
    assert time.monotonic() - start < 1


def test_real_bad_pictures(data: Path) -> None:
    files = sorted((data / "badimages" / "files").iterdir())
    with serving(Model(), rate=None) as site:
        for path in files:
            answer = site.call("POST", "/classify", path.read_bytes())
            assert answer.status in (200, 422), (path, answer.json)
            assert answer.status == 200 or answer.json["error"], path
        assert site.get("/health").status == 200


def test_answers_are_whole_for_a_client_that_reads_slowly(site: Site) -> None:
    with site.connect() as connection:
        connection.sendall(
            b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        content = io.BytesIO()
        while part := connection.recv(100):
            content.write(part)
    assert json.loads(content.getvalue().partition(b"\r\n\r\n")[2])["openapi"] == "3.1.0"


def test_the_log_says_how_many_were_left_out() -> None:
    logger = logging.getLogger("edgeclip.test_throttle")
    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.addFilter(Throttle(burst=2, every=0.05))
    for n in range(100):
        logger.warning("refused %d", n)
    time.sleep(0.06)
    logger.warning("refused %d", 100)
    logger.removeHandler(handler)
    assert kept[:2] == ["refused 0", "refused 1"]
    assert kept[-1] == "refused 100 (and 98 more like it)"
