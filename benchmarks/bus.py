"""The way over the bus beside a bare paho client that does the least a consumer could do, on the same mosquitto."""

import json
import multiprocessing
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from benchmarks.table import Row, median
from cesar_mqtt.config import BrokerSettings
from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.intake import Intake
from cesar_mqtt.consumer.publisher import Publisher
from cesar_mqtt.jobs import AudioSource, NewJob, Result
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.mqtt.client import MqttClient
from cesar_mqtt.mqtt.messages import Subscription
from cesar_mqtt.protocol.response_topics import ResponseTopics
from cesar_mqtt.protocol.topics import Topics

if TYPE_CHECKING:
    from cesar_mqtt.consumer.commands import CommandHandlers

BURST = 20_000
ROUNDS = 3
FINISHED = 2000
PROBES = 300
PATIENCE_S = 120.0
_FEW = 50
_RESULT = Result("Hello.", 2.5, "en", 0.9, no_speech=False)
_V5 = MQTTProtocolVersion.MQTTv5
_STATUS = b'{"status": "queued"}' + b" " * 600  # as long as ours


@dataclass(frozen=True)
class _Pace:
    """How fast a contender took the burst, and what of the processor it took for that, which others do not disturb."""

    jobs_a_second: float
    us_a_job: float


class _Stopwatch:
    """Started when the burst may begin."""

    def __init__(self) -> None:
        self._used = self._processor_s()
        self._started = time.perf_counter()

    def pace(self) -> _Pace:
        took_s, used_s = time.perf_counter() - self._started, self._processor_s() - self._used
        return _Pace(BURST / took_s, used_s / BURST * 1e6)

    @staticmethod
    def _processor_s() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime


@contextmanager
def _mosquitto(folder: Path) -> Iterator[int]:
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        raise SystemExit("mosquitto is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nset_tcp_nodelay true\n")
    process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        _wait_for_port(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _wait_for_port(port: int) -> None:
    pause = threading.Event()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        pause.wait(0.05)
    raise SystemExit("mosquitto did not start")


def _session() -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = 3600
    return properties


def _connect(port: int, client_id: str, *, persistent: bool = False) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=_V5, manual_ack=persistent)
    client.connect("127.0.0.1", port, clean_start=not persistent, properties=_session() if persistent else None)
    return client


def _publish_burst(port: int) -> None:
    """Leave the burst at the broker for those who are away."""
    client = _connect(port, "producer")
    client.loop_start()
    sent = [
        client.publish("cesar/jobs", json.dumps({"job_id": f"job-{n}", "audio_path": "porch.wav"}), qos=1)
        for n in range(BURST)
    ]
    sent[-1].wait_for_publish(PATIENCE_S)
    client.disconnect()
    client.loop_stop()


# -- the two contenders, each in its own process: leave a session, wait for the word, take the burst ------------------


def _bare(port: int, _folder: Path, pipe: Connection) -> None:
    done = threading.Event()
    acknowledged = 0

    def on_message(client: Client, _userdata: object, message: MQTTMessage) -> None:
        job_id = json.loads(message.payload)["job_id"]
        client.ack(message.mid, message.qos)
        client.publish(f"cesar/status/{job_id}", _STATUS, qos=1, retain=True)

    def on_publish(*_: object) -> None:
        nonlocal acknowledged
        acknowledged += 1
        if acknowledged == BURST:
            done.set()

    client = _connect(port, "bare", persistent=True)
    subscribed = threading.Event()
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe("cesar/jobs", qos=1)
    client.loop_start()
    subscribed.wait(PATIENCE_S)
    client.disconnect()
    client.loop_stop()
    client = _connect(port, "bare", persistent=True)
    client.on_message, client.on_publish = on_message, on_publish
    pipe.send("away")
    pipe.recv()
    watch = _Stopwatch()
    client.loop_start()
    done.wait(PATIENCE_S)
    pipe.send(watch.pace())
    client.disconnect()
    client.loop_stop()


class _Models:
    def default_name(self) -> str:
        return "tiny.en"

    def language_for(self, _name: str) -> None:
        return None

    def is_allowed(self, _name: str) -> bool:
        return True

    def explain_unknown(self, name: str) -> str:
        raise NotImplementedError(name)


class _NoCommands:
    def handle(self, _command: str, _payload: bytes) -> None:
        raise NotImplementedError


def _intake(port: int, folder: Path) -> tuple[MqttClient, Ledger, Publisher, Intake]:
    """Everything of the consumer but its worker: what is measured is acceptance."""
    topics = Topics("cesar", "cesar")
    ledger = Ledger(folder / "ledger.json", max_queued=BURST + 1)
    client = MqttClient(
        BrokerSettings(url=f"mqtt://127.0.0.1:{port}"),
        client_id="cesar",
        persistent=True,
        subscriptions=(Subscription(topics.jobs),),
    )
    publisher = Publisher(client, ledger, topics)
    client.on_connected = lambda info: publisher.on_connected(
        session_present=info.session_present, max_packet_bytes=info.max_packet_bytes
    )
    client.on_published = lambda ticket, _reason: publisher.on_published(ticket)
    intake = Intake(
        client,
        ledger,
        spool=Spool(folder / "spool"),
        topics=topics,
        models=_Models(),
        commands=cast("CommandHandlers", _NoCommands()),
        response_topics=ResponseTopics(topics, discovery_prefix="homeassistant"),
        max_payload_bytes=1 << 20,
        events=JobEvents(publisher),
        publisher=publisher,
    )
    return client, ledger, publisher, intake


def _leave_session(port: int) -> None:
    client = MqttClient(
        BrokerSettings(url=f"mqtt://127.0.0.1:{port}"),
        client_id="cesar",
        persistent=True,
        subscriptions=(Subscription("cesar/jobs"),),
    )
    client.start()
    client.wait_connected(PATIENCE_S)
    client.close()


def _ours(port: int, folder: Path, pipe: Connection) -> None:
    _leave_session(port)
    client, ledger, publisher, intake = _intake(port, folder)
    pipe.send("away")
    pipe.recv()
    watch = _Stopwatch()
    publisher.start()
    intake.start()
    client.start()
    pause = threading.Event()
    while ledger.totals().queued < BURST:
        pause.wait(0.005)
    publisher.drain(PATIENCE_S)
    pipe.send(watch.pace())
    client.close()
    intake.stop()
    publisher.stop()
    ledger.close()


def _burst(folder: Path, contender: str) -> _Pace:
    """Let one contender take the burst."""
    target = {"bare": _bare, "ours": _ours}[contender]
    folder.mkdir()
    with _mosquitto(folder) as port:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=target, args=(port, folder, there))
        process.start()
        here.recv()
        _publish_burst(port)
        here.send("go")
        pace: _Pace = here.recv()
        process.join(PATIENCE_S)
    return pace


def _round_trips(port: int, topic: str, answers: str) -> float:
    """Median seconds from a PUBLISH to what it brings about at a subscriber, each after the one before."""
    arrived = threading.Event()
    reader, writer = _connect(port, f"reader-{topic[-4:]}"), _connect(port, f"writer-{topic[-4:]}")
    subscribed = threading.Event()
    reader.on_subscribe = lambda *_: subscribed.set()
    reader.on_message = lambda _client, _userdata, message: arrived.set() if b"queued" in message.payload else None
    reader.subscribe(answers, qos=1)
    reader.loop_start()
    writer.loop_start()
    subscribed.wait(PATIENCE_S)
    took = []
    for number in range(PROBES):
        arrived.clear()
        body = json.dumps({"job_id": f"{topic[-4:]}-{number}", "audio_path": "porch.wav"})
        started = time.perf_counter()
        writer.publish(topic, body, qos=1)
        arrived.wait(PATIENCE_S)
        took.append(time.perf_counter() - started)
    for client in (reader, writer):
        client.disconnect()
        client.loop_stop()
    return median(took)


def _echo(port: int, ready: threading.Event) -> Client:
    client = _connect(port, "echo")

    def on_message(client: Client, _userdata: object, message: MQTTMessage) -> None:
        job_id = json.loads(message.payload)["job_id"]
        client.publish(f"echo/status/{job_id}", _STATUS, qos=1, retain=True)

    client.on_message = on_message
    client.on_subscribe = lambda *_: ready.set()
    client.subscribe("echo/jobs", qos=1)
    client.loop_start()
    return client


def _latencies(folder: Path) -> tuple[float, float]:
    """Median seconds from PUBLISH to the retained answer: ours, and that of a bare echo client."""
    folder.mkdir()
    with _mosquitto(folder) as port:
        client, ledger, publisher, intake = _intake(port, folder)
        publisher.start()
        intake.start()
        client.start()
        client.wait_connected(PATIENCE_S)
        ready = threading.Event()
        echo = _echo(port, ready)
        ready.wait(PATIENCE_S)
        ours = _round_trips(port, "cesar/jobs", "cesar/status/#")
        bare = _round_trips(port, "echo/jobs", "echo/status/#")
        echo.disconnect()
        echo.loop_stop()
        client.close()
        intake.stop()
        publisher.stop()
        ledger.close()
    return ours, bare


def _statuses_a_finished_job(folder: Path) -> tuple[float, float]:
    """Finish jobs of a long queue; statuses published for each of them, and jobs a second.

    A transcriber that takes no time stands in for the model: what is counted is the cost of the queue.
    """
    folder.mkdir()
    with _mosquitto(folder) as port:
        client, ledger, publisher, intake = _intake(port, folder)
        ledger.append([_job(number) for number in range(BURST)])
        received = 0

        def on_message(*_: object) -> None:
            nonlocal received
            received += 1

        publisher.start()
        client.start()
        publisher.drain(PATIENCE_S)
        reader = _connect(port, "reader")
        subscribed = threading.Event()
        reader.on_subscribe = lambda *_: subscribed.set()
        reader.on_message = on_message
        reader.loop_start()
        reader.subscribe("cesar/status/#", options=SubscribeOptions(qos=1, retainHandling=2))
        subscribed.wait(PATIENCE_S)
        started = time.perf_counter()
        pause = threading.Event()
        for _ in range(FINISHED):
            job = ledger.claim()
            assert job is not None
            ledger.complete(job.seq, _RESULT)
            while ledger.has_unpublished and publisher.in_flight > _FEW:  # so that no status is superseded unpublished
                pause.wait(0.001)
        publisher.drain(PATIENCE_S)
        pace = FINISHED / (time.perf_counter() - started)
        _wait_until_quiet(lambda: received)
        reader.disconnect()
        reader.loop_stop()
        client.close()
        intake.stop()
        publisher.stop()
        ledger.close()
    return received / FINISHED, pace


def _job(number: int) -> NewJob:
    return NewJob(f"job-{number}", f"{number}", AudioSource("path", "porch.wav"), "tiny.en")


def _wait_until_quiet(count: Callable[[], int]) -> None:
    pause, before = threading.Event(), -1
    while before != count():
        before = count()
        pause.wait(0.5)


def run(folder: Path) -> list[Row]:
    paces: dict[str, list[_Pace]] = {"bare": [], "ours": []}
    for number in range(ROUNDS):
        for contender, measured in paces.items():
            measured.append(_burst(folder / f"{contender}-{number}", contender))
    bare, ours = (median([pace.jobs_a_second for pace in measured]) for measured in paces.values())
    bare_us, ours_us = (median([pace.us_a_job for pace in measured]) for measured in paces.values())
    ours_s, bare_s = _latencies(folder / "latency")
    statuses, finished_a_second = _statuses_a_finished_job(folder / "queue")
    return [
        Row("a bare paho client: receive, acknowledge, publish one retained", bare, "/s"),
        Row(
            f"a burst of {BURST} jobs: accepted a second, over the bare client",
            ours / bare,
            at_least=0.7,
            beside=f"{ours:.0f} against {bare:.0f} jobs/s; {ours_us:.0f} against {bare_us:.0f} us of a processor a job",
        ),
        Row(
            "PUBLISH to retained `queued`, median, over a bare echo client",
            ours_s / bare_s,
            at_most=3.0,
            beside=f"{ours_s * 1000:.2f} against {bare_s * 1000:.2f} ms",
        ),
        Row(
            f"{BURST} queued jobs: statuses for each finished job",
            statuses,
            at_most=3.0,
            beside=f"{FINISHED} jobs finished, {finished_a_second:.0f} a second; version 1 published 11.6",
        ),
    ]
