"""systemd is told that a service is ready, well and ending; without systemd nothing happens."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.systemd import notify, service


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
