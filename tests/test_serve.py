"""What `edgeclip serve` answers: pictures classified, labels, events, history, health, metrics."""

import io
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, square
from fake_capture import Fake
from PIL import Image

from runtime.classifier import Classifier

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from serving import Model, Site, cameras, of_colors, serving, until  # noqa: E402

from runtime.serve import camera_loop  # noqa: E402
from runtime.serve.app import PAGE  # noqa: E402


def picture(color: str, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    frame = square(COLORS[color], np.random.default_rng(5), 64)
    Image.fromarray(frame).save(content, kind)
    return content.getvalue()


@pytest.fixture(scope="module")
def classifier(bundle: Path) -> Classifier:
    return of_colors(bundle)


@pytest.fixture
def site(classifier: Classifier) -> Iterator[Site]:
    """With one camera that shows ever brighter gray, 50 frames a second."""
    classifier.set_labels(list(COLORS))
    with serving(classifier, cameras(classifier, Fake(fps=50)), rate=None) as site:
        until(lambda: site.get("/ready").status == 200)
        yield site


def test_a_picture_is_classified_as_classify_does(
    site: Site, classifier: Classifier, tmp_path: Path
) -> None:
    for color in COLORS:
        for kind in ("JPEG", "PNG"):
            path = tmp_path / f"{color}.{kind.lower()}"
            path.write_bytes(picture(color, kind))
            found = site.call("POST", "/classify?top=2", path.read_bytes()).json
            expected = classifier.classify(path)
            assert (found["label"], found["unknown"]) == (color, False)
            assert found["score"] == pytest.approx(expected.score, abs=1e-6)
            assert [label for label, _ in found["top"]] == [n for n, _ in expected.top(2)]
            assert {"decode", "preprocess", "encode", "head"} <= found["ms"].keys()


def test_what_curl_sends_is_taken_and_a_form_is_not(site: Site) -> None:
    curl = {"Content-Type": "application/x-www-form-urlencoded"}
    assert site.call("POST", "/classify", picture("red"), curl).json["label"] == "red"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = site.call("POST", "/classify", picture("red"), form)
    assert (answer.status, "application/octet-stream" in answer.json["error"]) == (415, True)


def test_many_clients_at_once_lose_nothing(site: Site) -> None:
    pictures = {color: picture(color) for color in COLORS}

    def ask(number: int) -> bool:
        color = list(COLORS)[number % 3]
        return bool(site.call("POST", "/classify", pictures[color]).json["label"] == color)

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(ask, range(200)))


def test_labels_change_while_it_runs(site: Site, classifier: Classifier) -> None:
    assert site.get("/labels").json["labels"] == list(COLORS)
    given = {"labels": {"red": ["red"], "cold": {"labels": ["green", "blue"]}}}
    changed = site.call("PUT", "/labels", given)
    assert changed.json == site.get("/labels").json
    assert changed.json["labels"] == ["red", "green", "blue"]
    assert changed.json["set"]["labels"]["cold"]["labels"] == {"green": ["green"], "blue": ["blue"]}
    found = site.call("POST", "/classify", picture("blue")).json
    assert found["path"] == ["cold", "blue"]
    hub = site.service.hub
    until(lambda: hub.sources[0].seen and "cold" in hub.sources[0].scores)


@pytest.mark.parametrize(
    "given, why",
    [
        ([], "at least one label"),
        (["cat", "cat"], "given more than once"),
        ("cat", "list of texts"),
        (b'{"a": ["b"], "a": ["c"]}', "more than once"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"", "not valid JSON"),
        ([f"label {n}" for n in range(5000)], "at most"),
        (["x" * 201], "201 letters"),
    ],
)
def test_wrong_labels_are_refused_with_the_reason(site: Site, given: object, why: str) -> None:
    answer = site.call("PUT", "/labels", given, {"Content-Type": "application/json"})
    assert (answer.status, why in answer.json["error"]) == (422, True), answer.json
    assert site.get("/labels").json["labels"] == list(COLORS)


def test_sources_frames_and_history(site: Site) -> None:
    until(lambda: site.get("/sources").json[0]["classified"] > 20)
    [source] = site.get("/sources").json
    assert source["source"] == "rtsp://door0" and source["state"] == "live"
    frame = site.get("/sources/0/frame.jpg?width=16")
    assert frame.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(frame.content)).size == (64, 48)
    past = site.get("/sources/0/history").json
    assert past["labels"] == list(COLORS) and past["curves"].keys() <= COLORS.keys()
    assert all(len(points) <= 300 for points in past["curves"].values())
    assert past["start"] <= past["spans"][0]["start"] <= past["end"]
    for path in ("/sources/1/frame.jpg", "/sources/-1/history", f"/sources/{'9' * 9999}/history"):
        assert site.get(path).status == 404


def test_events_are_listed_and_waited_for(site: Site) -> None:
    until(lambda: site.get("/events").json["events"])
    first = site.get("/events?limit=1").json["events"][0]
    assert first["event"] == "started" and first["label"] in COLORS
    last = site.get("/events").json["last"]
    assert site.get(f"/events?after={last}").json == {"events": [], "last": last}
    found: list[dict[str, object]] = []
    asked = threading.Thread(
        target=lambda: found.extend(site.get(f"/events?after={last}&wait=10").json["events"])
    )
    asked.start()
    time.sleep(0.1)
    assert asked.is_alive()
    site.call("PUT", "/labels", ["something else"])
    asked.join(5)
    assert found[0]["event"] == "ended" and isinstance(found[0]["id"], int)
    assert found[0]["id"] > last


@pytest.mark.parametrize(
    "path",
    ["/events?limit=0", "/events?after=-1", "/events?wait=31", "/events?wait=x",
     f"/events?after={'9' * 9999}", "/sources/0/frame.jpg?width=1"],
)  # fmt: skip
def test_a_wrong_parameter_is_named(site: Site, path: str) -> None:
    answer = site.get(path)
    assert answer.status == 422
    assert answer.json["error"].startswith(re.findall(r"\?(\w+)=", path)[0])


def test_info_says_what_runs(site: Site) -> None:
    info = site.get("/info").json
    assert info["backend"] == "onnxruntime" and info["precision"] == "fp32"
    assert info["sources"] == ["rtsp://door0"]


def test_it_is_well_without_cameras_and_with_lost_ones(classifier: Classifier) -> None:
    with serving(classifier) as alone:
        assert [alone.get(p).status for p in ("/health", "/ready", "/sources")] == [200] * 3
        assert alone.get("/sources").json == []
    lost = cameras(classifier, RuntimeError("unplugged"))
    with serving(classifier, lost) as site:
        until(lambda: site.get("/sources").json[0]["state"] == "lost")
        assert "unplugged" in site.get("/sources").json[0]["reason"]
        assert site.get("/health").status == 200
        assert (site.get("/ready").status, site.get("/sources/0/frame.jpg").status) == (503, 503)


class Failing:
    """A classifier that breaks at the third frame."""

    labels = ("a",)

    def __init__(self, classifier: Classifier) -> None:
        self._classifier, self.frames = classifier, 0

    def classify_batch(self, *arguments: object) -> object:
        self.frames += 1
        if self.frames == 3:
            raise RuntimeError("the GPU is lost")
        return self._classifier.classify_batch(*arguments)  # type: ignore[arg-type]


def test_a_camera_loop_that_breaks_ends_the_server(
    classifier: Classifier, capfd: pytest.CaptureFixture[str]
) -> None:
    loop = cameras(Failing(classifier), Fake(fps=50))
    with serving(classifier, loop) as site:
        until(lambda: site.ended)
    assert site.ended == "the cameras could not go on"
    assert str(loop.error) == "the GPU is lost" and "the GPU is lost" in str(loop.problem)


def test_a_classifier_that_hangs_shows_in_the_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_loop, "STUCK", 0.2)
    monkeypatch.setattr(camera_loop, "PATIENCE", 0.1)
    monkeypatch.setattr(camera_loop, "FRESH", 0.0)
    model, hangs = Model(), threading.Event()
    loop = cameras(model, Fake(fps=50))
    with serving(model, loop) as site:
        until(lambda: site.get("/ready").status == 200)
        assert site.get("/health").status == 200
        monkeypatch.setattr(model, "classify_batch", lambda *_: hangs.wait() and [])
        until(lambda: site.get("/health").status == 503)
        assert "no frame was classified" in site.get("/health").json["error"]
    hangs.set()


def test_a_file_that_ends_does_not_end_the_server(classifier: Classifier) -> None:
    with serving(classifier, cameras(classifier, Fake(frames=3, live=False))) as site:
        until(lambda: site.get("/sources").json[0]["state"] == "ended")
        assert site.get("/health").status == 200
        events = site.get("/events?wait=5").json["events"]
        assert {event["event"] for event in events} == {"started", "ended"}
        assert site.call("POST", "/classify", picture("red")).json["label"] == "red"


SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)\n')


def test_metrics_are_what_prometheus_reads(site: Site) -> None:
    site.call("POST", "/classify", picture("red"))
    until(lambda: site.get("/events").json["events"])
    text = site.get("/metrics").content.decode()
    values: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in text.splitlines(keepends=True):
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] in kinds
            values[f"{found[1]}{{{found[2] or ''}}}"] = float(found[3])
    assert values["edgeclip_up{}"] == 1 and values["edgeclip_labels{}"] == 3
    post = 'edgeclip_requests_total{method="POST",path="/classify",status="200"}'
    assert values[post] == 1
    assert values['edgeclip_frames_total{source="rtsp://door0",became="seen"}'] > 0
    assert kinds["edgeclip_frames_total"] == "counter"


def test_the_page_comes_with_its_policy(site: Site) -> None:
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript",
             ".svg": "image/svg+xml"}  # fmt: skip
    for file in PAGE.iterdir():
        answer = site.get("/" if file.name == "index.html" else f"/{file.name}")
        assert answer.status == 200 and answer.content == file.read_bytes()
        assert answer.headers["content-type"].startswith(kinds[file.suffix])
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
