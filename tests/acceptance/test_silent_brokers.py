"""Every command has an end: at brokers that are there, and go silent at one step."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Literal

import pytest

from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.gateway.session import Session
from cesar_mqtt.mqtt.messages import Subscription
from tests.acceptance.harness import PATIENCE_S, SPEECH, command
from tests.conftest import find_free_port

Step = Literal["starting", "connect", "subscribe", "publish", "respond"]

COMMANDS = (
    ("jobs",),
    ("show", "a"),
    ("delete", "a"),
    ("rejected",),
    ("pause",),
    ("health",),
    ("submit", str(SPEECH)),
    ("submit", "--no-wait", str(SPEECH)),
)


class SilentBroker:
    """Speaks MQTT 3.1.1 with any number of clients, up to the step which it does not answer before `go_on` is set.

    While it is `starting` it closes every connection.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.go_on = threading.Event()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._door.accept()
                self._clients.append(client)
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with suppress(OSError), client, client.makefile("rb") as stream:
            while head := stream.read(1):
                length = shift = 0
                more = True
                while more:
                    byte = stream.read(1)[0]
                    length, shift, more = length | (byte & 0x7F) << shift, shift + 7, byte > 0x7F
                client.sendall(self._answer_to(head[0] >> 4, stream.read(length)))

    def _answer_to(self, kind: int, body: bytes) -> bytes:
        if self._step == "starting" and not self.go_on.is_set():
            raise ConnectionError
        if kind == 1 and self._step != "connect":
            return b"\x20\2\0\0" if body[6] == 4 else b"\x20\2\0\1"
        if kind == 8 and self._step == "subscribe":
            self.go_on.wait()
        if kind == 8 and self._step != "connect":
            filters, rest = 0, body[2:]
            while rest:
                filters, rest = filters + 1, rest[3 + int.from_bytes(rest[:2]) :]
            return bytes([0x90, 2 + filters]) + body[:2] + b"\1" * filters
        if kind == 3 and self._step == "respond":
            topic_bytes = int.from_bytes(body[:2])
            return b"\x40\2" + body[2 + topic_bytes : 4 + topic_bytes]
        return b"\xd0\0" if kind == 12 else b""

    def close(self) -> None:
        self._step = "connect"
        self.go_on.set()
        for each in (self._door, *self._clients):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join()


@pytest.fixture
def silent() -> Iterator[Callable[[Step], SilentBroker]]:
    started: list[SilentBroker] = []

    def start(step: Step) -> SilentBroker:
        started.append(SilentBroker(step))
        return started[-1]

    yield start
    for broker in started:
        broker.close()


@pytest.mark.parametrize("step", ["connect", "subscribe", "publish", "respond"])
def test_every_command_ends_at_a_broker_that_goes_silent(silent: Callable[[Step], SilentBroker], step: Step) -> None:
    url = f"mqtt://127.0.0.1:{silent(step).port}"
    for words in COMMANDS:
        ended = command(*words, "--timeout", "0.5", "--broker", url)
        assert (ended.returncode, ended.stdout) == (3, ""), (words, ended)
        assert "Traceback" not in ended.stderr, words
        assert url in ended.stderr or str(SPEECH) in ended.stderr, (words, ended)
        assert ended.stderr.rstrip().endswith((".", "?")), (words, ended)


def test_every_command_ends_at_a_port_that_answers_no_tls(silent: Callable[[Step], SilentBroker]) -> None:
    url = f"mqtts://127.0.0.1:{silent('connect').port}"
    for words in (COMMANDS[0], COMMANDS[-1]):
        ended = command(*words, "--timeout", "0.5", "--broker", url)
        assert (ended.returncode, ended.stdout) == (3, ""), (words, ended)
        assert url in ended.stderr, (words, ended)


def test_doctor_goes_on_behind_servers_that_are_silent(silent: Callable[[Step], SilentBroker]) -> None:
    broker = silent("connect")
    queue = {
        "CESAR_QUEUE__ENGINE": "jetstream",
        "CESAR_QUEUE__JETSTREAM__URL": f"nats://127.0.0.1:{broker.port}",
    }
    ended = command("doctor", "--timeout", "1", "--broker", f"mqtt://127.0.0.1:{broker.port}", environ=queue)
    assert ended.returncode == 1, ended
    assert f"Nothing at mqtt://127.0.0.1:{broker.port} answered within 1 s" in ended.stdout
    assert "The queue does not answer" in ended.stdout
    assert "of a bundled recording were decoded" in ended.stdout


def test_a_broker_that_subscribes_slowly_is_not_taken_for_one_that_is_away(
    silent: Callable[[Step], SilentBroker],
) -> None:
    steps: tuple[tuple[Step, str], ...] = (("connect", "Nothing at "), ("subscribe", "accepted the connection"))
    for step, expected in steps:
        ended = command("jobs", "--timeout", "1", "--broker", f"mqtt://127.0.0.1:{silent(step).port}")
        assert expected in ended.stderr
        assert ("--timeout" in ended.stderr) == (step == "subscribe")
    away = command("jobs", "--timeout", "1", "--broker", f"mqtt://127.0.0.1:{find_free_port()}")
    assert "No broker at" in away.stderr


@pytest.mark.parametrize("step", ["starting", "subscribe"])
def test_a_command_without_a_time_limit_waits_for_a_broker_that_is_there(
    silent: Callable[[Step], SilentBroker], step: Step
) -> None:
    broker = silent(step)
    settings = BrokerSettings(url=f"mqtt://127.0.0.1:{broker.port}", protocol="3.1.1")
    later = threading.Timer(1.5, broker.go_on.set)
    with Session(settings, "test", [Subscription("a")]) as session:
        later.start()
        assert session.connect(0.5, retry_s=0.5, subscribe_s=PATIENCE_S).protocol == "3.1.1"
    later.join()
