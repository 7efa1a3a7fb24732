"""The client with real brokers; a scripted one only for behaviour that no real broker shows on demand."""

import functools
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import BrokerRefusedError, ConfigError
from cesar_mqtt.mqtt import client as client_module
from cesar_mqtt.mqtt import connection as connection_module
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.embedded import EmbeddedBroker
from cesar_mqtt.mqtt.messages import (
    CannotPublishError,
    ConnectionFailure,
    ConnectionInfo,
    Delivery,
    PacketTooLargeError,
    Publication,
    PublishTicket,
    Refusal,
    Subscription,
    Will,
)
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds
from cesar_mqtt.threads import Backoff
from tests.conftest import PATIENCE_S
from tests.factories import delivery as delivery_of

if TYPE_CHECKING:
    from tests.conftest import Certificates, Mosquitto, StartMosquitto

_NAME = "edge"

pytestmark = pytest.mark.mosquitto


class Watched:
    """A client, and what its callbacks reported."""

    def __init__(self, url: str, **options: Any) -> None:
        settings = BrokerSettings(url=url, **options.pop("settings", {}))
        options.setdefault("client_id", _NAME)
        options.setdefault("persistent", True)
        self.connected: queue.Queue[ConnectionInfo] = queue.Queue()
        self.lost: queue.Queue[str] = queue.Queue()
        self.published: queue.Queue[tuple[PublishTicket, Refusal | None]] = queue.Queue()
        self.refused: list[BrokerRefusedError] = []
        self.client = MqttClient(
            settings,
            on_connected=self.connected.put,
            on_disconnected=lambda failure: self.lost.put(str(failure)),
            on_published=lambda ticket, reason: self.published.put((ticket, reason)),
            on_refused=self.refused.append,
            **options,
        )
        self.client._backoff = Backoff(0.1, 60.0, jitter=0.5)
        self.client._away_backoff = Backoff(0.1, 5.0, jitter=0.5)

    def start(self) -> ConnectionInfo:
        self.client.start()
        return self.connected.get(timeout=PATIENCE_S)

    def receive(self, count: int = 1) -> list[Delivery]:
        deliveries: list[Delivery] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(deliveries) < count and time.monotonic() < deadline:
            deliveries += self.client.receive(0.1)
        return deliveries

    def publish(self, topic: str, payload: bytes, **options: Any) -> PublishTicket:
        ticket = self.client.publish(topic, payload, **options)
        assert ticket is not None
        return ticket

    def published_next(self) -> tuple[PublishTicket, Refusal | None]:
        return self.published.get(timeout=PATIENCE_S)

    @property
    def thread(self) -> threading.Thread:
        return self.client._thread


class Watch:
    """Creates clients, and closes them at the end."""

    def __init__(self) -> None:
        self.all: list[Watched] = []

    def __call__(self, url: str, **options: Any) -> Watched:
        self.all.append(Watched(url, **options))
        return self.all[-1]


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    for watched in made.all:
        watched.client.close()
    assert not any(watched.thread.is_alive() for watched in made.all)


def shell(broker: "Mosquitto", program: str, *arguments: str, text: str | None = None) -> str:
    """What mosquitto_pub or mosquitto_sub prints."""
    command = [f"mosquitto_{program}", "-p", str(broker.port), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False).stdout


def publish(broker: "Mosquitto", topic: str, *payloads: str, options: Sequence[str] = ("-q", "1")) -> None:
    shell(broker, "pub", *options, "-t", topic, "-l", text="".join(f"{payload}\n" for payload in payloads))


def retained(broker: "Mosquitto", topic: str) -> str:
    return shell(broker, "sub", "-t", topic, "-C", "1", "-W", "100").rstrip("\n")


def payloads(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.payload.decode() for delivery in deliveries]


def holds(condition: Callable[[], object]) -> bool:
    """Poll a condition that has no notification."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition() and time.monotonic() < deadline:
        pause.wait(0.01)
    return bool(condition())


def twin_socket(watched: Watched) -> socket.socket:
    """The client's own connection, through another descriptor."""
    connection = watched.client._connection
    assert connection is not None
    return socket.socket(fileno=os.dup(cast("socket.socket", connection._paho.socket()).fileno()))


both_versions = pytest.mark.parametrize("protocol", ["5", "3.1.1"])
JOBS = (Subscription("cesar/jobs"),)


# -- messages in ------------------------------------------------------------------------------------------------------


@both_versions
def test_unacknowledged_messages_are_delivered_again(mosquitto: "Mosquitto", watch: Watch, protocol: str) -> None:
    first = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": protocol})
    assert first.start().protocol == protocol
    publish(mosquitto, "cesar/jobs", *"abcde")
    deliveries = first.receive(5)
    assert payloads(deliveries) == list("abcde")
    assert {(d.topic, d.qos, d.dup, d.retain) for d in deliveries} == {("cesar/jobs", 1, False, False)}
    first.client.acknowledge(deliveries[:2])
    first.client.close()
    second = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": protocol})
    assert second.start().session_present
    again = second.receive(3)
    assert payloads(again) == list("cde")
    assert all(delivery.dup for delivery in again)


@both_versions
def test_a_persistent_client_receives_what_was_published_while_it_was_away(
    mosquitto: "Mosquitto", watch: Watch, protocol: str
) -> None:
    first = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": protocol})
    assert not first.start().session_present
    first.client.close()
    publish(mosquitto, "cesar/jobs", "meanwhile")
    second = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": protocol})
    second.start()
    assert payloads(second.receive()) == ["meanwhile"]


@both_versions
def test_an_ephemeral_client_leaves_no_session(mosquitto: "Mosquitto", watch: Watch, protocol: str) -> None:
    first = watch(mosquitto.url, subscriptions=JOBS, persistent=False, settings={"protocol": protocol})
    first.start()
    first.client.close()
    publish(mosquitto, "cesar/jobs", "meanwhile")
    second = watch(mosquitto.url, subscriptions=JOBS, persistent=False, settings={"protocol": protocol})
    assert not second.start().session_present
    publish(mosquitto, "cesar/jobs", "now")
    assert payloads(second.receive()) == ["now"]


def test_a_late_acknowledgement_does_not_reach_another_message(mosquitto: "Mosquitto", watch: Watch) -> None:
    """paho's `ack` knows only packet ids, and a broker that lost the session begins with 1 again.

    Over paho's own reconnecting the acknowledgement below removed the new message from the broker, unread.
    """
    watched = watch(mosquitto.url, subscriptions=JOBS)
    watched.start()
    publish(mosquitto, "cesar/jobs", "before")
    before = watched.receive()
    mosquitto.restart()
    assert not watched.connected.get(timeout=PATIENCE_S).session_present
    publish(mosquitto, "cesar/jobs", "after")
    after = watched.receive()
    assert after[0].receipt.mid == before[0].receipt.mid
    assert after[0].receipt != before[0].receipt
    watched.client.acknowledge(before)
    watched.client.close()
    next_time = watch(mosquitto.url, subscriptions=JOBS)
    next_time.start()
    assert payloads(next_time.receive()) == ["after"]


def test_an_acknowledgement_that_races_with_a_reconnect_is_dropped(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS)
    watched.start()
    publish(mosquitto, "cesar/jobs", "before")
    before = watched.receive()
    stale = watched.client._connection
    assert stale is not None
    mosquitto.restart()
    watched.connected.get(timeout=PATIENCE_S)
    publish(mosquitto, "cesar/jobs", "after")
    assert payloads(watched.receive()) == ["after"]
    stale.acknowledge(before)  # as a thread would that had fetched the connection just before it was lost
    watched.client.close()
    next_time = watch(mosquitto.url, subscriptions=JOBS)
    next_time.start()
    assert payloads(next_time.receive()) == ["after"]


def test_mqtt_5_delivers_the_properties_of_a_message(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS)
    watched.start()
    options_text = (
        "user-property a 1 user-property a 2 response-topic reply correlation-data c-7 message-expiry-interval 60"
    )
    words = options_text.split()
    options = ["-V", "5", "-q", "1"]
    while words:
        values = 2 if words[0] == "user-property" else 1
        options += ["-D", "publish", *words[: values + 1]]
        words = words[values + 1 :]
    before = time.time()
    publish(mosquitto, "cesar/jobs", "x", options=options)
    (delivery,) = watched.receive()
    assert delivery.user_properties == (("a", "1"), ("a", "2"))
    assert delivery.response_topic == "reply"
    assert delivery.correlation_data == b"c-7"
    assert delivery.expires_in_s is not None
    assert 55 <= delivery.expires_in_s <= 60
    assert before <= delivery.received_at <= time.time()


def test_only_a_subscription_that_wants_retained_messages_receives_them(mosquitto: "Mosquitto", watch: Watch) -> None:
    shell(mosquitto, "pub", "-t", "cesar/jobs", "-r", "-m", "old job")
    shell(mosquitto, "pub", "-t", "cesar/status/a", "-r", "-m", "old status")
    watched = watch(mosquitto.url, subscriptions=[*JOBS, Subscription("cesar/status/#", wants_retained=True)])
    watched.start()
    publish(mosquitto, "cesar/jobs", "new job")
    deliveries = watched.receive(2)
    assert sorted(payloads(deliveries)) == ["new job", "old status"]
    assert [delivery.retain for delivery in deliveries if delivery.payload == b"old status"] == [True]


def test_a_byte_order_mark_in_a_property_does_not_end_the_connection(mosquitto: "Mosquitto", watch: Watch) -> None:
    """paho 2.2 takes U+FEFF in a user property for a malformed packet and disconnects; the broker sends it for ever."""
    watched = watch(mosquitto.url, subscriptions=JOBS)
    watched.start()
    odd = ["-V", "5", "-q", "1", "-D", "publish", "user-property", "note", "\ufeffodd"]
    publish(mosquitto, "cesar/jobs", "odd", options=odd)
    publish(mosquitto, "cesar/jobs", "good")
    deliveries = watched.receive(2)
    assert payloads(deliveries) == ["odd", "good"]
    assert deliveries[0].user_properties == (("note", "\ufeffodd"),)
    assert watched.lost.empty()


def test_messages_of_qos_0_are_dropped_while_the_buffer_is_full(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS, buffer_max_messages=10)
    watched.start()
    publish(mosquitto, "cesar/jobs", *map(str, range(30)), options=["-q", "0"])
    assert holds(lambda: "dropped" in caplog.text)
    publish(mosquitto, "cesar/jobs", "after them")
    deliveries = watched.receive(11)
    assert payloads(deliveries) == [*map(str, range(10)), "after them"]
    assert caplog.text.count("dropped") == 1


IN_MEMORY = delivery_of("cesar/jobs", b"00").size_bytes


@both_versions
@pytest.mark.parametrize("limits", [{"buffer_max_messages": 5}, {"buffer_max_bytes": 5 * IN_MEMORY}])
def test_messages_of_qos_1_stay_with_the_broker_while_the_buffer_is_full(
    mosquitto: "Mosquitto", watch: Watch, protocol: str, limits: dict[str, int]
) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": protocol}, **limits)
    watched.start()
    numbers = [f"{number:02}" for number in range(50)]
    publish(mosquitto, "cesar/jobs", *numbers)
    assert holds(lambda: len(watched.client._buffer._waiting) == 5)
    arrived: list[str] = []
    while len(arrived) < 50:
        deliveries = watched.client.receive(PATIENCE_S)
        assert 0 < len(deliveries) <= 5
        watched.client.acknowledge(deliveries)
        arrived += payloads(deliveries)
    assert arrived == numbers


def test_new_room_in_the_buffer_is_used_at_once(
    mosquitto: "Mosquitto", watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 60.0)
    watched = watch(mosquitto.url, subscriptions=JOBS, buffer_max_bytes=1)
    watched.start()
    publish(mosquitto, "cesar/jobs", *"abcd")
    assert payloads(watched.receive(4)) == list("abcd")


def test_a_message_larger_than_the_buffer_is_delivered_alone(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS, buffer_max_bytes=100)
    watched.start()
    publish(mosquitto, "cesar/jobs", "small", "x" * 1000)
    assert payloads(watched.receive(2)) == ["small", "x" * 1000]


def keep_alive_every(watched: Watched, seconds: int) -> None:
    """Shorter than the settings allow, so that a test need not wait."""
    watched.client._options = replace(watched.client._options, keepalive_s=seconds)


def test_a_broker_that_answers_no_ping_is_disconnected(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url)
    keep_alive_every(watched, 1)
    watched.start()
    os.kill(mosquitto.pid, signal.SIGSTOP)
    assert watched.lost.get(timeout=PATIENCE_S) == "the broker did not answer a ping within the keepalive time."
    mosquitto.kill()


def test_closing_does_not_wait_for_room(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS, settings={"protocol": "3.1.1"}, buffer_max_messages=1)
    watched.start()
    publish(mosquitto, "cesar/jobs", *"abc")
    assert holds(lambda: len(watched.client._buffer._waiting) == 1)
    watched.client.close()
    assert not watched.thread.is_alive()
    assert watched.client.receive(0) == []
    again = watch(mosquitto.url, subscriptions=JOBS)
    again.start()
    assert payloads(again.receive(3)) == list("abc")


def test_closing_wakes_the_receiving_thread(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    received: queue.Queue[list[Delivery]] = queue.Queue()
    threading.Thread(target=lambda: received.put(watched.client.receive(None))).start()
    watched.client.close()
    assert received.get(timeout=PATIENCE_S) == []


def test_an_error_in_the_callback_leaves_the_message_with_the_broker(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url, subscriptions=JOBS)
    put = watched.client._buffer.put
    failing = iter([True])

    def fail_once(delivery: Delivery) -> bool:
        if next(failing, False):
            raise RuntimeError("out of order")
        return put(delivery)

    watched.client._buffer.put = fail_once  # type: ignore[method-assign]
    watched.start()
    publish(mosquitto, "cesar/jobs", "a", "b")
    deliveries = watched.receive()
    assert payloads(deliveries) == ["b"]
    watched.client.acknowledge(deliveries)
    assert caplog.text.count("RuntimeError: out of order") == 1
    watched.client.close()
    again = watch(mosquitto.url, subscriptions=JOBS)
    again.start()
    assert payloads(again.receive()) == ["a"]


# -- messages out -----------------------------------------------------------------------------------------------------


@both_versions
def test_a_published_message_is_reported_when_the_broker_has_it(
    mosquitto: "Mosquitto", watch: Watch, protocol: str
) -> None:
    watched = watch(mosquitto.url, settings={"protocol": protocol})
    watched.start()
    ticket = watched.publish("cesar/status/a", b"completed", retain=True)
    assert watched.published_next() == (ticket, None)
    assert retained(mosquitto, "cesar/status/a") == "completed"


def test_nothing_is_published_without_a_connection(watch: Watch, free_port: int) -> None:
    watched = watch(f"mqtt://127.0.0.1:{free_port}")
    assert watched.client.publish("a", b"") is None
    watched.client.start()
    assert watched.client.publish("a", b"") is None
    assert watched.client.wait_connected(0.2) is None
    assert str(watched.client.failure) == "Connection refused."
    watched.client.close()
    assert watched.client.publish("a", b"") is None


def test_many_messages_are_published_in_order_and_each_is_reported_once(mosquitto: "Mosquitto", watch: Watch) -> None:
    receiver = watch(mosquitto.url, client_id="receiver", subscriptions=[Subscription("numbers")])
    receiver.start()
    watched = watch(mosquitto.url)
    watched.start()
    numbers = [str(number) for number in range(300)]
    tickets = [watched.publish("numbers", number.encode()) for number in numbers]
    assert [watched.published_next() for _ in numbers] == [(ticket, None) for ticket in tickets]
    assert payloads(receiver.receive(300)) == numbers
    assert watched.published.empty()


def test_correlation_data_and_properties_reach_the_receiver(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, subscriptions=[Subscription("reply")])
    watched.start()
    watched.publish("reply", b"x", correlation_data=b"\x00\xff", user_properties=[("a", "1"), ("a", "ü")])
    (delivery,) = watched.receive()
    assert delivery.correlation_data == b"\x00\xff"
    assert delivery.user_properties == (("a", "1"), ("a", "ü"))


def test_a_message_that_the_broker_refuses_is_reported_with_the_reason(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    ticket = watched.publish("$SYS/ours", b"x")
    assert watched.published_next() == (ticket, Refusal(0x87, "Not authorized"))
    assert "refused a message on" in caplog.text


def test_a_message_over_the_brokers_limit_is_not_sent(start_mosquitto: "StartMosquitto", watch: Watch) -> None:
    broker = start_mosquitto("max_packet_size 1000")
    watched = watch(broker.url, settings={"protocol": "5"})
    assert watched.start().max_packet_bytes == 1000
    with pytest.raises(PacketTooLargeError) as refused:
        watched.publish("a", b"x" * 1000)
    assert refused.value.limit_bytes == 1000
    assert refused.value.size_bytes > 1000
    fits = watched.publish("a", b"x" * 980)
    assert watched.published_next() == (fits, None)
    assert watched.lost.empty()


def test_a_limit_can_be_configured_for_a_broker_that_reports_none(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, settings={"protocol": "3.1.1", "max_packet_bytes": 2000})
    assert watched.start().max_packet_bytes == 2000
    with pytest.raises(PacketTooLargeError):
        watched.publish("a", b"x" * 2000)


@both_versions
@pytest.mark.parametrize(
    "topic",
    ["", "a/+", "a/#", "a\0", "a\x1f", "a\x7f", "\ud800", "\ufdd0", "\uffff", "\U0001ffff", "a" * 65_536, "a/" * 200],
    ids=ascii,
)
def test_a_topic_that_makes_brokers_disconnect_is_not_sent(
    mosquitto: "Mosquitto", watch: Watch, protocol: str, topic: str
) -> None:
    watched = watch(mosquitto.url, settings={"protocol": protocol})
    watched.start()
    with pytest.raises(CannotPublishError):
        watched.publish(topic, b"x")
    last = watched.publish("a/" * 199 + "ü", b"x")
    assert watched.published_next()[0] == last
    assert watched.lost.empty()


@pytest.mark.parametrize(
    "properties",
    [
        {"user_properties": [("a", "\0")]},
        {"user_properties": [("a" * 65_536, "")]},
        {"correlation_data": b"x" * 65_536},
    ],
    ids=["control", "long", "long data"],
)
def test_properties_that_make_brokers_disconnect_are_not_sent(
    mosquitto: "Mosquitto", watch: Watch, properties: dict[str, Any]
) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    with pytest.raises(CannotPublishError):
        watched.publish("a", b"x", **properties)
    last = watched.publish("a", b"x")
    assert watched.published_next()[0] == last


def test_callbacks_may_publish_and_hold_the_lock_that_publishing_holds(mosquitto: "Mosquitto", watch: Watch) -> None:
    """paho calls back holding a lock that its `publish` needs; an owner's own lock then was a deadlock."""
    watched = watch(mosquitto.url)
    lock = threading.Lock()
    in_flight: set[PublishTicket] = set()
    settled = threading.Semaphore(0)

    def on_published(ticket: PublishTicket, _refusal: Refusal | None) -> None:
        with lock:
            if ticket not in in_flight:
                return
            in_flight.remove(ticket)
        watched.client.publish("echo", b"")
        settled.release()

    watched.start()
    watched.client.on_published = on_published
    for number in range(500):
        with lock:
            in_flight.add(watched.publish("numbers", str(number).encode()))
    assert all(settled.acquire(timeout=PATIENCE_S) for _ in range(500))
    assert not in_flight


class Noting:
    """A socket that records which threads use it, and how often it is written to."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.users: set[str] = set()
        self.writes = 0

    def __getattr__(self, name: str) -> Any:
        self.users.add(threading.current_thread().name)
        self.writes += name == "send"
        return getattr(self._inner, name)


def note(watched: Watched) -> Noting:
    """Record how the client uses its socket from now on."""
    connection = watched.client._connection
    assert connection is not None
    noting = Noting(connection._socket._socket)
    connection._socket._socket = cast("Any", noting)
    return noting


def test_only_the_network_thread_touches_the_socket(mosquitto: "Mosquitto", watch: Watch) -> None:
    """By default, paho's `publish` and `ack` write in their caller's thread, between the writes of another."""
    watched = watch(mosquitto.url, subscriptions=JOBS)
    watched.start()
    noting = note(watched)
    for _ in range(20):
        watched.publish("cesar/jobs", b"x")
        watched.client.acknowledge(watched.receive())
    assert [watched.published_next() for _ in range(20)]
    assert noting.users == {"mqtt-network"}


def test_accumulated_messages_are_written_together(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    first, going, published = threading.Event(), threading.Event(), threading.Semaphore(0)

    def on_published(_ticket: PublishTicket, _refusal: Refusal | None) -> None:
        first.set()
        going.wait(PATIENCE_S)
        published.release()

    watched.client.on_published = on_published
    watched.publish("numbers", b"")
    assert first.wait(PATIENCE_S)
    noting = note(watched)
    for number in range(20):
        watched.publish("numbers", str(number).encode())
    going.set()
    assert all(published.acquire(timeout=PATIENCE_S) for _ in range(21))
    assert noting.writes == 1


def test_an_error_in_an_owners_callback_stops_nothing(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url)

    def fail(*_: object) -> None:
        raise RuntimeError("owner")

    watched.start()
    watched.client.on_published = fail
    watched.publish("a", b"")
    assert holds(lambda: "RuntimeError: owner" in caplog.text)
    watched.client.on_published = lambda ticket, reason: watched.published.put((ticket, reason))
    ticket = watched.publish("a", b"")
    assert watched.published_next() == (ticket, None)


# -- the connection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True])
def test_it_reconnects_after_a_restart_of_the_broker(
    start_mosquitto: "StartMosquitto", watch: Watch, caplog: pytest.LogCaptureFixture, *, kill: bool
) -> None:
    broker = start_mosquitto("autosave_interval 1", "autosave_on_changes true", persistence=True)
    caplog.set_level(logging.INFO)
    watched = watch(broker.url, subscriptions=JOBS)
    first = watched.start()
    broker.restart(kill=kill)
    watched.lost.get(timeout=PATIENCE_S)
    second = watched.connected.get(timeout=PATIENCE_S)
    assert second.number > first.number
    assert second.session_present
    publish(broker, "cesar/jobs", "x")
    assert payloads(watched.receive()) == ["x"]
    assert caplog.text.count("Connected to") == 2
    assert caplog.text.count("Lost the connection") == 1


def test_attempts_that_fail_for_the_same_reason_are_logged_once(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    caplog.set_level(logging.DEBUG)
    mosquitto.stop()
    assert holds(lambda: caplog.text.count("No connection") >= 2)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert "Lost the connection" in warnings[0]
    assert "Connection refused" in warnings[1]


def test_paho_does_not_send_a_message_in_flight_again(start_mosquitto: "StartMosquitto", watch: Watch) -> None:
    """The publisher sends unacknowledged messages again; if paho did so, too, they would arrive twice."""
    broker = start_mosquitto(persistence=True)
    watched = watch(broker.url)
    watched.start()
    os.kill(broker.pid, signal.SIGSTOP)
    lost = watched.publish("cesar/status/a", b"x", retain=True)
    broker.kill()
    watched.lost.get(timeout=PATIENCE_S)
    broker.start()
    assert watched.connected.get(timeout=PATIENCE_S).number > lost.connection
    fresh = watched.publish("other", b"")
    assert watched.published_next() == (fresh, None)
    assert not any("cesar/status/a" in line for line in broker.log)


def test_no_ticket_is_given_for_a_connection_that_was_reported_lost(
    mosquitto: "Mosquitto", watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    connection = watched.client._connection
    assert connection is not None
    publish_now = connection.publish
    reported: list[bool] = []

    def publish_slowly(publication: Publication) -> PublishTicket | None:
        mosquitto.kill()
        with suppress(queue.Empty):
            watched.lost.get(timeout=0.5)
            reported.append(True)
        return publish_now(publication)

    monkeypatch.setattr(connection, "publish", publish_slowly)
    watched.client.publish("a", b"")
    assert not reported
    watched.lost.get(timeout=PATIENCE_S)


def test_another_client_of_the_same_client_id_is_suspected(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """Mosquitto 2.0.11 sends no reason; one short connection is no sign, as a broker may be restarted."""
    first = watch(mosquitto.url)
    first.start()
    watch(mosquitto.url).start()
    assert "other client" not in first.lost.get(timeout=PATIENCE_S)
    reason = first.lost.get(timeout=PATIENCE_S)
    assert f"no other client uses the client id '{_NAME}'" in reason
    assert holds(lambda: reason in caplog.text)


def test_a_broker_that_is_restarted_soon_and_again_is_no_other_client(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url)
    watched.start()
    for _ in range(2):
        mosquitto.stop()
        assert "other client" not in watched.lost.get(timeout=PATIENCE_S)
        assert holds(lambda: "refused" in str(watched.client.failure))
        mosquitto.start()
        watched.connected.get(timeout=PATIENCE_S)


@both_versions
def test_the_will_is_sent_when_the_connection_is_lost(mosquitto: "Mosquitto", watch: Watch, protocol: str) -> None:
    watched = watch(mosquitto.url, will=Will("cesar/consumer/edge/state", b"offline"), settings={"protocol": protocol})
    watched.client._backoff = Backoff(60.0, 60.0)
    watched.start()
    with twin_socket(watched) as twin:
        twin.shutdown(socket.SHUT_RDWR)
    watched.lost.get(timeout=PATIENCE_S)
    assert retained(mosquitto, "cesar/consumer/edge/state") == "offline"


def test_the_will_is_not_sent_when_the_client_closes(mosquitto: "Mosquitto", watch: Watch) -> None:
    watched = watch(mosquitto.url, will=Will("cesar/consumer/edge/state", b"offline"))
    watched.start()
    watched.publish("cesar/consumer/edge/state", b"goodbye", retain=True)
    watched.client.close()
    assert retained(mosquitto, "cesar/consumer/edge/state") == "goodbye"
    assert watched.lost.empty()
    watched.client.close()


def test_closing_sends_all_that_was_published(mosquitto: "Mosquitto", watch: Watch) -> None:
    receiver = watch(mosquitto.url, client_id="receiver", subscriptions=[Subscription("numbers")])
    receiver.start()
    watched = watch(mosquitto.url)
    watched.start()
    numbers = [str(number) for number in range(200)]
    for number in numbers:
        watched.publish("numbers", number.encode())
    watched.client.close()
    assert payloads(receiver.receive(200)) == numbers


@pytest.mark.parametrize("kind", ["frozen", "silent", "down"])
def test_closing_takes_no_longer_than_its_timeout(
    mosquitto: "Mosquitto", watch: Watch, free_port: int, kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = {"frozen": mosquitto.port, "silent": silent.getsockname()[1], "down": free_port}
        watched = watch(f"mqtt://127.0.0.1:{ports[kind]}")
        if kind == "frozen":
            watched.start()
            os.kill(mosquitto.pid, signal.SIGSTOP)
            for _ in range(20):
                watched.publish("a", b"x" * 1_000_000)
        else:
            watched.client.start()
            watched.client.wait_connected(0.1)
        started = time.monotonic()
        watched.client.close(timeout_s=0.5)
        watched.thread.join(PATIENCE_S)
        assert not watched.thread.is_alive()
        assert time.monotonic() - started < 30.0, "none of them ever answers"
    mosquitto.kill()


def test_it_can_be_closed_from_a_callback_and_before_it_was_started(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(mosquitto.url)
    watched.client.on_connected = lambda _info: watched.client.close()
    watched.client.start()
    watched.thread.join(PATIENCE_S)
    assert not watched.thread.is_alive()
    assert caplog.text == ""
    watch(mosquitto.url).client.close()


@both_versions
def test_refused_credentials_end_it_at_once(
    start_mosquitto: "StartMosquitto", watch: Watch, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_mosquitto(users={"ann": "right"})
    watched = watch(f"mqtt://ann:wr0ng@127.0.0.1:{broker.port}", settings={"protocol": protocol}, subscriptions=JOBS)
    watched.client.start()
    with pytest.raises(BrokerRefusedError, match=r"Check broker\.username and broker\.password_file"):
        watched.client.wait_connected(PATIENCE_S)
    watched.thread.join(PATIENCE_S)
    assert not watched.thread.is_alive()
    assert len(watched.refused) == 1
    assert f"mqtt://ann@127.0.0.1:{broker.port}" in str(watched.refused[0])
    assert "wr0ng" not in caplog.text + str(watched.refused[0])


def test_the_right_credentials_are_accepted(
    start_mosquitto: "StartMosquitto", watch: Watch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    broker = start_mosquitto(users={"ann": "r1ght"})
    file = tmp_path / "password"
    file.write_text("r1ght\n")
    watched = watch(broker.url, settings={"username": "ann", "password_file": file})
    watched.start()
    assert "r1ght" not in caplog.text


def test_a_refusal_after_it_had_been_connected_does_not_end_it(
    start_mosquitto: "StartMosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = start_mosquitto(users={"ann": "first"})
    watched = watch(f"mqtt://ann:first@127.0.0.1:{broker.port}")
    watched.start()
    broker.stop()
    broker.set_users({"ann": "second"})
    broker.start()
    assert holds(lambda: "refused this client" in str(watched.client.failure))
    assert watched.thread.is_alive()
    assert watched.refused == []
    assert watched.client.wait_connected(0) is None
    assert holds(lambda: "refused this client" in caplog.text)


# paho drops the socket of a failed TLS or WebSocket handshake without closing it; it is closed once it is freed.
failing_handshakes = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@failing_handshakes
def test_tls_verifies_the_broker_and_authenticates_the_client(
    start_mosquitto: "StartMosquitto", watch: Watch, certificates: "Certificates"
) -> None:
    broker = start_mosquitto(
        f"cafile {certificates.ca}",
        f"certfile {certificates.broker}",
        f"keyfile {certificates.broker_key}",
        "require_certificate true",
    )
    url = f"mqtts://127.0.0.1:{broker.port}"
    ours = {"ca_file": certificates.ca, "cert_file": certificates.client, "key_file": certificates.client_key}
    watched = watch(url, settings=ours)
    watched.start()
    ticket = watched.publish("a", b"x" * 1_000_000)
    assert watched.published_next() == (ticket, None)

    stranger = watch(url, client_id="stranger", settings={**ours, "ca_file": certificates.other_ca})
    stranger.client.start()
    assert holds(lambda: "certificate verify failed" in str(stranger.client.failure))

    nameless = watch(url, client_id="nameless", settings={"ca_file": certificates.ca})
    nameless.client.start()
    assert holds(lambda: nameless.client.failure)
    assert nameless.client.connected is None


@failing_handshakes
def test_tls_verifies_the_name_of_the_broker(
    start_mosquitto: "StartMosquitto", watch: Watch, certificates: "Certificates"
) -> None:
    broker = start_mosquitto(f"certfile {certificates.broker}", f"keyfile {certificates.broker_key}")
    watched = watch(f"mqtts://127.0.0.2:{broker.port}", settings={"ca_file": certificates.ca})
    with socket.create_server(("127.0.0.2", broker.port)) as door:
        relay(door, broker.port)
        watched.client.start()
        assert holds(lambda: "IP address mismatch" in str(watched.client.failure))


def relay(door: socket.socket, port: int) -> None:
    """Pass one connection on to a port of 127.0.0.1."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        near, _ = door.accept()
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=copy, args=(far, near))
            back.start()
            copy(near, far)
            back.join()

    threading.Thread(target=accept, daemon=True).start()


@pytest.mark.parametrize("encrypted", [False, True])
def test_it_speaks_websockets(
    start_mosquitto: "StartMosquitto", watch: Watch, certificates: "Certificates", free_port: int, *, encrypted: bool
) -> None:
    tls = [f"certfile {certificates.broker}", f"keyfile {certificates.broker_key}"] if encrypted else []
    start_mosquitto(f"listener {free_port} 127.0.0.1", "protocol websockets", *tls)
    scheme, settings = ("wss", {"ca_file": certificates.ca}) if encrypted else ("ws", {})
    watched = watch(f"{scheme}://127.0.0.1:{free_port}", subscriptions=JOBS, settings=settings)
    watched.start()
    with twin_socket(watched) as twin:
        assert twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    ticket = watched.publish("cesar/jobs", b"x" * 5000)
    assert watched.published_next() == (ticket, None)
    (delivery,) = watched.receive()
    assert delivery.payload == b"x" * 5000


def test_wrong_files_are_found_before_anything_is_connected(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for settings in (
        BrokerSettings(url="mqtts://b", ca_file=missing),
        BrokerSettings(url="mqtt://ann@b", password_file=missing),
        BrokerSettings(url="nonsense"),
        BrokerSettings(url="embedded://127.0.0.1:0"),
    ):
        with pytest.raises(ConfigError):
            MqttClient(settings, client_id=_NAME, persistent=True)


# -- which MQTT -------------------------------------------------------------------------------------------------------


def test_a_broker_that_refuses_mqtt_5_is_spoken_to_in_3_1_1(
    embedded_broker: EmbeddedBroker, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch(f"mqtt://127.0.0.1:{embedded_broker.port}", subscriptions=JOBS)
    assert watched.start().protocol == "3.1.1"
    watched.publish("cesar/jobs", b"x")
    assert payloads(watched.receive()) == ["x"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_with_mqtt_5_configured_a_broker_without_it_has_refused(embedded_broker: EmbeddedBroker, watch: Watch) -> None:
    watched = watch(f"mqtt://127.0.0.1:{embedded_broker.port}", settings={"protocol": "5"})
    watched.client.start()
    with pytest.raises(BrokerRefusedError, match="does not support MQTT 5"):
        watched.client.wait_connected(PATIENCE_S)


def test_a_broker_that_was_down_is_still_connected_with_mqtt_5(
    mosquitto: "Mosquitto", watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto.stop()
    watched = watch(mosquitto.url)
    watched.client.start()
    assert holds(lambda: "Connection refused" in caplog.text)
    mosquitto.start()
    assert watched.connected.get(timeout=PATIENCE_S).protocol == "5"


class ScriptedBroker:
    """Plays a script, one function for each connection."""

    def __init__(self, *script: Callable[[socket.socket, bytes], None]) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._door.getsockname()[1]}"
        self.connects: queue.Queue[bytes] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, args=(script,), daemon=True)
        self._thread.start()

    def _serve(self, script: Sequence[Callable[[socket.socket, bytes], None]]) -> None:
        for scene in script:
            client, _ = self._door.accept()
            client.settimeout(PATIENCE_S)
            with client, suppress(OSError):
                connect = read_packet(client)
                self.connects.put(connect)
                scene(client, connect)

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        self._door.close()


@pytest.fixture
def script() -> Iterator[Callable[..., ScriptedBroker]]:
    made: list[ScriptedBroker] = []

    def start(*scenes: Callable[[socket.socket, bytes], None]) -> ScriptedBroker:
        made.append(ScriptedBroker(*scenes))
        return made[-1]

    yield start
    for broker in made:
        broker.close()


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(size - len(data))
        if not part:
            raise OSError("closed")
        data += part
    return data


def read_packet(client: socket.socket) -> bytes:
    head = read_exactly(client, 2)
    length, shift = head[1] & 0x7F, 7
    while head[-1] & 0x80:
        head += read_exactly(client, 1)
        length |= (head[-1] & 0x7F) << shift
        shift += 7
    return head[:1] + read_exactly(client, length)


def spoken(connect: bytes) -> Literal["5", "3.1.1"]:
    return cast("Literal['5', '3.1.1']", {5: "5", 4: "3.1.1"}[connect[7]])


def hang_up(_client: socket.socket, _connect: bytes) -> None:
    pass


def accept(
    client: socket.socket, connect: bytes, *, properties: bytes = b"", granted: bytes = b"\1", then: bytes = b""
) -> None:
    """Accept the client, answer a SUBSCRIBE, send `then`, and wait until the client disconnects."""
    five = spoken(connect) == "5"
    body = b"\0\0" + (bytes([len(properties)]) + properties if five else b"")
    client.sendall(bytes([0x20, len(body)]) + body)
    with suppress(OSError):
        while True:
            packet = read_packet(client)
            if packet[0] == 0x82:
                body = packet[1:3] + (b"\0" if five else b"") + granted
                client.sendall(bytes([0x90, len(body)]) + body + then)


def test_a_broker_that_disconnects_at_mqtt_5_is_tried_in_3_1_1(
    script: Callable[..., ScriptedBroker], watch: Watch
) -> None:
    broker = script(hang_up, accept)
    watched = watch(broker.url)
    assert watched.start().protocol == "3.1.1"
    assert [spoken(broker.connects.get_nowait()) for _ in range(2)] == ["5", "3.1.1"]
    watched.client.close()


def test_nothing_is_published_before_the_subscriptions_are_made(
    script: Callable[..., ScriptedBroker], watch: Watch
) -> None:
    subscribing, go_on = threading.Event(), threading.Event()

    def hesitate(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\0\0\0")
        packet = read_packet(client)
        subscribing.set()
        go_on.wait(PATIENCE_S)
        client.sendall(b"\x90\x04" + packet[1:3] + b"\0\1")
        client.recv(100)

    watched = watch(script(hesitate).url, subscriptions=JOBS)
    watched.client.start()
    assert subscribing.wait(PATIENCE_S)
    assert watched.client.connected is None
    assert watched.client.publish("a", b"") is None
    go_on.set()
    watched.connected.get(timeout=PATIENCE_S)
    assert watched.client.publish("a", b"") is not None
    watched.client.close()


@failing_handshakes
def test_websockets_request_the_path_of_the_url(watch: Watch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        watched = watch(f"ws://127.0.0.1:{door.getsockname()[1]}/broker?token=t")
        watched.client.start()
        client, _ = door.accept()
        with client:
            assert client.recv(1000).startswith(b"GET /broker?token=t HTTP/1.1\r\n")
        watched.client.close()


def test_a_broker_that_disconnects_at_both_versions_is_tried_in_5_again(
    script: Callable[..., ScriptedBroker], watch: Watch
) -> None:
    broker = script(hang_up, hang_up, accept)
    watched = watch(broker.url)
    assert watched.start().protocol == "5"
    assert [spoken(broker.connects.get_nowait()) for _ in range(3)] == ["5", "3.1.1", "5"]
    watched.client.close()


def test_the_brokers_receive_maximum_is_respected(script: Callable[..., ScriptedBroker], watch: Watch) -> None:
    sent: queue.Queue[bytes] = queue.Queue()
    few = b"\x21" + struct.pack("!H", 3)

    def count(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x06\0\0\3" + few)
        client.settimeout(1.0)
        with suppress(OSError):
            while (packet := read_packet(client))[0] != 0xE0:
                sent.put(packet)

    broker = script(count)
    watched = watch(broker.url)
    watched.start()
    for _ in range(10):
        watched.publish("a", b"x")
    assert [sent.get(timeout=PATIENCE_S)[0] for _ in range(3)] == [0x32] * 3
    watched.client.close()
    broker.close()
    assert sent.empty()


def answer_in_order(client: socket.socket, acknowledges: Callable[[bytes], bool]) -> None:
    """Accept the client and answer its pings and messages, but not those that are not to be acknowledged."""
    client.sendall(b"\x20\x03\0\0\0")
    with suppress(OSError):
        while (packet := read_packet(client))[0] != 0xE0:
            if packet[0] == 0xC0:
                client.sendall(b"\xd0\0")
            elif acknowledges(packet):
                client.sendall(b"\x40\2" + packet[4:6])


def test_a_broker_that_answers_pings_and_not_a_message_is_disconnected_because_of_it(
    script: Callable[..., ScriptedBroker], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ 3.10 does so with a message over its limit, and acknowledges none behind it."""
    monkeypatch.setattr("cesar_mqtt.mqtt.connection._PROBE_S", 0.1)
    monkeypatch.setattr("cesar_mqtt.mqtt.connection._STALLED_S", 0.1)
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 0.05)
    stalled = threading.Event()

    def stall(client: socket.socket, _connect: bytes) -> None:
        def acknowledges(packet: bytes) -> bool:
            if packet.endswith(b"large"):
                stalled.set()
            return not stalled.is_set()

        answer_in_order(client, acknowledges)

    watched = watch(script(stall).url)
    failures: queue.Queue[ConnectionFailure] = queue.Queue()
    watched.client.on_disconnected = failures.put
    watched.start()
    first, large, behind = (watched.publish("a", payload) for payload in (b"small", b"large", b"small"))
    assert watched.published_next() == (first, None)
    failure = failures.get(timeout=PATIENCE_S)
    assert (failure.is_stalled, failure.unacknowledged) == (True, (large, behind))
    assert "does not acknowledge a message on a" in failure.problem
    watched.client.close()


def test_a_broker_that_answers_in_order_is_never_taken_for_a_stalled_one(
    script: Callable[..., ScriptedBroker], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.connection._PROBE_S", 0.0)
    monkeypatch.setattr("cesar_mqtt.mqtt.connection._STALLED_S", 0.0)
    watched = watch(script(lambda client, _connect: answer_in_order(client, lambda _packet: True)).url)
    watched.start()
    tickets = [watched.publish("a", b"x" * 5000) for _ in range(100)]
    assert [watched.published_next() for _ in tickets] == [(ticket, None) for ticket in tickets]
    assert watched.lost.empty()
    watched.client.close()


def test_an_acknowledgement_has_been_received_once_a_message_behind_it_is_acknowledged(
    script: Callable[..., ScriptedBroker], watch: Watch
) -> None:
    sent: queue.Queue[bytes] = queue.Queue()
    answer: queue.Queue[bytes] = queue.Queue()

    def scene(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\1\0\0")
        client.sendall(b"\x90\x04" + read_packet(client)[1:3] + b"\0\1")
        client.sendall(b"\x32\x07\0\1j\0\5\0x" + b"\x32\x07\0\1j\0\6\0y")
        for _ in range(4):
            sent.put(read_packet(client))
        for _ in range(2):
            client.sendall(b"\x40\x02" + answer.get(timeout=PATIENCE_S))
        read_packet(client)

    watched = watch(script(scene).url, subscriptions=JOBS)
    watched.start()
    packet_ids = []
    for delivery in watched.receive(2):
        watched.publish("a", b"")
        packet_ids.append(sent.get(timeout=PATIENCE_S)[4:6])
        watched.client.acknowledge([delivery])
        assert sent.get(timeout=PATIENCE_S)[:3] == b"\x40" + struct.pack("!H", delivery.receipt.mid)
    for packet_id, count in zip(packet_ids, (0, 1), strict=True):
        answer.put(packet_id)
        watched.published_next()
        assert watched.client.take_redelivery_bounds() == RedeliveryBounds(0, {1: count})
    assert watched.client.take_redelivery_bounds() == RedeliveryBounds(0, {})
    watched.client.close()


@pytest.mark.parametrize("present", [False, True])
def test_a_session_is_still_new_if_its_first_connection_was_never_ready(
    script: Callable[..., ScriptedBroker], watch: Watch, *, present: bool
) -> None:
    def cut_off(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03" + bytes([present]) + b"\0\0")
        read_packet(client)

    def stand(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\1\0\0")
        subscribe = read_packet(client)
        client.sendall(b"\x90\x04" + subscribe[1:3] + b"\0\1")
        read_packet(client)

    watched = watch(script(cut_off, stand, stand).url, subscriptions=JOBS)
    info = watched.start()
    assert (info.number, info.session_present) == (2, present)
    assert watched.client.take_redelivery_bounds() == RedeliveryBounds(0 if present else 1, {})
    watched.client._connection._paho.socket().close()  # type: ignore[union-attr]
    assert watched.connected.get(timeout=PATIENCE_S).session_present
    watched.client.close()


def test_a_session_takeover_is_reported(
    script: Callable[..., ScriptedBroker], watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    taken_over = b"\xe0\x02\x8e\x00"
    broker = script(lambda client, connect: accept(client, connect, then=taken_over))
    watched = watch(broker.url, subscriptions=JOBS)
    watched.start()
    reason = watched.lost.get(timeout=PATIENCE_S)
    assert f"another client connected with the client id '{_NAME}'" in reason
    assert holds(lambda: reason in caplog.text)
    watched.client.close()


def answer_each(client: socket.socket, connect: bytes, answers: Sequence[bytes], asked: list[bytes]) -> None:
    """Accept the client and answer one SUBSCRIBE after the other, all further ones as the last."""
    five = spoken(connect) == "5"
    client.sendall(b"\x20\x03\0\0\0" if five else b"\x20\x02\0\0")
    with suppress(OSError):
        while True:
            packet = read_packet(client)
            if packet[0] == 0x82:
                asked.append(packet)
                granted = answers[min(len(asked), len(answers)) - 1]
                body = packet[1:3] + (b"\0" if five else b"") + granted
                client.sendall(bytes([0x90, len(body)]) + body)


FILTERS = [Subscription("cesar/jobs"), Subscription("refused/#"), Subscription("weak")]


@both_versions
def test_a_subscription_that_is_refused_or_weakened_is_reported(
    script: Callable[..., ScriptedBroker],
    watch: Watch,
    protocol: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_module, "_AGAIN_S", (0.01,) * 5)
    asked: list[bytes] = []
    broker = script(lambda client, connect: answer_each(client, connect, [b"\1\x80\0", b"\x80"], asked))
    watched = watch(broker.url, subscriptions=FILTERS, settings={"protocol": protocol})
    assert watched.start().refused_filters == ("refused/#", "weak")
    assert "did not grant 'refused/#'" in caplog.text
    assert "did not grant 'weak'" in caplog.text
    assert holds(lambda: len(asked) == 6)
    assert watched.client.connected
    assert [b"refused/#" in packet for packet in asked] == [True] * 6
    assert [b"cesar/jobs" in packet for packet in asked] == [True] + [False] * 5
    watched.client.close()


@both_versions
def test_a_broker_that_refuses_subscriptions_for_a_moment_is_asked_again(
    script: Callable[..., ScriptedBroker],
    watch: Watch,
    protocol: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NATS answers so while its servers elect a leader."""
    monkeypatch.setattr(connection_module, "_AGAIN_S", (0.01,) * 5)
    caplog.set_level(logging.INFO)
    asked: list[bytes] = []
    answers = [b"\x80\x80\1", b"\x80\1", b"\1"]
    broker = script(lambda client, connect: answer_each(client, connect, answers, asked))
    watched = watch(broker.url, subscriptions=FILTERS, settings={"protocol": protocol})
    assert watched.start().refused_filters == ()
    assert [packet.count(b"cesar/jobs") for packet in asked] == [1, 1, 1]
    assert "The broker refuses 'cesar/jobs', 'refused/#' without a reason" in caplog.text
    assert "grants 'refused/#' now" in caplog.text
    watched.client.close()


def test_a_refusal_with_a_reason_is_final(script: Callable[..., ScriptedBroker], watch: Watch) -> None:
    asked: list[bytes] = []
    broker = script(lambda client, connect: answer_each(client, connect, [b"\1\x87\1"], asked))
    watched = watch(broker.url, subscriptions=FILTERS)
    assert watched.start().refused_filters == ("refused/#",)
    assert watched.client._connection is not None
    assert watched.client._connection._subscribe_again == {}
    watched.client.close()


@pytest.mark.parametrize(("code", "advice"), [(0x9E, "consumer.group"), (0x9A, "retained messages"), (0x9B, "QoS 1")])
def test_a_disconnect_in_place_of_a_suback_ends_the_client(
    script: Callable[..., ScriptedBroker], watch: Watch, code: int, advice: str
) -> None:
    """ejabberd has no shared subscriptions, and says so with a DISCONNECT."""

    def refuse(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\0\0\0")
        read_packet(client)
        client.sendall(b"\xe0\x02" + bytes([code]) + b"\0")
        client.recv(1)

    watched = watch(script(refuse).url, subscriptions=[Subscription("$share/house/cesar/jobs")])
    watched.client.start()
    with pytest.raises(BrokerRefusedError) as caught:
        watched.client.wait_connected(PATIENCE_S)
    assert advice in caught.value.advice
    assert caught.value.reason_code == code
    watched.client.close()


@pytest.mark.parametrize(
    ("option", "advice"), [("retain_available false", "retain_available true"), ("max_qos 0", "max_qos 1 or 2")]
)
def test_a_broker_without_retained_messages_or_qos_1_ends_the_client(
    start_mosquitto: "StartMosquitto", watch: Watch, option: str, advice: str
) -> None:
    watched = watch(start_mosquitto(option).url, will=Will("a", b"x"))
    watched.client.start()
    with pytest.raises(BrokerRefusedError) as caught:
        watched.client.wait_connected(PATIENCE_S)
    assert advice in caught.value.advice
    watched.client.close()


def test_a_port_for_websockets_is_named(start_mosquitto: "StartMosquitto", watch: Watch, free_port: int) -> None:
    start_mosquitto(f"listener {free_port} 127.0.0.1", "protocol websockets")
    watched = watch(f"mqtt://127.0.0.1:{free_port}")
    watched.client.start()
    assert holds(lambda: watched.client.failure)
    assert f"answers in HTTP, not in MQTT. If that port is for WebSockets, write ws://127.0.0.1:{free_port}." in str(
        watched.client.failure
    )
    watched.client.close()


@pytest.mark.parametrize("name", [b"cesar/\xff\xfe", b"cesar/\xc3"])
def test_a_topic_that_is_not_utf_8_is_delivered(
    script: Callable[..., ScriptedBroker], watch: Watch, name: bytes
) -> None:
    body = struct.pack("!H", len(name)) + name + b"\0\7\0" + b"payload"
    odd = bytes([0x32, len(body)]) + body
    broker = script(lambda client, connect: accept(client, connect, then=odd))
    watched = watch(broker.url, subscriptions=[Subscription("#")])
    watched.start()
    (delivery,) = watched.receive()
    assert delivery.topic == name.decode(errors="replace")
    assert delivery.payload == b"payload"
    assert delivery.receipt.mid == 7
    assert watched.lost.empty()
    watched.client.close()


def test_a_malformed_message_is_received_in_3_1_1(
    script: Callable[..., ScriptedBroker],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The broker would send it for ever; in 3.1.1 there are no properties. After that 5 is spoken again."""
    monkeypatch.setattr(client_module, "_TEMPORARY_S", 0.5)
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 0.1)
    unknown_property = b"\x32\x08\0\1t\0\7\2\x63\0"
    caplog.set_level(logging.DEBUG)
    broker = script(
        lambda client, connect: accept(client, connect, then=unknown_property),
        lambda client, connect: accept(client, connect, then=b"\x32\x06\0\1t\0\7x"),
        accept,
    )
    watched = watch(broker.url, subscriptions=[Subscription("t")])
    watched.start()
    assert payloads(watched.receive()) == ["x"]
    assert [watched.connected.get(timeout=PATIENCE_S).protocol for _ in range(2)] == ["3.1.1", "5"]
    assert "the broker sent a malformed packet: property 99 in a PUBLISH" in caplog.text
    watched.client.close()


def test_the_connection_is_kept_while_the_buffer_is_full(
    script: Callable[..., ScriptedBroker], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosquitto disconnects a client from which it has received nothing for one and a half times the keepalive."""
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 0.1)
    pinged, acknowledged = threading.Event(), threading.Event()
    numbers = list(range(30))
    messages = b"".join(b"\x32\x0d\0\1t" + struct.pack("!H", n + 1) + b"\0" + f"{n:07}".encode() for n in numbers)

    def impatient(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\1\0\0" + messages)
        client.settimeout(1.5)
        for _ in range(10):  # twice the keepalive, and paho would miss the answers
            assert read_packet(client) == b"\xc0"
        pinged.set()
        for number in numbers:
            while (packet := read_packet(client)) == b"\xc0":
                client.sendall(b"\xd0\0")
            assert packet == b"\x40" + struct.pack("!H", number + 1)
        acknowledged.set()
        client.recv(100)

    watched = watch(script(impatient).url, buffer_max_bytes=20)
    keep_alive_every(watched, 1)
    watched.start()
    assert pinged.wait(PATIENCE_S)
    deliveries: list[Delivery] = []
    while len(deliveries) < len(numbers):
        fetched = watched.receive()
        assert 0 < len(fetched) <= 2
        watched.client.acknowledge(fetched)
        deliveries += fetched
    assert [int(delivery.payload) for delivery in deliveries] == numbers
    assert acknowledged.wait(PATIENCE_S)
    assert watched.lost.empty()
    watched.client.close()


def test_a_disconnect_behind_messages_without_room_is_handled(
    script: Callable[..., ScriptedBroker], watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was once handled on a connection that was already closed, with a traceback."""
    two = b"".join(b"\x32\x07\0\1t\0" + number + b"\0x" for number in (b"\1", b"\2"))
    shutting_down = b"\xe0\x02\x8b\x00"
    broker = script(lambda client, connect: accept(client, connect, then=two + shutting_down))
    watched = watch(broker.url, subscriptions=[Subscription("t")], buffer_max_messages=1)
    watched.start()
    assert holds(lambda: watched.client._connection is not None and watched.client._connection._undelivered is not None)
    assert payloads(watched.receive(2)) == ["x", "x"]
    assert "Server shutting down" in watched.lost.get(timeout=PATIENCE_S)
    watched.client.close()
    assert not [record for record in caplog.records if record.exc_info]


def test_a_message_of_qos_2_is_delivered_and_acknowledged(script: Callable[..., ScriptedBroker], watch: Watch) -> None:
    """A session may hold a subscription that another program made in it."""
    packets: queue.Queue[bytes] = queue.Queue()

    def exactly_once(client: socket.socket, _connect: bytes) -> None:
        client.sendall(b"\x20\x03\1\0\0" + b"\x34\x09\0\1t\0\7\0two")
        with suppress(OSError):
            while True:
                packet = read_packet(client)
                packets.put(packet)
                if packet[0] == 0x50:
                    client.sendall(b"\x62\x02" + packet[1:3])

    watched = watch(script(exactly_once).url)
    watched.start()
    deliveries = watched.receive()
    assert [(delivery.payload, delivery.qos) for delivery in deliveries] == [(b"two", 2)]
    assert packets.get(timeout=PATIENCE_S) == b"\x50\0\7"
    watched.client.acknowledge(deliveries)
    assert packets.get(timeout=PATIENCE_S) == b"\x70\0\7"
    watched.client.close()


def test_a_broker_that_never_answers_is_disconnected_and_tried_again(
    script: Callable[..., ScriptedBroker], watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.connection._ANSWER_S", 0.5)
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 0.1)

    def stay_silent(client: socket.socket, _connect: bytes) -> None:
        client.recv(1)

    broker = script(stay_silent, stay_silent, accept)
    watched = watch(broker.url)
    watched.client.start()
    assert holds(lambda: "did not answer" in str(watched.client.failure))
    assert watched.connected.get(timeout=PATIENCE_S).protocol == "5"
    watched.client.close()


ODD_PACKETS = (
    *(b"\x40\x02\0\1" * 3, b"\x40\x02\xff\xff", b"\x40\0", b"\x40\1\0", b"\x40\4\0\1\x10\0", b"\x40\3\0\1\x97"),
    *(b"\x50\2\0\1", b"\x50\0", b"\x62\2\0\1", b"\x62\0", b"\x70\2\0\1", b"\x70\0"),
    *(
        b"\x90\4\0\1\0\0",
        b"\x90\3\0\1\0",
        b"\x90\0",
        b"\x90\4\0\1\0\x80",
        b"\x90\6\0\1\0\1\1\1",
        b"\xb0\2\0\1",
        b"\xb0\0",
    ),
    *(b"\xd0\0", b"\xd0\1a", b"\x20\3\0\0\0", b"\x20\0", b"\x20\2\0\5", b"\x20\3\0\x87\0"),
    *(b"\x32\6\0\1\xff\0\5\0", b"\x32\5\0\0\0\5\0", b"\x32\6\0\1#\0\5\0", b"\x32\6\0\1j\0\0\0", b"\x36\6\0\1j\0\5\0"),
    *(b"\x30\2\0\1", b"\x30\0", b"\x30\3\xff\xffj", b"\x32\x0a\0\1j\0\5\4\2\0\0\0", b"\x34\7\0\1j\0\5\0x" * 2),
    *(b"\x30\xff\xff\xff\xff\xff", b"\xf0\0", b"\xf0\2\0\0", b"\0\0", b"\x10\0", b"\x82\0", b"\xff" * 50, bytes(50)),
    *(b"\xe0\0", b"\xe0\2\x8d\0", b"\xe0\1\xff", b"\xe0\3\0\1\0", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
)
"""Acknowledgements of nothing, repeated, cut or of a wrong kind; damaged messages; packets that no broker may send."""


def test_no_packet_of_a_broker_ends_the_client(
    script: Callable[..., ScriptedBroker],
    watch: Watch,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.connection.MAX_WAIT_S", 0.05)

    def send(odd: bytes, client: socket.socket, connect: bytes) -> None:
        connack, granted = (b"\x20\3\1\0\0", b"\0\1") if spoken(connect) == "5" else (b"\x20\2\1\0", b"\1")
        client.sendall(connack)
        packet = read_packet(client)
        client.sendall(bytes([0x90, 2 + len(granted)]) + packet[1:3] + granted + odd)
        client.settimeout(0.1)
        while client.recv(100):
            pass

    broker = script(*(functools.partial(send, odd) for odd in ODD_PACKETS), accept)
    watched = watch(broker.url, subscriptions=JOBS)
    watched.client._backoff = watched.client._away_backoff = Backoff(0.01, 0.02)
    watched.start()
    assert holds(lambda: broker.connects.qsize() == len(ODD_PACKETS) + 1)
    assert holds(lambda: watched.client.connected)
    assert watched.thread.is_alive()
    assert "continues after an error" not in caplog.text
    watched.client.close()
