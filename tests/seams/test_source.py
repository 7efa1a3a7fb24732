"""What the intake relies on in the source of its messages, tried on the tests' fake and on the MQTT client."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from queue import Queue
from typing import Any, Literal, NamedTuple

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.consumer.intake import Source
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import Delivery, Subscription
from tests.conftest import PATIENCE_S, Mosquitto
from tests.factories import delivery
from tests.unit.consumer.test_intake import FakeSource

_WINDOW = 20
"""How many messages mosquitto delivers over MQTT 3.1.1 before one is acknowledged."""


class Request(NamedTuple):
    """A message as a producer publishes it."""

    topic: str
    payload: bytes
    response_topic: str | None = None
    correlation_data: bytes | None = None
    user_properties: tuple[tuple[str, str], ...] = ()


class Subject(ABC):
    """A source, with control over what comes to it."""

    source: Source

    @abstractmethod
    def bring(self, *requests: Request) -> None:
        """Have these come in, in this order."""

    @abstractmethod
    def wait_for_subscription(self, qos: int) -> None:
        """Return when commands are delivered at this QoS."""

    @abstractmethod
    def unacknowledged(self, expected: int) -> list[bytes]:
        """The payloads of what would come again after a crash; ends the source."""


def _receive(source: Source, count: int) -> list[Delivery]:
    found: list[Delivery] = []
    while len(found) < count:
        batch = source.receive(PATIENCE_S)
        assert batch, f"only {len(found)} of {count} came in"
        found += batch
    return found


def _numbered(*numbers: int) -> list[Request]:
    return [Request("cesar/jobs", b"%d" % number) for number in numbers]


class SourceContract:
    """The contract; a subclass has the fixture `subject`, which is connected."""

    def test_without_messages_it_returns_empty_after_the_timeout(self, subject: Subject) -> None:
        assert subject.source.receive(0.01) == []

    def test_messages_are_returned_once_and_in_order(self, subject: Subject) -> None:
        subject.bring(*_numbered(*range(40)))
        assert [one.payload for one in _receive(subject.source, 40)] == [b"%d" % number for number in range(40)]
        assert subject.source.receive(0.05) == []

    def test_without_a_timeout_it_waits_for_a_message(self, subject: Subject) -> None:
        found: Queue[list[Delivery]] = Queue()
        thread = threading.Thread(target=lambda: found.put(subject.source.receive()))
        thread.start()
        subject.bring(*_numbered(7))
        assert [one.payload for one in found.get(timeout=PATIENCE_S)] == [b"7"]
        thread.join(PATIENCE_S)

    def test_a_delivery_has_all_that_the_producer_sent(self, subject: Subject) -> None:
        request = Request(
            "cesar/audio/a", b"\x00\xff", "answers/me", b"\x01", (("language", "de"), ("task", "translate"))
        )
        subject.bring(request)
        (found,) = _receive(subject.source, 1)
        assert (
            Request(found.topic, found.payload, found.response_topic, found.correlation_data, found.user_properties)
            == request
        )
        assert (found.qos, found.retain, found.dup) == (1, False, False)

    def test_the_receipts_of_messages_that_wait_differ(self, subject: Subject) -> None:
        subject.bring(*_numbered(*range(15)))
        receipts = [one.receipt for one in _receive(subject.source, 15)]
        assert len({(receipt.connection, receipt.mid) for receipt in receipts}) == 15

    def test_what_was_acknowledged_does_not_come_again_and_the_rest_does(self, subject: Subject) -> None:
        subject.bring(*_numbered(*range(6)))
        found = _receive(subject.source, 6)
        subject.source.acknowledge(found[:2])
        subject.source.acknowledge(found[2:4])
        assert subject.unacknowledged(2) == [b"4", b"5"]

    def test_the_redelivery_bounds_can_be_taken_at_any_time(self, subject: Subject) -> None:
        first = subject.source.take_redelivery_bounds()
        subject.bring(*_numbered(1))
        subject.source.acknowledge(_receive(subject.source, 1))
        assert subject.source.take_redelivery_bounds().session == first.session


class UnacknowledgedContract:
    """What it relies on while the disk refuses; a subclass has the fixture `subject`."""

    def test_what_is_not_acknowledged_comes_again_at_once_by_a_new_connection(self, subject: Subject) -> None:
        subject.bring(*_numbered(*range(3)))
        found = _receive(subject.source, 3)
        subject.source.acknowledge(found[:1])
        subject.source.reconnect()
        again = _receive(subject.source, 2)
        assert [(one.payload, one.dup) for one in again] == [(b"1", True), (b"2", True)]
        assert {one.receipt.connection for one in again} == {found[0].receipt.connection + 1}
        subject.source.acknowledge(again)
        assert subject.unacknowledged(0) == []

    def test_commands_go_ahead_of_more_unacknowledged_messages_than_a_broker_delivers(self, subject: Subject) -> None:
        command = Request("cesar/request/health", b"")
        subject.bring(*_numbered(*range(_WINDOW)))
        _receive(subject.source, _WINDOW)
        subject.source.let_go_ahead(on=True)
        subject.wait_for_subscription(0)
        subject.bring(*_numbered(*range(_WINDOW, _WINDOW + 5)), command)
        found = _receive(subject.source, 1)
        ahead = [one for one in found if one.topic == command.topic]
        while not ahead:
            ahead = [one for one in _receive(subject.source, 1) if one.topic == command.topic]
        assert [one.qos for one in ahead] == [0]
        subject.source.let_go_ahead(on=False)
        subject.wait_for_subscription(1)


class _Fake(Subject):
    def __init__(self) -> None:
        self.source = self._fake = FakeSource([])

    def bring(self, *requests: Request) -> None:
        for request in requests:
            properties: dict[str, Any] = request._asdict()
            if request.topic == "cesar/request/health" and self._fake.ahead == [True]:
                properties["qos"] = 0
            self._fake.bring(delivery(**properties))

    def wait_for_subscription(self, qos: int) -> None:
        assert self._fake.ahead[-1] == (qos == 0)

    def unacknowledged(self, expected: int) -> list[bytes]:
        left = [one.payload for one in self._fake.brought if one not in self._fake.acknowledged]
        assert len(left) == expected
        return left


class _Real(Subject):
    def __init__(self, mosquitto: Mosquitto, protocol: Literal["auto", "3.1.1"]) -> None:
        self._mosquitto = mosquitto
        self._protocol: Literal["auto", "3.1.1"] = protocol
        self._clients: list[MqttClient] = []
        self.source = self._connect()
        self._producer = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._producer.connect("127.0.0.1", mosquitto.port)
        self._producer.loop_start()

    def _connect(self) -> MqttClient:
        client = MqttClient(
            BrokerSettings(url=self._mosquitto.url, protocol=self._protocol),
            client_id="intake",
            persistent=True,
            subscriptions=[Subscription(name) for name in ("cesar/jobs", "cesar/audio/#")]
            + [Subscription("cesar/request/+", may_go_ahead=True)],
        )
        self._clients.append(client)
        client.start()
        assert client.wait_connected(PATIENCE_S)
        return client

    def bring(self, *requests: Request) -> None:
        for topic, payload, response_topic, correlation_data, user_properties in requests:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            if response_topic is not None:
                properties.ResponseTopic, properties.CorrelationData = response_topic, correlation_data
            if user_properties:
                properties.UserProperty = list(user_properties)
            self._producer.publish(topic, payload, qos=1, properties=properties).wait_for_publish(PATIENCE_S)

    def wait_for_subscription(self, qos: int) -> None:
        assert self._mosquitto.wait_logged(f"intake {qos} cesar/request/+")

    def unacknowledged(self, expected: int) -> list[bytes]:
        self._clients[-1].close()
        again = self._connect()
        found = _receive(again, expected) if expected else []
        assert all(one.dup for one in found)
        assert again.receive(0.05) == []
        return [one.payload for one in found]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self._producer.disconnect()
        self._producer.loop_stop()


class TestFakeSource(SourceContract, UnacknowledgedContract):
    @pytest.fixture
    def subject(self) -> Subject:
        return _Fake()


@pytest.mark.mosquitto
class TestMqttClient(SourceContract, UnacknowledgedContract):
    @pytest.fixture
    def subject(self, mosquitto: Mosquitto) -> Iterator[Subject]:
        real = _Real(mosquitto, "auto")
        yield real
        real.close()


@pytest.mark.mosquitto
class TestMqttClientOfVersion311(UnacknowledgedContract):
    @pytest.fixture
    def subject(self, mosquitto: Mosquitto) -> Iterator[Subject]:
        real = _Real(mosquitto, "3.1.1")
        yield real
        real.close()
