"""Sends events to an MQTT broker, with paho-mqtt (extra `mqtt`). It never holds up the stream.

Events go to `<topic>/events` as JSON, at least once (QoS 1). `<topic>/status` says "online", and
"offline" when this end is gone, however it goes (a retained message and the broker's last will).
While the broker cannot be reached up to `MOST_WAITING` events wait; more are dropped, and counted.
"""

import json
import ssl
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .errors import BackendUnavailable, DataError
from .event import Event
from .smoother import Scores

if TYPE_CHECKING:
    from .stream import Seen

MOST_WAITING = 1000
_LAST_WORDS = 2.0  # seconds for what still waits, when the stream ends


@dataclass(frozen=True)
class Broker:
    """Where events are sent."""

    host: str
    port: int
    topic: str
    tls: bool
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def parse_broker(address: str) -> Broker:
    """Reads `mqtt://[user:password@]host[:port][/topic]`, or `mqtts://` for TLS with the system's
    certificates. The topic is `edgeclip` by default. Raises DataError (without the password)."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or set("?#") & set(address):
        raise DataError(
            "this is no address of an MQTT broker; give mqtt://host/topic, or "
            "mqtts://user:password@host:8883/topic"
        )
    topic = unquote(parts.path).strip("/") or "edgeclip"
    if "+" in topic or "#" in topic or "\0" in topic:
        raise DataError(f"the MQTT topic {topic!r} may not hold the characters + and #")
    tls = parts.scheme == "mqtts"
    user = unquote(parts.username) if parts.username else None
    password = unquote(parts.password) if parts.password else None
    return Broker(parts.hostname, port or (8883 if tls else 1883), topic, tls, user, password)


class MqttOutput:
    """Sends events to a broker, from a thread of paho's own that connects again when it must."""

    def __init__(self, address: str) -> None:
        self._broker = broker = parse_broker(address)
        try:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion
        except ModuleNotFoundError as error:
            raise BackendUnavailable(
                "--mqtt needs paho-mqtt 2 or later: pip install 'edgeclip[mqtt]'"
            ) from error
        self._full = paho.MQTT_ERR_QUEUE_SIZE
        self._news = threading.Condition()
        self._waiting = 0
        self.dropped = 0
        """Messages that found the queue full, or were not sent when the stream ended."""
        self.problem: str | None = None
        """What the broker said, where it let nobody in."""
        self._client = client = paho.Client(CallbackAPIVersion.VERSION2)
        client.max_queued_messages_set(MOST_WAITING)
        client.reconnect_delay_set(1, 60)
        client.connect_timeout = _LAST_WORDS
        client.will_set(f"{broker.topic}/status", "offline", qos=1, retain=True)
        if broker.user is not None:
            client.username_pw_set(broker.user, broker.password)
        if broker.tls:
            client.tls_set_context(ssl.create_default_context())
        client.on_connect, client.on_publish = self._connected, self._published
        client.connect_async(broker.host, broker.port)
        client.loop_start()

    def event(self, event: Event) -> None:
        """Sends an event, or puts it in the queue; returns at once."""
        self._publish("events", json.dumps(event.as_json(), ensure_ascii=False))

    def frame(self, seen: "Seen", scores: Scores, active: list[str]) -> None:
        """Frames are not sent."""

    def close(self) -> None:
        """Says "offline", waits at most two seconds for what was not sent, and hangs up."""
        self._publish("status", "offline", retain=True)
        with self._news:
            self._news.wait_for(lambda: self._waiting == 0, _LAST_WORDS)
            self.dropped += self._waiting
        self._client.disconnect()
        self._client.loop_stop()

    def __str__(self) -> str:
        broker = self._broker
        return f"mqtt://{broker.host}:{broker.port}/{broker.topic}"

    def _publish(self, name: str, content: str, retain: bool = False) -> None:
        with self._news:
            self._waiting += 1
        sent = self._client.publish(f"{self._broker.topic}/{name}", content, qos=1, retain=retain)
        if sent.rc == self._full:
            with self._news:
                self._waiting -= 1
                self.dropped += 1

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.problem = f"{self}: the broker refuses: {reason}"
        else:
            self._publish("status", "online", retain=True)

    def _published(self, *_: Any) -> None:
        with self._news:
            self._waiting -= 1
            self._news.notify_all()
