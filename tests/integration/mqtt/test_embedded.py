"""The embedded broker with mosquitto_pub, mosquitto_sub, our client, and broken clients."""

import logging
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.errors import ConfigError
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.embedded import EmbeddedBroker
from cesar_mqtt.mqtt.messages import ConnectionInfo, Subscription, Will
from tests.conftest import PATIENCE_S

uses_mosquitto = pytest.mark.mosquitto


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the root logger receives from WARNING on, and so the user."""
    lines: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Listening(logging.WARNING)
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


def shell(broker: EmbeddedBroker, program: str, *arguments: str, text: str | None = None) -> str:
    command = [f"mosquitto_{program}", "-p", str(broker.port), *arguments]
    result = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return result.stdout + result.stderr


@contextmanager
def listening(broker: EmbeddedBroker, *arguments: str) -> Iterator["Pipeline"]:
    """A mosquitto_sub that has subscribed."""
    command = ["stdbuf", "-oL", "mosquitto_sub", "-d", "-p", str(broker.port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    listener = Pipeline(process)
    try:
        listener.wait_for("Subscribed")
        yield listener
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        listener.close()


class Pipeline:
    """Reads what a process prints, a line at a time and for no longer than it may take."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def wait_for(self, text: str) -> None:
        while text not in self._lines.get(timeout=PATIENCE_S):
            pass

    def messages(self, count: int) -> list[str]:
        """The next lines without debugging output."""
        found: list[str] = []
        while len(found) < count:
            line = self._lines.get(timeout=PATIENCE_S)
            if not line.startswith(("Client ", "Subscribed")):
                found.append(line)
        return found

    def close(self) -> None:
        self._thread.join(PATIENCE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def connected(broker: EmbeddedBroker, **options: Any) -> Iterator[MqttClient]:
    client = MqttClient(BrokerSettings(url=broker.url), **options)
    client.start()
    assert client.wait_connected(PATIENCE_S)
    yield client
    client.close()


def receive(client: MqttClient, count: int) -> list[str]:
    texts: list[str] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(texts) < count and time.monotonic() < deadline:
        deliveries = client.receive(0.1)
        client.acknowledge(deliveries)
        texts += [delivery.payload.decode() for delivery in deliveries]
    return texts


def holds(condition: Callable[[], object]) -> bool:
    """Poll a condition that has no notification."""
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition() and time.monotonic() < deadline:
        pause.wait(0.01)
    return bool(condition())


def packet(kind: int, body: bytes) -> bytes:
    return bytes([kind, len(body)]) + body


def text(value: bytes) -> bytes:
    return struct.pack("!H", len(value)) + value


def connect(name: bytes, *, version: int = 4, properties: bytes = b"") -> bytes:
    return packet(0x10, text(b"MQTT") + bytes([version, 2, 0, 60]) + properties + text(name))


def answer(broker: EmbeddedBroker, data: bytes) -> bytes:
    """Everything that the broker answers before it closes the connection."""
    with socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S) as stranger:
        stranger.sendall(data)
        answer = b""
        while part := stranger.recv(100):
            answer += part
        return answer


# -- the main scenario ------------------------------------------------------------------------------------------------


@uses_mosquitto
def test_a_later_subscriber_receives_the_retained_status(embedded_broker: EmbeddedBroker) -> None:
    with connected(
        embedded_broker, client_id="cesar", persistent=True, subscriptions=[Subscription("cesar/jobs")]
    ) as us:
        shell(embedded_broker, "pub", "-q", "1", "-t", "cesar/jobs", "-m", "speech.wav")
        assert receive(us, 1) == ["speech.wav"]
        us.publish("cesar/status/a", b"queued", retain=True)
        us.publish("cesar/status/a", b"completed", retain=True)
        us.publish("cesar/result/a/txt", b"text", retain=True)
        # The last message is there: so the broker has the others, too.
        assert shell(embedded_broker, "sub", "-t", "cesar/result/a/txt", "-C", "1", "-W", "100") == "text\n"
        seen = shell(embedded_broker, "sub", "-v", "-t", "cesar/status/#", "-C", "1", "-W", "100")
        assert seen == "cesar/status/a completed\n"


@uses_mosquitto
def test_several_clients_receive_all_messages_in_order(embedded_broker: EmbeddedBroker) -> None:
    numbers = [str(number) for number in range(300)]
    lines = "".join(f"{number}\n" for number in numbers)
    with (
        listening(embedded_broker, "-q", "1", "-t", "cesar/#") as first,
        listening(embedded_broker, "-q", "0", "-t", "cesar/+") as second,
        connected(
            embedded_broker, client_id="cesar", persistent=True, subscriptions=[Subscription("cesar/jobs")]
        ) as us,
    ):
        for qos in ("0", "1"):
            shell(embedded_broker, "pub", "-q", qos, "-t", "cesar/jobs", "-l", text=lines)
            assert first.messages(300) == numbers
            assert second.messages(300) == numbers
            assert receive(us, 300) == numbers


@uses_mosquitto
def test_retained_messages_answer_only_the_clients_own_filter(embedded_broker: EmbeddedBroker) -> None:
    """amqtt 0.12.1 sends each new client what is retained for the filters of all others."""
    for topic in ("ours/a", "theirs/b"):
        shell(embedded_broker, "pub", "-r", "-q", "1", "-t", topic, "-m", topic)
    with (
        listening(embedded_broker, "-q", "1", "-t", "theirs/#") as theirs,
        listening(embedded_broker, "-q", "1", "-t", "ours/#") as ours,
    ):
        shell(embedded_broker, "pub", "-q", "1", "-t", "ours/last", "-m", "last")
        shell(embedded_broker, "pub", "-q", "1", "-t", "theirs/last", "-m", "last")
        assert ours.messages(2) == ["ours/a", "last"]
        assert theirs.messages(2) == ["theirs/b", "last"]


@uses_mosquitto
def test_a_retained_message_is_marked_as_such_and_can_be_cleared(embedded_broker: EmbeddedBroker) -> None:
    with listening(embedded_broker, "-q", "1", "-t", "a", "-F", "%r %q %p") as live:
        shell(embedded_broker, "pub", "-r", "-q", "1", "-t", "a", "-m", "x")
        assert live.messages(1) == ["0 1 x"]
    assert shell(embedded_broker, "sub", "-q", "1", "-t", "a", "-C", "1", "-W", "100", "-F", "%r %q %p") == "1 1 x\n"
    shell(embedded_broker, "pub", "-r", "-q", "1", "-t", "a", "-n")
    assert shell(embedded_broker, "sub", "-t", "a", "-C", "1", "-W", "1") == "Timed out\n"


@uses_mosquitto
def test_the_will_of_a_lost_client_is_published_and_retained(embedded_broker: EmbeddedBroker) -> None:
    will = ["--will-topic", "w", "--will-payload", "offline", "--will-retain", "--will-qos", "1"]
    with listening(embedded_broker, "-q", "1", "-t", "w") as watcher:
        with listening(embedded_broker, "-t", "x", *will):
            pass
        assert watcher.messages(1) == ["offline"]
    assert shell(embedded_broker, "sub", "-t", "w", "-C", "1", "-W", "100") == "offline\n"


def test_our_will_is_not_sent_when_we_close(embedded_broker: EmbeddedBroker) -> None:
    with connected(embedded_broker, client_id="other", persistent=False, subscriptions=[Subscription("#")]) as other:
        with connected(embedded_broker, client_id="cesar", persistent=True, will=Will("w", b"offline")) as us:
            us.publish("a", b"goodbye")
        with connected(embedded_broker, client_id="later", persistent=False) as later:
            later.publish("a", b"later")
        assert receive(other, 2) == ["goodbye", "later"]


@uses_mosquitto
def test_a_large_recording_gets_through(embedded_broker: EmbeddedBroker, tmp_path: Path) -> None:
    recording = tmp_path / "recording"
    recording.write_bytes(os.urandom(20 << 20))
    audio = Subscription("cesar/audio/+", wants_retained=True)
    with connected(embedded_broker, client_id="cesar", persistent=True, subscriptions=[audio]) as us:
        shell(embedded_broker, "pub", "-q", "1", "-t", "cesar/audio/a", "-f", str(recording))
        (delivery,) = us.receive(PATIENCE_S)
        assert delivery.payload == recording.read_bytes()


def test_a_message_does_not_wait_for_an_acknowledgement_by_tcp(embedded_broker: EmbeddedBroker) -> None:
    """With Nagle's algorithm on, each took 44 ms."""
    with connected(embedded_broker, client_id="us", persistent=True, subscriptions=[Subscription("a")]) as us:
        us.publish("a", b"x")
        assert receive(us, 1) == ["x"]
        (served,) = [writer.get_extra_info("socket") for writer in embedded_broker._writers]
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


# -- where it listens -------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_in_the_error(embedded_broker: EmbeddedBroker) -> None:
    with pytest.raises(ConfigError) as taken:
        EmbeddedBroker(port=embedded_broker.port).start()
    message = str(taken.value)
    assert message.startswith(f"Port {embedded_broker.port} on 127.0.0.1 is in use")
    assert f"--broker mqtt://127.0.0.1:{embedded_broker.port}" in message
    assert "--broker embedded://127.0.0.1:PORT" in message


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "broker.lan", ""])  # noqa: S104 - it is refused
def test_a_host_that_other_machines_can_reach_is_rejected(host: str) -> None:
    with pytest.raises(ConfigError, match="this machine only"):
        EmbeddedBroker(host)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "::1"])
def test_it_listens_on_the_given_address(host: str) -> None:
    broker = EmbeddedBroker(host, 0)
    try:
        broker.start()
    except ConfigError:
        if host != "::1":
            raise
        pytest.skip("this machine has no IPv6")
    client = MqttClient(BrokerSettings(url=broker.url), client_id="a", persistent=False)
    client.start()
    assert isinstance(client.wait_connected(PATIENCE_S), ConnectionInfo)
    client.close()
    broker.close()


# -- strangers --------------------------------------------------------------------------------------------------------


def test_a_client_of_mqtt_5_is_refused_at_once(embedded_broker: EmbeddedBroker) -> None:
    """amqtt would take the properties for a client id, and wait for the rest of it."""
    expiry = b"\x05\x11\xff\xff\xff\xff"
    for properties in (b"\0", expiry):
        assert answer(embedded_broker, connect(b"a", version=5, properties=properties)) == b"\x20\x03\x00\x84\x00"


@uses_mosquitto
def test_port_scans_and_broken_clients_are_not_logged(
    embedded_broker: EmbeddedBroker, log_lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    junk = [
        b"",
        b"\x10",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"\0" * 100,
        b"\xff" * 100,
        b"\x10\xff\xff\xff\xff\x7f" + b"x" * 20,
        packet(0x10, text(b"MQTT") + b"\x04"),
        connect(b"a", version=3),
        packet(0x10, text(b"MQIsdp") + bytes([3, 2, 0, 60]) + text(b"a")),
        connect(b"a") + b"\xf0\x00",
        connect(b"a") + packet(0x30, text(b"\xff\xfe") + b"x"),
        connect(b"a") + packet(0x30, text(b"a/#") + b"x"),
        connect(b"a") + packet(0x82, b"\0\1" + text(b"a") + b"\7"),
        connect(b"a") + connect(b"a"),
    ]
    for data in junk:
        with socket.create_connection(("127.0.0.1", embedded_broker.port), timeout=PATIENCE_S) as stranger:
            stranger.sendall(data)
    with socket.create_connection(("127.0.0.1", embedded_broker.port)) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.sendall(connect(b"a"))
    with listening(embedded_broker, "-q", "1", "-t", "a") as killed:
        killed.process.kill()
        shell(embedded_broker, "pub", "-q", "1", "-t", "a", "-m", "x")

    with connected(embedded_broker, client_id="us", persistent=True, subscriptions=[Subscription("a")]) as us:
        us.publish("a", b"still there")
        assert receive(us, 1) == ["still there"]
    assert holds(lambda: not embedded_broker._writers)
    assert log_lines == []
    assert capfd.readouterr().err == ""


# -- the end ----------------------------------------------------------------------------------------------------------


def test_closing_frees_the_port_and_ends_the_thread(log_lines: list[str]) -> None:
    broker = EmbeddedBroker(port=0)
    broker.close()
    broker.start()
    port = broker.port
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as idle:
        assert holds(lambda: broker._writers)
        broker.close()
        assert idle.recv(1) == b""
    assert not [thread for thread in threading.enumerate() if thread.name == "embedded-broker"]
    broker.close()
    again = EmbeddedBroker(port=port)
    again.start()
    again.close()
    assert log_lines == []


def test_closing_does_not_wait_for_a_client_that_does_not_read() -> None:
    broker = EmbeddedBroker(port=0)
    broker.start()
    with (
        socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE_S) as deaf,
        connected(broker, client_id="us", persistent=False, subscriptions=[Subscription("b")]) as us,
    ):
        deaf.sendall(connect(b"deaf"))
        deaf.sendall(packet(0x82, b"\0\1" + text(b"a") + b"\0"))
        answer = b""
        while not answer.endswith(b"\x90\x03\0\1\0"):
            answer += deaf.recv(100)
        for _ in range(10):
            us.publish("a", b"x" * 1_000_000)
        us.publish("b", b"handed out after all the others")
        receive(us, 1)
        started = time.monotonic()
        broker.close()
        assert time.monotonic() - started < 30.0, "the client never reads again"
    assert not [thread for thread in threading.enumerate() if thread.name == "embedded-broker"]


# -- what is acknowledged to a publisher is kept -------------------------------------------------------------------


@contextmanager
def keeping() -> Iterator[EmbeddedBroker]:
    """A broker whose messages on `cesar/jobs` are stored by the client `cesar`."""
    broker = EmbeddedBroker(port=0, subscriber="cesar", is_forwarded=lambda topic: topic == "cesar/jobs")
    broker.start()
    try:
        yield broker
    finally:
        broker.close()


@contextmanager
def linked(broker: EmbeddedBroker, client_id: str, *topics: str) -> Iterator[tuple[MqttClient, "queue.Queue[str]"]]:
    """A client, and its acknowledgements and disconnections in order."""
    reports: queue.Queue[str] = queue.Queue()
    client = MqttClient(
        BrokerSettings(url=broker.url, protocol="3.1.1"),
        client_id=client_id,
        persistent=client_id == "cesar",
        subscriptions=[Subscription(topic) for topic in topics],
        on_published=lambda ticket, _reason: reports.put(f"{ticket.mid} is acknowledged"),
        on_disconnected=lambda _reason: reports.put("disconnected"),
    )
    client.start()
    assert client.wait_connected(PATIENCE_S) is not None
    try:
        yield client, reports
    finally:
        client.close()


def test_a_job_is_acknowledged_to_its_publisher_only_after_the_subscriber_has_it() -> None:
    with (
        keeping() as broker,
        linked(broker, "cesar", "cesar/jobs") as (subscriber, _),
        linked(broker, "observer", "cesar/#"),
        linked(broker, "producer") as (producer, reports),
    ):
        job = producer.publish("cesar/jobs", b"a.wav")
        other = producer.publish("cesar/other", b"something else")
        assert job is not None
        assert other is not None
        assert reports.get(timeout=PATIENCE_S) == f"{other.mid} is acknowledged", (
            "a topic that is not forwarded does not wait"
        )
        deliveries = subscriber.receive(PATIENCE_S)
        assert [delivery.payload for delivery in deliveries] == [b"a.wav"]
        assert reports.empty()

        subscriber.acknowledge(deliveries)

        assert reports.get(timeout=PATIENCE_S) == f"{job.mid} is acknowledged"


def test_the_same_job_twice_at_once_is_acknowledged_twice() -> None:
    with (
        keeping() as broker,
        linked(broker, "cesar", "cesar/jobs") as (subscriber, _),
        linked(broker, "producer") as (producer, reports),
    ):
        tickets = [producer.publish("cesar/jobs", b"a.wav") for _ in range(20)]
        taken = 0
        while taken < len(tickets):
            deliveries = subscriber.receive(PATIENCE_S)
            subscriber.acknowledge(deliveries)
            taken += len(deliveries)
        reported = {reports.get(timeout=PATIENCE_S) for _ in tickets}
        assert reported == {f"{ticket.mid} is acknowledged" for ticket in tickets if ticket is not None}


def test_a_publisher_whose_job_is_not_acknowledged_is_disconnected_so_that_it_sends_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.embedded._SUBSCRIBER_S", 0.2)
    with keeping() as broker:
        with linked(broker, "cesar", "cesar/jobs"):
            pass
        with linked(broker, "producer") as (producer, reports):
            assert producer.publish("cesar/jobs", b"a.wav") is not None
            assert reports.get(timeout=PATIENCE_S) == "disconnected"


def test_other_clients_are_connected_once_the_subscriber_has_subscribed() -> None:
    """A job that was published between the start of the broker and the subscription was lost."""
    with keeping() as broker:
        producer = MqttClient(BrokerSettings(url=broker.url, protocol="3.1.1"), client_id="producer", persistent=False)
        producer.start()
        try:
            assert producer.wait_connected(0.3) is None
            with linked(broker, "cesar", "cesar/jobs") as (subscriber, _):
                assert producer.wait_connected(PATIENCE_S) is not None
                assert producer.publish("cesar/jobs", b"a.wav", qos=0) is not None
                assert [delivery.payload for delivery in subscriber.receive(PATIENCE_S)] == [b"a.wav"]
        finally:
            producer.close()


def test_a_client_is_disconnected_if_the_subscriber_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.mqtt.embedded._SUBSCRIBER_S", 0.2)
    with keeping() as broker, socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S) as client:
        client.sendall(b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x0a\x00\x01x")
        assert client.recv(100) == b""
