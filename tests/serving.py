"""A server of `edgeclip serve` in a thread of the test, and what a client says to it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import COLORS
from fake_capture import Fake, Fakes

import runtime
from runtime.classifier import Classifier
from runtime.frames import Color, Colors, Frame
from runtime.label_sets import Labels, parse_labels
from runtime.outputs import Output
from runtime.prediction import Prediction
from runtime.serve.app import make_app
from runtime.serve.camera_loop import CameraLoop
from runtime.serve.server import Server, bound, run
from runtime.serve.service import Service
from runtime.source_uri import SourceSpec
from runtime.stream import Stream
from runtime.timeline import TimelineOptions


def of_colors(bundle: Path) -> Classifier:
    """A classifier whose speed does not depend on what `auto` finds."""
    return runtime.load(
        bundle, labels=list(COLORS), backend="onnxruntime", precision="fp32", threads=1
    )


def until(holds: Callable[[], object], seconds: float = 30) -> None:
    """Waits until something holds."""
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "it did not come about"
        time.sleep(0.01)


class Answer:
    """What the server said."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.headers = response.status, response.headers
        self.content = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Site:
    """A server that runs, and its cameras."""

    def __init__(self, server: Server, listening: socket.socket) -> None:
        self.server, self.service = server, server.service
        self.port: int = listening.getsockname()[1]
        self.ended = ""
        self._thread = threading.Thread(target=self._run, args=(listening,))

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.server.started or not self._thread.is_alive())

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(40)
        assert not self._thread.is_alive()

    def _run(self, listening: socket.socket) -> None:
        self.ended = run(self.server, listening)

    def call(
        self,
        method: str,
        path: str,
        body: bytes | Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request in a connection of its own; a body that is not bytes is sent as JSON."""
        given = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body, given = json.dumps(body).encode(), {"Content-Type": "application/json", **given}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, given)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, headers=headers)

    def connect(self) -> socket.socket:
        """A connection for what no client library would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


def cameras(
    classifier: Any,
    *fakes: Fake | Exception,
    outputs: Sequence[Output] = (),
    fps: float | None = None,
) -> CameraLoop:
    """A loop over fake cameras and files, each of another name."""
    sources: list[SourceSpec] = []
    for number, fake in enumerate(fakes):
        file = isinstance(fake, Fake) and not fake.live
        kind, address = ("video", "clip") if file else ("rtsp", "rtsp://door")
        sources.append(SourceSpec(kind, f"{address}{number}"))  # type: ignore[arg-type]
    opens = {spec.address: Fakes(fake) for spec, fake in zip(sources, fakes, strict=True)}

    def opened(told: Any, tick: Any) -> Stream:
        return Stream(
            classifier, sources, on_state=told, on_tick=tick,
            opens=lambda spec, timeout: opens[spec.address](spec, timeout),
        )  # fmt: skip

    calm = TimelineOptions(smooth=0, enter=0.3, leave=0.2, dwell=0)
    return CameraLoop(opened, calm, outputs=outputs, fps=fps)


class Model:
    """A classifier that takes `seconds`, and tells dark frames from bright ones."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.label_set = parse_labels(["dark", "bright"])
        self.bundle = SimpleNamespace(
            folder=Path("model"),
            manifest=SimpleNamespace(
                model=SimpleNamespace(name="fake"), text=SimpleNamespace(templates=("{}",))
            ),
        )
        self.backend, self.precision = "fake", "fp32"

    @property
    def labels(self) -> tuple[str, ...]:
        return self.label_set.names

    def require_bank(self) -> Any:
        return SimpleNamespace(labels=self.labels, label_set=self.label_set)

    def set_labels(self, labels: Labels) -> None:
        self.label_set = parse_labels(labels)

    def classify(self, frame: Frame, color: Color = "bgr") -> Prediction:
        return self.classify_batch([frame], color)[0]

    def classify_batch(self, frames: Sequence[Frame], color: Colors = "bgr") -> list[Prediction]:
        time.sleep(self.seconds)
        labels = self.labels
        scores = [np.full(len(labels), frame.mean() / 255, np.float32) for frame in frames]
        return [Prediction(labels, score, score) for score in scores]


@contextmanager
def serving(classifier: Any, loop: CameraLoop | None = None, **options: Any) -> Iterator[Site]:
    """Serves while it is entered; `options` are those of `make_app`."""
    service = Service(classifier, loop)
    site = Site(Server(service, make_app(service, **options)), bound("127.0.0.1", 0))
    site.start()
    try:
        yield site
    finally:
        site.stop()
