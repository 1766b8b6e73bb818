"""Events over MQTT: addresses, a broker that is not there, and a real mosquitto."""

import getpass
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import DataError
from runtime.event import Event
from runtime.mqtt import MOST_WAITING, MqttOutput, parse_broker

EVENT = Event("started", "cat", "door", 1.0, 1.0, 0.9)


def test_addresses() -> None:
    broker = parse_broker("mqtts://me:p%40ss@host/a/b")
    assert (broker.host, broker.port, broker.topic, broker.tls) == ("host", 8883, "a/b", True)
    assert (broker.user, broker.password) == ("me", "p@ss") and "p@ss" not in repr(broker)
    assert (parse_broker("mqtt://h:99").port, parse_broker("mqtt://h").topic) == (99, "edgeclip")


@pytest.mark.parametrize(
    "wrong", ["host", "http://h", "mqtt://", "mqtt://me:p@ss:x", "mqtt://h:99999", "mqtt://h/a/#"]
)
def test_wrong_addresses_are_refused_without_the_password(wrong: str) -> None:
    with pytest.raises(DataError, match="MQTT") as raised:
        parse_broker(wrong)
    assert "p@ss" not in str(raised.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_broker_that_is_not_there_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paho.mqtt.client")
    monkeypatch.setattr("runtime.mqtt._LAST_WORDS", 0.2)
    output = MqttOutput(f"mqtt://127.0.0.1:{free_port()}")
    start = time.monotonic()
    for _ in range(MOST_WAITING + 50):
        output.event(EVENT)
    assert time.monotonic() - start < 2
    assert output.dropped == 50
    output.close()
    assert output.dropped == MOST_WAITING + 51  # and what it has said last
    assert threading.active_count() == 1 or "paho" not in str(threading.enumerate())


class Broker:
    """A mosquitto of this test's own, and what a subscriber of it has received."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        # It knows its subscribers also when it has been away: they may come back later than others.
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n"
            f"persistence true\npersistence_location {folder}/\n"
        )
        self._program = program
        self.received: list[tuple[str, str]] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self._program, "-c", str(self._config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._answers)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def got(self, topic: str, message: Any, *_: Any) -> None:
        self.received.append((message.topic, message.payload.decode()))


def wait_for(condition: Any) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    pytest.importorskip("paho.mqtt.client")
    program = shutil.which("mosquitto") or shutil.which("/usr/sbin/mosquitto")
    if program is None:
        pytest.skip("there is no mosquitto: apt install mosquitto")
    made = Broker(program, tmp_path)
    yield made
    made.stop()


def test_events_reach_a_broker_also_one_that_was_away(broker: Broker) -> None:
    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    subscriber = paho.Client(CallbackAPIVersion.VERSION2, "reader", clean_session=False)
    subscriber.on_connect = lambda client, *_: client.subscribe("shop/#", qos=1)
    subscriber.on_message = lambda client, data, message: broker.got("", message)
    subscriber.reconnect_delay_set(1, 1)
    subscriber.connect("127.0.0.1", broker.port)
    subscriber.loop_start()
    output = MqttOutput(f"mqtt://127.0.0.1:{broker.port}/shop")
    wait_for(lambda: ("shop/status", "online") in broker.received)
    output.event(EVENT)
    wait_for(lambda: [t for t, _ in broker.received].count("shop/events") == 1)
    broker.stop()
    output.event(EVENT)
    broker.start()
    wait_for(lambda: [t for t, _ in broker.received].count("shop/events") == 2)
    output.close()
    wait_for(lambda: broker.received[-1] == ("shop/status", "offline"))
    subscriber.disconnect()
    subscriber.loop_stop()
    events = [json.loads(content) for topic, content in broker.received if topic == "shop/events"]
    assert events == [EVENT.as_json()] * 2 and output.dropped == 0
