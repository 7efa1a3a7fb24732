"""What the publisher relies on in its connection, tried on the tests' fake and on the MQTT client with mosquitto."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from queue import Queue
from typing import NamedTuple

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.consumer.publisher import Connection
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import CannotPublishError, PacketTooLargeError, Refusal
from tests.conftest import PATIENCE_S, Mosquitto, StartMosquitto
from tests.unit.consumer.test_publisher import FakeConnection

_LIMIT_BYTES = 2000


class Sent(NamedTuple):
    """A message that has reached the broker."""

    topic: str
    payload: bytes
    retain: bool
    correlation_data: bytes | None = None


class Subject(ABC):
    """A connection, with control over its network and a view of the broker."""

    connection: Connection

    @abstractmethod
    def connect(self) -> None:
        """Connect to a broker that accepts packets of up to `_LIMIT_BYTES`."""

    @abstractmethod
    def disconnect(self) -> None: ...

    @abstractmethod
    def sent(self, count: int) -> list[Sent]:
        """The first messages that have reached the broker."""

    @abstractmethod
    def acknowledged(self, count: int) -> list[Hashable]:
        """The tickets of the messages that the broker has acknowledged, as they were reported."""


class ConnectionContract:
    """The contract; a subclass has the fixture `subject`, which is not connected yet."""

    def test_nothing_is_sent_while_there_is_no_connection(self, subject: Subject) -> None:
        assert subject.connection.publish("cesar/events", b"early") is None
        subject.connect()
        assert subject.connection.publish("cesar/events", b"now") is not None
        assert subject.sent(1) == [Sent("cesar/events", b"now", retain=False)]

    def test_messages_arrive_in_the_order_in_which_they_were_published(self, subject: Subject) -> None:
        subject.connect()
        wanted = [Sent(f"cesar/status/{number % 3}", b"%d" % number, retain=number % 2 == 0) for number in range(50)]
        for topic, payload, retain, _ in wanted:
            subject.connection.publish(topic, payload, retain=retain)
        assert subject.sent(50) == wanted

    def test_each_message_is_acknowledged_once_by_its_own_ticket(self, subject: Subject) -> None:
        subject.connect()
        tickets = [subject.connection.publish("cesar/events", b"%d" % number) for number in range(30)]
        assert len(set(tickets)) == 30
        assert subject.acknowledged(30) == tickets

    def test_a_ticket_of_an_earlier_connection_is_never_given_again(self, subject: Subject) -> None:
        subject.connect()
        before = subject.connection.publish("cesar/events", b"before")
        assert subject.acknowledged(1) == [before]
        subject.disconnect()
        assert subject.connection.publish("cesar/events", b"between") is None
        subject.connect()
        after = subject.connection.publish("cesar/events", b"after")
        assert after != before
        assert [message.payload for message in subject.sent(2)] == [b"before", b"after"]

    def test_correlation_data_goes_along(self, subject: Subject) -> None:
        subject.connect()
        subject.connection.publish("answers/me", b"{}", correlation_data=b"\x00\xff")
        assert subject.sent(1) == [Sent("answers/me", b"{}", retain=False, correlation_data=b"\x00\xff")]

    def test_a_packet_over_the_limit_is_an_error_with_both_sizes_and_harms_nothing(self, subject: Subject) -> None:
        subject.connect()
        with pytest.raises(PacketTooLargeError) as caught:
            subject.connection.publish("cesar/events", bytes(_LIMIT_BYTES))
        assert caught.value.size_bytes > caught.value.limit_bytes == _LIMIT_BYTES
        subject.connection.publish("cesar/events", b"small")
        assert subject.sent(1) == [Sent("cesar/events", b"small", retain=False)]

    def test_a_topic_that_brokers_refuse_is_an_error_and_harms_nothing(self, subject: Subject) -> None:
        subject.connect()
        with pytest.raises(CannotPublishError):
            subject.connection.publish("cesar/#", b"x")
        subject.connection.publish("cesar/events", b"fine")
        assert subject.sent(1) == [Sent("cesar/events", b"fine", retain=False)]

    def test_any_thread_may_publish(self, subject: Subject) -> None:
        subject.connect()
        tickets: list[Hashable] = []

        def publish(name: int) -> None:
            tickets.extend(subject.connection.publish(f"cesar/{name}", b"%d" % number) for number in range(25))

        threads = [threading.Thread(target=publish, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert len(set(tickets)) == 100
        arrived = subject.sent(100)
        for name in range(4):
            own = [message.payload for message in arrived if message.topic == f"cesar/{name}"]
            assert own == [b"%d" % number for number in range(25)]


class _Fake(Subject):
    def __init__(self) -> None:
        self.connection = self._fake = FakeConnection()
        self._fake.refused.add("cesar/#")

    def connect(self) -> None:
        self._fake.up, self._fake.limit_bytes = True, _LIMIT_BYTES

    def disconnect(self) -> None:
        self._fake.up = False

    def sent(self, count: int) -> list[Sent]:
        return [Sent(m.topic, m.payload, m.retain, m.correlation_data) for m in self._fake.sent[:count]]

    def acknowledged(self, count: int) -> list[Hashable]:
        return [message.ticket for message in self._fake.sent[:count]]


class _Real(Subject):
    def __init__(self, mosquitto: Mosquitto) -> None:
        self._mosquitto = mosquitto
        self._published: Queue[tuple[Hashable, Refusal | None]] = Queue()
        self._arrived: Queue[MQTTMessage] = Queue()
        self.connection = self._client = self._new_client()
        self._watcher = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        subscribed = threading.Event()
        self._watcher.on_subscribe = lambda *_: subscribed.set()
        self._watcher.on_message = lambda _client, _userdata, message: self._arrived.put(message)
        self._watcher.connect("127.0.0.1", mosquitto.port)
        self._watcher.loop_start()
        self._watcher.subscribe("#", options=SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=2))
        assert subscribed.wait(PATIENCE_S)

    def _new_client(self) -> MqttClient:
        return MqttClient(
            BrokerSettings(url=self._mosquitto.url),
            client_id="publisher",
            persistent=True,
            on_published=lambda ticket, refusal: self._published.put((ticket, refusal)),
        )

    def connect(self) -> None:
        if self._client.connected is None and not self._client.alive:
            self._client.start()
        assert self._client.wait_connected(PATIENCE_S)

    def disconnect(self) -> None:
        lost = threading.Event()
        self._client.on_disconnected = lambda _failure: lost.set()
        twin = Client(CallbackAPIVersion.VERSION2, client_id="publisher", protocol=MQTTProtocolVersion.MQTTv5)
        twin.connect("127.0.0.1", self._mosquitto.port)  # takes the session over
        twin.loop_start()
        assert lost.wait(PATIENCE_S)
        twin.disconnect()
        twin.loop_stop()

    def sent(self, count: int) -> list[Sent]:
        messages = [self._arrived.get(timeout=PATIENCE_S) for _ in range(count)]
        return [
            Sent(m.topic, bytes(m.payload), m.retain, getattr(m.properties, "CorrelationData", None)) for m in messages
        ]

    def acknowledged(self, count: int) -> list[Hashable]:
        found = [self._published.get(timeout=PATIENCE_S) for _ in range(count)]
        assert all(reason is None for _, reason in found)
        return [ticket for ticket, _ in found]

    def close(self) -> None:
        self._client.close()
        self._watcher.disconnect()
        self._watcher.loop_stop()


class TestFakeConnection(ConnectionContract):
    @pytest.fixture
    def subject(self) -> Subject:
        return _Fake()


@pytest.mark.mosquitto
class TestMqttClient(ConnectionContract):
    @pytest.fixture
    def subject(self, start_mosquitto: StartMosquitto) -> Iterator[Subject]:
        real = _Real(start_mosquitto(f"max_packet_size {_LIMIT_BYTES}"))
        yield real
        real.close()
