"""`edgeclip serve` from the command line: how it starts, what it says, and how it ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import ROOT
from fake_capture import CAMERA, Fake, Fakes
from test_cli import Edgeclip, edgeclip

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
from mjpeg_server import MjpegServer, steady  # noqa: E402
from serving import Model  # noqa: E402

from runtime.serve.app import make_app  # noqa: E402
from runtime.serve.camera_loop import CameraLoop  # noqa: E402
from runtime.serve.server import Server, bound, run  # noqa: E402
from runtime.serve.service import Service  # noqa: E402
from runtime.stream import Stream  # noqa: E402

__all__ = ["edgeclip"]  # the fixture
FAST = ["--precision", "fp32", "--backend", "onnxruntime"]


class Process:
    """The command, in a process of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-c", "from export.cli import main; main()", "serve",
                   *map(str, arguments), "--port", "0", *FAST]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        self.said = ""
        self.port = int(self.until(r"serving on http://127\.0\.0\.1:(\d+)")[1])

    def until(self, pattern: str) -> "re.Match[str]":
        """Reads what it says until it says that."""
        assert self._process.stderr is not None
        while not (found := re.search(pattern, self.said)):
            line = self._process.stderr.readline()
            assert line, self.said
            self.said += line
        return found

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal; returns the exit code, and has all that it said."""
        self._process.send_signal(number)
        _, rest = self._process.communicate(timeout=30)
        self.said += rest
        return self._process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_ends_what_goes_on(
    bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    events = tmp_path / "events.jsonl"
    with MjpegServer(lambda _: steady(30)) as camera:
        process = Process(
            bundle, "--source", camera.url, "--events", events, "--dwell", 0, "--enter", 0.01,
            "--leave", 0,
        )  # fmt: skip
        process.until("live")
        assert process.get("/health") == (200, b'{"status":"ok"}')
        known = json.loads(process.get("/events?wait=10")[1])["events"]
        assert process.end(number) == 0, process.said
    assert ("interrupted" if number == signal.SIGINT else "by SIGTERM") in process.said
    assert "classified" in process.said and "Traceback" not in process.said
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert known[0]["label"] == told[0]["label"]
    started = [event["label"] for event in told if event["event"] == "started"]
    ended = [event["label"] for event in told if event["event"] == "ended"]
    assert started and sorted(started) == sorted(ended)


def test_logs_as_json_and_a_token_from_the_environment(bundle: Path) -> None:
    process = Process(bundle, "--log-format", "json", EDGECLIP_TOKEN="a-token-of-my-own")
    assert process.get("/info")[0] == 401
    assert process.get("/info", Authorization="Bearer a-token-of-my-own")[0] == 200
    assert process.end() == 0
    lines = [json.loads(line) for line in process.said.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= lines[0].keys()
    [refused] = [line for line in lines if line["logger"] == "edgeclip.refused"]
    assert refused["level"] == "warning" and "401: GET /info" in refused["message"]
    assert "a-token-of-my-own" not in process.said


def test_of_a_camera_that_cannot_be_reached_edgeclip_alone_tells(bundle: Path) -> None:
    process = Process(bundle, "--source", "rtsp://bob:geheim@127.0.0.1:9/x")
    process.until("lost: .*refused")
    assert process.end() == 0
    assert "[tcp @" not in process.said and "WARN" not in process.said
    assert "geheim" not in process.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_as_it_begins_ends_it_too(number: signal.Signals) -> None:
    class Signals(CameraLoop):
        def start(self) -> None:
            super().start()
            signal.raise_signal(number)

    loop = Signals(
        lambda told, _: Stream(Model(), CAMERA, on_state=told, opens=Fakes(Fake(fps=30)))
    )
    service = Service(cast(Any, Model()), loop)
    why = run(Server(service, make_app(service)), bound("127.0.0.1", 0))
    assert ("SIGTERM" in why) == (number == signal.SIGTERM)


def test_mistakes_are_said_before_anything_is_loaded(
    edgeclip: Edgeclip, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for message, *more in (
            ("another program uses that port", "--port", port),
            ("can be reached by others: give --token", "--host", "0.0.0.0"),
            ("has 16 or more", "--token", "short"),
            ("is a name or address of this machine", "--host", "no.such.host.invalid",
             "--token", "a-token-of-my-own"),
            ("--log-format is text or json", "--log-format", "xml"),
            ("leave is not the greater", "--enter", 0.2, "--leave", 0.5),
        ):  # fmt: skip
            run = edgeclip("serve", "no-such-bundle", *more, code=2)
            assert message in run.stderr, (message, run.stderr)
    run = edgeclip("serve", bundle, "--source", "none.mp4", "--port", 0, *FAST, code=2)
    assert "none.mp4" in run.stderr
    run = edgeclip("serve", bundle, "--rule", "cat > 0.5", "--port", 0, *FAST, code=2)
    assert "no label or group 'cat'" in run.stderr
    monkeypatch.setattr("runtime.serve.cli.find_spec", lambda name: None)
    run = edgeclip("serve", bundle, code=2)
    assert "pip install 'edgeclip[serve]'" in run.stderr


def test_a_source_that_cannot_be_read_ends_it_with_the_reason(
    edgeclip: Edgeclip, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    source = tmp_path / "broken.mp4"
    run = edgeclip("serve", bundle, "--source", source, "--port", 0, *FAST, code=2)
    assert "broken.mp4" in run.stderr
