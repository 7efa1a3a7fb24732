"""The session of the front doors at a real broker."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError
from cesar_mqtt.gateway.bus import Bus
from cesar_mqtt.gateway.session import NoAnswerError, RequestRefusedError
from cesar_mqtt.gateway.submission import Submission
from cesar_mqtt.mqtt.messages import Delivery, PacketTooLargeError, Subscription
from cesar_mqtt.protocol.topics import Topics
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto

TOPICS = Topics("cesar", "cesar")
NOTE = Submission("note-1", b"RIFF", "note.wav", {}, name="note.wav")

pytestmark = pytest.mark.mosquitto

StartBus = Callable[..., Bus]


class Other:
    """Another client: it notes what it receives, and answers commands with what `answers` has for them."""

    def __init__(self, port: int, *filters: str) -> None:
        self.received: queue.SimpleQueue[MQTTMessage] = queue.SimpleQueue()
        self.answers: dict[str, dict[str, Any]] = {}
        subscribed = threading.Event()
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.on_message = self._on_message
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        self.client.subscribe([(each, 1) for each in filters])
        assert subscribed.wait(PATIENCE_S)

    def _on_message(self, client: Client, _userdata: object, message: MQTTMessage) -> None:
        command = message.topic.rpartition("/")[2]
        if command in self.answers:
            answer = {**self.answers[command], "transaction": json.loads(message.payload)["transaction"]}
            client.publish(f"cesar/response/{command}", json.dumps(answer), qos=1)
        self.received.put(message)

    def publish(self, topic: str, document: dict[str, Any], *, retain: bool = False) -> None:
        self.client.publish(topic, json.dumps(document), qos=1, retain=retain).wait_for_publish(PATIENCE_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    made: list[Other] = []

    def make(broker: Mosquitto, *filters: str) -> Other:
        made.append(Other(broker.port, *filters))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def start_bus() -> Iterator[StartBus]:
    made: list[Bus] = []

    def start(broker: Mosquitto, *, url: str | None = None, connected: bool = True, **options: Any) -> Bus:
        bus = Bus(BrokerSettings(url=url or broker.url), TOPICS, role="test", **options)
        made.append(bus)
        bus.start()
        if connected:
            assert bus.wait_connected(PATIENCE_S) is not None
        return bus

    yield start
    for each in made:
        each.close()
        assert not each.alive


def test_a_job_that_was_submitted_without_a_broker_is_published_once_there_is_one(
    mosquitto: Mosquitto, start_bus: StartBus, other: Callable[..., Other]
) -> None:
    mosquitto.stop()
    bus = start_bus(mosquitto, connected=False)
    sent = bus.submit(NOTE)
    assert not sent.done()
    mosquitto.start()
    other(mosquitto, "cesar/audio/#")

    sent.result(PATIENCE_S)
    assert bus.trouble is None


def test_a_job_arrives_and_what_nobody_takes_is_known(
    mosquitto: Mosquitto, start_bus: StartBus, other: Callable[..., Other]
) -> None:
    bus = start_bus(mosquitto)
    assert bus.submit(NOTE).result(PATIENCE_S) is False
    consumer = other(mosquitto, "cesar/audio/#")
    assert bus.submit(NOTE).result(PATIENCE_S) is True
    assert consumer.received.get(timeout=PATIENCE_S).payload == b"RIFF"


def test_the_connection_is_reported_before_its_messages_and_again_after_a_restart(
    start_mosquitto: StartMosquitto, start_bus: StartBus, other: Callable[..., Other]
) -> None:
    broker = start_mosquitto(persistence=True)
    other(broker, "cesar/jobs").publish("cesar/status/a", {"status": "queued"}, retain=True)
    seen: queue.SimpleQueue[str] = queue.SimpleQueue()

    def note(delivery: Delivery) -> None:
        seen.put(delivery.topic)

    start_bus(
        broker,
        subscriptions=[Subscription("cesar/status/+", wants_retained=True)],
        on_message=note,
        on_connected=lambda: seen.put("connected"),
        on_lost=lambda _: seen.put("lost"),
    )
    assert [seen.get(timeout=PATIENCE_S) for _ in range(2)] == ["connected", "cesar/status/a"]
    broker.restart()
    assert [seen.get(timeout=PATIENCE_S) for _ in range(3)] == ["lost", "connected", "cesar/status/a"]


def test_a_command_is_answered_refused_or_too_late(
    mosquitto: Mosquitto, start_bus: StartBus, other: Callable[..., Other]
) -> None:
    bus = start_bus(mosquitto, sends_commands=True)
    with pytest.raises(NoAnswerError, match=r"^No consumer is online at "):
        bus.command("pause").result(PATIENCE_S)

    consumer = other(mosquitto, "cesar/request/#")
    consumer.answers["pause"] = {"status": "ok", "data": {"paused": True}, "error": None}
    consumer.answers["delete"] = {"status": "error", "data": {}, "error": "There is no job a."}
    online = threading.Event()
    bus._on_message = lambda delivery: online.set() if delivery.topic.endswith("/state") else None
    consumer.publish("cesar/consumer/cesar/state", {"state": "online"}, retain=True)
    assert online.wait(PATIENCE_S)

    assert bus.consumers == {"cesar": True}
    assert bus.command("pause").result(PATIENCE_S) == {"paused": True}
    with pytest.raises(RequestRefusedError, match=r"^There is no job a\.$"):
        bus.command("delete", {"job_id": "a"}).result(PATIENCE_S)
    with pytest.raises(NoAnswerError, match=r"^Consumer other is not online"):
        bus.command("pause", consumer="other").result(PATIENCE_S)
    with pytest.raises(NoAnswerError, match=r"^No answer on cesar/request/health in time"):
        bus.command("health", timeout_s=0.1).result(PATIENCE_S)


def test_what_the_broker_does_not_take_is_an_error_and_what_waits_is_cancelled_at_the_end(
    start_mosquitto: StartMosquitto, start_bus: StartBus
) -> None:
    broker = start_mosquitto("max_packet_size 2000")
    bus = start_bus(broker)
    with pytest.raises(PacketTooLargeError):
        bus.submit(Submission("long", bytes(3000), "long.wav", {})).result(PATIENCE_S)
    broker.stop()
    waiting = bus.submit(NOTE)
    bus.close()
    with pytest.raises(CancelledError):
        waiting.result(0)


def test_a_broker_that_refuses_the_password_is_known(start_mosquitto: StartMosquitto, start_bus: StartBus) -> None:
    broker = start_mosquitto(users={"web": "secret"})
    bus = start_bus(broker, url=broker.url.replace("mqtt://", "mqtt://web:guessed@"), connected=False)
    with pytest.raises(BrokerRefusedError):
        bus.wait_connected(PATIENCE_S)
    assert bus.refusal is not None
