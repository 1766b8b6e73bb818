"""The WebSocket `/live`: the newest of everything, at the pace of whoever watches."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import COLORS
from fake_capture import Fake
from PIL import Image

from runtime.classifier import Classifier

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from serving import Site, cameras, of_colors, serving, until  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402
from websockets.sync.client import ClientConnection, connect  # noqa: E402

from runtime.serve import live as live_module  # noqa: E402


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return of_colors(bundle)


@pytest.fixture
def site(classifier: Classifier) -> Iterator[Site]:
    """Two cameras of 30 frames a second."""
    classifier.set_labels(list(COLORS))
    loop = cameras(classifier, Fake(fps=30, size=(480, 640)), Fake(fps=30))
    with serving(classifier, loop) as site:
        until(lambda: site.get("/ready").status == 200)
        yield site


@contextmanager
def watching(site: Site, **options: Any) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{site.port}/live", **options) as socket:
        yield socket


def ask(socket: ClientConnection, **wanted: Any) -> tuple[dict[str, Any], list[bytes]]:
    """The next state, and the pictures that come with it."""
    socket.send(json.dumps(wanted))
    state = json.loads(socket.recv(10))
    pictures = [socket.recv(10) for _ in state["pictures"]]
    assert all(isinstance(content, bytes) for content in pictures)
    return state, pictures  # type: ignore[return-value]


def test_a_client_gets_the_newest_state_and_the_pictures_it_wants(site: Site) -> None:
    until(lambda: all(source.seen for source in site.service.hub.sources))
    with watching(site) as socket:
        state, [picture] = ask(socket, next=[0], width=300)
        assert Image.open(io.BytesIO(picture)).size == (320, 240)
        assert [row["source"] for row in state["sources"]] == ["rtsp://door0", "rtsp://door1"]
        row = state["sources"][0]
        assert row["state"] == "live" and row["label"] in COLORS and row["fps"] >= 0
        assert {label for label, _ in row["scores"]} == set(COLORS)
        assert row["scores"] == sorted(row["scores"], key=lambda pair: -pair[1])
        assert (state["labels"], state["pictures"]) == (list(COLORS), [0])
        numbers = [ask(socket, next=[])[0]["sources"][0]["number"] for _ in range(5)]
        assert numbers == sorted(numbers) and numbers[0] >= row["number"]
        state, pictures = ask(socket, next=[1, 1, 0, 7, -1])
        assert set(state["pictures"]) <= {0, 1} and len(pictures) == len(set(state["pictures"]))


def test_the_last_picture_of_what_has_ended_comes_at_once(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "HEARTBEAT", 15.0)
    with serving(classifier, cameras(classifier, Fake(3, live=False))) as site:
        until(lambda: site.get("/sources").json[0]["state"] in ("ended", "closed"))
        with watching(site) as socket:
            assert ask(socket)[1] == []
            assert len(ask(socket, next=[0])[1]) == 1


def test_every_event_comes_once(site: Site) -> None:
    with watching(site) as socket:
        ids: list[int] = []
        site.call("PUT", "/labels", ["one thing"])
        site.call("PUT", "/labels", ["another thing"])
        until(lambda: len(site.get("/events").json["events"]) >= 6)
        while not ids or ids[-1] < site.get("/events").json["last"]:
            ids += [event["id"] for event in ask(socket)[0]["events"]]
        assert ids == sorted(set(ids)) and len(ids) >= 6


def test_a_change_of_labels_shows_within_a_second(site: Site) -> None:
    with watching(site) as socket:
        ask(socket)
        site.call("PUT", "/labels", ["warm", "cold"])
        start = time.monotonic()
        while {label for label, _ in ask(socket)[0]["sources"][0]["scores"]} != {"warm", "cold"}:
            assert time.monotonic() - start < 1


def test_without_news_there_is_a_heartbeat(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "HEARTBEAT", 0.1)
    with serving(classifier) as site, watching(site) as socket:
        for _ in range(2):
            state, _ = ask(socket, next=[0])
            assert state["sources"] == [] and state["labels"] == list(classifier.labels)


def test_a_client_that_does_not_read_slows_nobody(site: Site) -> None:
    def numbers() -> list[int]:
        return [source.version for source in site.service.hub.sources]

    with (
        watching(site, max_queue=1, close_timeout=0.1) as deaf,
        watching(site) as first,
        watching(site) as second,
    ):
        for _ in range(300):  # none of the answers is read
            deaf.send(json.dumps({"next": [0, 1], "width": 1920}))
        pictures, before = [0, 0], numbers()
        limit = time.monotonic() + 30  # of a busy machine; benchmarks/serve.py measures it
        while min(pictures) < 20 or min(numbers()) < max(before) + 10:
            assert time.monotonic() < limit
            for number, socket in enumerate((first, second)):
                pictures[number] += len(ask(socket, next=[0, 1])[1])


@pytest.mark.parametrize("message", ["", "{", '{"next": "0"}', '{"width": 1e999}', "[" * 2000])
def test_what_is_no_request_ends_the_connection(site: Site, message: str) -> None:
    with watching(site) as socket:
        socket.send(message)
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
        assert socket.close_code == 1008


def test_a_binary_message_is_no_request(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with watching(site) as socket:
        socket.send(b'{"next": [0]}')
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
        assert socket.close_code == 1008
    until(lambda: "refused 1008" in caplog.text)
    assert "Traceback" not in caplog.text


def test_what_is_far_too_long_ends_the_connection(site: Site) -> None:
    with watching(site) as socket:
        with pytest.raises(ConnectionClosed):
            socket.send("x" * 100_000)
            socket.recv(10)
    until(lambda: site.get("/metrics").content.count(b"edgeclip_live_clients 0"))


def test_only_so_many_may_watch(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "MOST_CLIENTS", 2)
    with watching(site) as first, watching(site):
        with pytest.raises(InvalidStatus) as refused, watching(site):
            pass
        assert refused.value.response.status_code == 503
        assert b"watch already" in (refused.value.response.body or b"")
        ask(first)
    until(lambda: b"edgeclip_live_clients 0" in site.get("/metrics").content)
    with watching(site) as again:
        ask(again)


def test_the_end_of_the_server_ends_the_connection(classifier: Classifier) -> None:
    with serving(classifier, cameras(classifier, Fake(fps=30))) as site:
        with watching(site) as socket:
            ask(socket)
            start = time.monotonic()
            site.stop()
            assert time.monotonic() - start < 3
            with pytest.raises(ConnectionClosed):
                while True:
                    socket.recv(5)
            assert socket.close_code == 1012


def test_who_asks_for_nothing_is_sent_away(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "IDLE", 0.1)
    with watching(site) as socket:
        with pytest.raises(ConnectionClosed):
            socket.recv(5)
        assert socket.close_code == 1008
