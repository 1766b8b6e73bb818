"""systemd is told that a service is ready, well and ending; without systemd nothing happens."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from test_stream import Model

from runtime import stream_run
from runtime.outputs import Callback
from runtime.smoother import Scores
from runtime.stream import Seen
from runtime.systemd import notify, service
from runtime.watch import Watch


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What stands for systemd's end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path := str(tmp_path / "notify"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield receiver


def test_a_service_is_ready_then_well_then_ending(
    told: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    with service(lambda: True):
        assert told.recv(99) == b"READY=1"
        assert told.recv(99) == told.recv(99) == b"WATCHDOG=1"
    while (last := told.recv(99)) == b"WATCHDOG=1":
        pass
    assert last == b"STOPPING=1"


def test_what_hangs_is_no_longer_well(told: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000")
    with service(lambda: False):
        assert told.recv(99) == b"READY=1"
        told.settimeout(0.1)
        with pytest.raises(TimeoutError):
            told.recv(99)


class Hangs(Callback):
    """An output that takes `seconds` for a frame: whoever reads it has stopped, say."""

    def __init__(self, seconds: float) -> None:
        super().__init__(print)
        self._seconds = seconds

    def frame(self, seen: Seen, scores: Scores, active: list[str]) -> None:
        time.sleep(self._seconds)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_stream_is_ready_and_well_until_it_hangs(
    hangs: bool, told: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setattr(stream_run, "STUCK", 0.1 if hangs else 10)
    Image.new("RGB", (64, 48)).save(tmp_path / "one.png")
    watch = Watch(outputs=[Hangs(0.6)])
    runs = threading.Thread(target=stream_run.run, args=(Model(), [str(tmp_path)], watch))
    runs.start()
    messages = [told.recv(99)]
    while messages[-1] != b"STOPPING=1":
        messages.append(told.recv(99))
    runs.join()
    assert messages[0] == b"READY=1" and b"WATCHDOG=1" in messages
    if hangs:
        assert len(messages) < 30  # of 60


def test_abstract_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0edgeclip-test-notify")
        monkeypatch.setenv("NOTIFY_SOCKET", "@edgeclip-test-notify")
        assert notify("STATUS=two cameras live")
        assert receiver.recv(99) == b"STATUS=two cameras live"


def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("READY=1")
