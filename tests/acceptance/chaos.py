"""Kill the consumer and the broker at random moments, cut connections and let the disk fail while jobs come in.

Afterwards everything must be right. Some jobs have a higher priority, and preempt those recordings that have several
windows.

A short run is part of `make test`; `make soak` is a long one (`python -m tests.acceptance.chaos --help`).
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from paho.mqtt.client import Client, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from tinydb import TinyDB

from cesar_mqtt.errors import ExitCode
from tests import broken_disk
from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, repeated_long, words
from tests.conftest import Mosquitto
from tests.proxy import Proxy

SPEECH_EVERY = 10
"""One job in so many is real speech, which takes half a second; the others are short noise, which takes hardly any."""
NAMELESS_EVERY = 5
"""Two jobs in so many have no id: one is known by its metadata, one asks for the same as all others of its kind."""
URGENT_EVERY = 7
"""One job in so many has a higher priority, if it has an id."""
TALK_EVERY = 50
"""One job in so many is a recording with several windows."""
NAMELESS = "nameless"
PATIENCE_S = 300.0


# Else the consumer would wait longer after each failure, for minutes.
IMPATIENT = """
from cesar_mqtt.consumer import intake, worker
from cesar_mqtt.mqtt import client
client._FIRST_RETRY_S, client._MAX_RETRY_S = 0.1, 0.5
intake._RETRY_FIRST_S, intake._RETRY_MOST_S = 0.1, 0.5
worker._DISK_RETRY_S, worker._DEFER_FACTOR, worker._MAX_DEFER_S = 0.2, 1.5, 2.0
"""


@dataclass(frozen=True)
class Plan:
    """What happens during a run.

    Attributes:
        kills: how often the consumer is killed.
        broker_restarts: how often the broker is stopped in order, and started again.
        broker_kills: how often the broker is killed, and started again from what it had saved last.
        cuts: how many connections of the consumer end within a packet; 0: there is no proxy.
        one_in: one system call in so many on ledger, spool and audio fails; 0: none does.
    """

    jobs: int
    kills: int
    broker_restarts: int = 0
    broker_kills: int = 0
    cuts: int = 0
    one_in: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What went wrong, by the names of the jobs; empty is right."""

    plan: Plan
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    out_of_order: tuple[str, ...]
    disagreeing: tuple[str, ...]
    falsely_completed: tuple[str, ...]
    """Jobs whose transcript is not that of their recording, or has a warning."""
    ends: tuple[str, ...]
    """How the jobs ended that are not completed: state, error code and message, attempts."""
    exits: tuple[str, ...]
    """Why the consumer ended by itself, except for a disk that failed while it opened its files."""
    attempts: int
    preemptions: int
    retries: int
    disk_exits: int
    """How often it ended for that reason, and was started again."""

    @property
    def wrong(self) -> int:
        return sum(len(getattr(self, name)) for name in FAULTS)


FAULTS = ("lost", "duplicated", "out_of_order", "disagreeing", "falsely_completed", "exits")


def _noise(path: Path) -> None:
    samples = np.random.default_rng(0).normal(scale=30, size=8000).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())


def _name(number: int) -> str:
    nameless = number % NAMELESS_EVERY == 1
    return NAMELESS if nameless else f"chaos-{number:05}"


def _is_talk(number: int) -> bool:
    return number % TALK_EVERY == 22  # one that has an id


def _priority(number: int) -> int:
    return 0 if number % URGENT_EVERY or _is_talk(number) else number % 9 + 1


def _named(row: Mapping[str, Any]) -> str:
    """Find the name of a job in the ledger."""
    given = str(row["job_id"])
    return given if given.startswith("chaos-") else str(row.get("metadata", {}).get("name", NAMELESS))


class Producer:
    """Publishes all jobs, at a steady pace, through every loss of its connection.

    Behind a recording with several windows it waits until that is running, so that the next urgent job preempts it.

    At QoS 2, so that there is each of them once: at QoS 1, what it sends again is another message to the broker. The
    consumer gets them at QoS 1. One at a time: between TCP connection and CONNACK, paho 2.1 sends a new message before
    those that it has queued.
    """

    def __init__(self, port: int, jobs: int, pause_s: float, watcher: Bus) -> None:
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="producer", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._jobs = jobs
        self._pause_s = pause_s
        self._watcher = watcher
        self._held = threading.Lock()
        self._sent: list[MQTTMessageInfo] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = threading.Event()
        for number in range(self._jobs):
            name = _name(number)
            self._wait_until_published(self._sent[-1:])
            with self._held:
                self._sent.append(self._publish(number, name))
            if _is_talk(number):
                self._watcher.wait(f"cesar/status/{name}", lambda status: status["status"] != "queued", PATIENCE_S)
            pause.wait(self._pause_s)
        self._wait_until_published(self._sent)

    def _publish(self, number: int, name: str) -> MQTTMessageInfo:
        if number % SPEECH_EVERY == 0:
            return self._client.publish(f"cesar/audio/{name}", SPEECH.read_bytes(), qos=2)
        request: dict[str, Any] = {}
        if number % NAMELESS_EVERY > 1:
            request = {"job_id": name, "audio_path": "talk.wav" if _is_talk(number) else "noise.wav"}
            request |= {"priority": _priority(number)} if _priority(number) else {}
        else:
            request = {"audio_path": "noise.wav", "metadata": {} if name == NAMELESS else {"name": name}}
        return self._client.publish("cesar/jobs", json.dumps(request), qos=2)

    def _wait_until_published(self, messages: Sequence[MQTTMessageInfo]) -> None:
        for sent in messages:
            # It is "not connected" if it was queued between two connections, which is no failure.
            sent.rc = MQTTErrorCode.MQTT_ERR_SUCCESS
            sent.wait_for_publish(PATIENCE_S)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Publish nothing meanwhile; everything that was published is accepted, or a broker that is killed loses it."""
        with self._held:
            self._wait_until_published(self._sent)
            deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
            while len({status["job_id"] for status in self._watcher.every_status()}) < len(self._sent):
                if time.monotonic() > deadline:
                    raise RuntimeError("not every job was accepted")
                pause.wait(0.1)
            while not self._has_settled():
                pause.wait(0.1)
            yield

    def _has_settled(self) -> bool:
        with suppress(RuntimeError):  # it is not connected yet, after a restart of the broker
            self._watcher.settle()
            return True
        return False

    def finish(self) -> None:
        self._thread.join(PATIENCE_S)
        self._client.disconnect()
        self._client.loop_stop()


class Supervisor:
    """Starts the consumer again whenever it has ended by itself, as systemd does.

    Attributes:
        consumer: the one that is started again.
        codes: with which codes it has ended.
    """

    def __init__(self, consumer: Consumer) -> None:
        self.codes: Counter[int] = Counter()
        self.consumer = consumer
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            with self._lock:
                code = self.consumer.process.poll()
                if code is not None:
                    self.codes[code] += 1
                    self.consumer.start(ready=None)

    def kill(self) -> int:
        """Kill the consumer and start it again; return how much of its log was written before."""
        with self._lock:
            self.consumer.process.send_signal(signal.SIGKILL)
            self.consumer.process.wait()
            read = len(self.consumer.logged())
            self.consumer.start(ready=None)
        return read

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def run(folder: Path, mosquitto: Mosquitto, plan: Plan) -> Report:
    """One run; everything that it starts has ended when it returns."""
    dice = random.Random(plan.seed)  # noqa: S311 - chance, no secret
    audio = folder / "audio"
    audio.mkdir()
    _noise(audio / "noise.wav")
    repeated_long(audio / "talk.wav", times=2)
    environ = {"CESAR_WORKER__MAX_ATTEMPTS": "100000", "CESAR_TRANSCRIBER__WINDOW": "30"}
    switch = folder / "broken"
    if plan.one_in:
        (folder / "sitecustomize.py").write_text(IMPATIENT)
        library = broken_disk.build_random(
            folder, writes=folder / "data", reads=audio, one_in=plan.one_in, seed=plan.seed
        )
        environ["LD_PRELOAD"] = str(library)
        environ |= {"CESAR_WORKER__RETRIES": "100000", "CESAR_WORKER__RETRY_DELAY": "0.2"}
        environ |= {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    with ExitStack() as stack:
        url = mosquitto.url
        if plan.cuts:
            url = stack.enter_context(closing(Proxy(mosquitto.port, dice, cuts=plan.cuts))).url
        consumer = Consumer(folder, "--broker", url, "--audio-dir", str(audio), environ=environ, ready="Connect")
        stack.callback(consumer.kill)
        watcher = Bus(mosquitto.port, client_id="watcher", protocol=MQTTProtocolVersion.MQTTv311)
        watcher.wait("cesar/consumer/cesar/queue")  # its session is there, from now on nothing is published in vain
        switch.touch()
        supervisor = Supervisor(consumer)
        stack.callback(supervisor.end)
        producer = Producer(mosquitto.port, plan.jobs, pause_s=0.1, watcher=watcher)
        _disturb(supervisor, producer, mosquitto, dice, plan)
        producer.finish()
        switch.unlink()
        _wait_until_all_are_final(mosquitto.port, plan.jobs)
        supervisor.end()
        code = consumer.stop()
    if code != 0:
        raise RuntimeError(f"the consumer ended with {code}:\n{consumer.logged()[-2000:]}")
    watcher.close()
    return _report(consumer, mosquitto.port, watcher, supervisor, plan)


def _disturb(
    supervisor: Supervisor,
    producer: Producer,
    mosquitto: Mosquitto,
    dice: random.Random,
    plan: Plan,
) -> None:
    pause = threading.Event()
    disturbances = ["kill"] * plan.kills + ["stop"] * plan.broker_restarts + ["kill broker"] * plan.broker_kills
    dice.shuffle(disturbances)
    for disturbance in disturbances:
        pause.wait(dice.uniform(0.0, 1.5))
        if disturbance == "stop":
            mosquitto.restart()
        elif disturbance == "kill broker":
            with producer.held():
                _save(mosquitto)
                pause.wait(dice.uniform(0.0, 0.3))  # what is published now is lost
                mosquitto.restart(kill=True)
        else:
            read = supervisor.kill()
            if dice.random() < 0.7:  # else it is killed while it is starting, recovering its ledger, or connecting
                _wait_for_connection(supervisor.consumer, read)


def _save(mosquitto: Mosquitto) -> None:
    """Have the broker write what it knows to its disk."""
    saved = mosquitto.folder / "mosquitto.db"
    before = saved.stat().st_ino if saved.exists() else None
    os.kill(mosquitto.pid, signal.SIGUSR1)
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while not saved.exists() or saved.stat().st_ino == before:
        if time.monotonic() > deadline:
            raise RuntimeError("mosquitto did not save")
        pause.wait(0.01)


def _wait_for_connection(consumer: Consumer, read: int) -> None:
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    while "Connected to " not in consumer.logged()[read:]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the consumer did not connect:\n{consumer.logged()[read:][-2000:]}")
        pause.wait(0.05)


def _wait_until_all_are_final(port: int, jobs: int) -> None:
    bus = Bus(port)
    deadline = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    try:
        while time.monotonic() < deadline:
            final = {s["job_id"] for s in bus.every_status() if s["status"] in {"completed", "error", "cancelled"}}
            if len(final) >= jobs:
                return
            pause.wait(0.2)
    finally:
        bus.close()


def _report(consumer: Consumer, port: int, watcher: Bus, supervisor: Supervisor, plan: Plan) -> Report:
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        ledger = sorted((document.doc_id, dict(document)) for document in stock.table("jobs"))
    rows = [document for _, document in ledger]
    names = [_named(row) for row in rows]
    expected = [_name(number) for number in range(plan.jobs)]
    completed = Counter(_named(row) for row in rows if row["state"] == "completed")
    retained = _retained(port)
    by_id = {row["job_id"]: row for row in rows}
    return Report(
        plan=plan,
        lost=tuple((Counter(expected) - completed).elements()),
        duplicated=tuple((Counter(names) - Counter(expected)).elements()) + _undone(watcher),
        out_of_order=tuple(i for i, j in zip(names, expected, strict=False) if i != j) + _overtaken(rows),
        disagreeing=tuple(i for i, row in by_id.items() if not _agrees(row, retained.get(i)))
        + tuple(i for i in retained if i not in by_id),
        falsely_completed=_falsely_completed(rows),
        ends=tuple(_end(row) for row in rows if row["state"] != "completed"),
        exits=tuple(str(code) for code in supervisor.codes.elements() if code != ExitCode.LEDGER_FAILED),
        attempts=sum(row["attempt"] for row in rows),
        preemptions=sum(row["attempt"] - 1 - row.get("crashes", 0) - row.get("retries", 0) for row in rows),
        retries=sum(row.get("retries", 0) for row in rows),
        disk_exits=supervisor.codes[ExitCode.LEDGER_FAILED],
    )


def _end(row: Mapping[str, Any]) -> str:
    details = (row["state"], row.get("error_code"), row.get("error_message"))
    reason = ", ".join(str(detail) for detail in details if detail is not None)
    return f"{row['job_id']} ({_named(row)}): {reason}, attempt {row['attempt']}, {row.get('retries', 0)} retries"


def _retained(port: int) -> dict[str, Mapping[str, Any]]:
    bus = Bus(port)
    bus.settle()
    statuses: dict[str, Mapping[str, Any]] = {status["job_id"]: status for status in bus.every_status()}
    bus.close()
    return statuses


def _agrees(row: Mapping[str, Any], status: Mapping[str, Any] | None) -> bool:
    return (
        status is not None
        and status["status"] == row["state"]
        and status["attempt"] == row["attempt"]
        and status["result_text"] == row.get("result_text")
    )


def _undone(watcher: Bus) -> tuple[str, ...]:
    """Jobs that were completed and were running again afterwards; a broker that was killed repeats older messages."""
    completed: dict[str, str] = {}
    for status in watcher.every_status():
        if status["status"] == "completed":
            completed[status["job_id"]] = status["updated_at"]
    return tuple(
        status["job_id"]
        for status in watcher.every_status()
        if status["status"] != "completed" and status["updated_at"] > completed.get(status["job_id"], "9")
    )


def _overtaken(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Jobs that ended before one of their priority that was accepted earlier, or started while a higher one waited.

    A job that was deferred after a temporary failure lets the others go first meanwhile, as it should.
    """
    by_priority: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("retries"):
            continue
        by_priority.setdefault(row.get("priority", 0), []).append(row)
    overtook = [
        later
        for equals in by_priority.values()
        for earlier, later in pairwise(equals)
        if later.get("started_at", 0.0) < earlier.get("completed_at", 0.0)
    ]
    for priority in by_priority.keys() - {0}:
        lower = [row for row in rows if row.get("priority", 0) < priority]
        for higher in by_priority[priority]:
            waited_until = higher.get("started_at", 0.0)
            overtook += [row for row in lower if higher["created_at"] < row.get("started_at", 0.0) < waited_until]
    return tuple(row["job_id"] for row in overtook)


def _falsely_completed(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    talks = Counter(row.get("result_text") for row in rows if row["audio"][1] == "talk.wav")
    (talk, _), *_ = talks.most_common(1) or [("", 0)]

    def is_right(row: Mapping[str, Any]) -> bool:
        text = str(row.get("result_text"))
        right = text == talk if row["audio"][1] == "talk.wav" else words(text) == _spoken(row)
        return right and not {"audio_truncated", "audio_damaged"} & set(row.get("warnings", ()))

    return tuple(row["job_id"] for row in rows if row["state"] == "completed" and not is_right(row))


def _spoken(row: Mapping[str, Any]) -> list[str]:
    return SPOKEN if row["audio"][0] == "spool" else []


def soak(plan: Plan) -> Report:
    """One run with a broker of its own."""
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-soak-") as name:
        folder = Path(name)
        mosquitto = Mosquitto(
            folder,
            ["persistence true", f"persistence_location {folder}/", "max_queued_messages 0"],
        )
        mosquitto.start()
        try:
            return run(folder, mosquitto, plan)
        finally:
            mosquitto.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50, help="of the consumer")
    parser.add_argument("--broker-kills", type=int, default=10)
    parser.add_argument("--broker-restarts", type=int, default=5)
    parser.add_argument("--cuts", type=int, default=100, help="connections that end within a packet; 0: none")
    parser.add_argument("--one-in", type=int, default=60, help="one system call in so many fails; 0: none")
    parser.add_argument("--hours", type=float, default=0.0, help="further runs until so much time has passed")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    started, wrong, number = time.monotonic(), 0, 0
    columns = ["seed", "jobs", "kills", "broker", "cuts", "attempts", "preempted", "retried", "exit 74", *FAULTS, "s"]
    print("  ".join(columns))
    while number == 0 or time.monotonic() - started < arguments.hours * 3600:
        plan = Plan(
            jobs=arguments.jobs,
            kills=arguments.kills,
            broker_restarts=arguments.broker_restarts,
            broker_kills=arguments.broker_kills,
            cuts=arguments.cuts,
            one_in=arguments.one_in,
            seed=arguments.seed + number,
        )
        began = time.monotonic()
        report = soak(plan)
        counts = [report.attempts, report.preemptions, report.retries, report.disk_exits]
        faults = [len(getattr(report, name)) for name in FAULTS]
        broker, took_s = plan.broker_kills + plan.broker_restarts, round(time.monotonic() - began)
        values = [
            plan.seed,
            plan.jobs,
            plan.kills,
            broker,
            plan.cuts,
            *counts,
            *faults,
            took_s,
        ]
        print("  ".join(f"{value:>{len(column)}}" for column, value in zip(columns, values, strict=True)), flush=True)
        for name in FAULTS:
            if found := getattr(report, name):
                print(f"{name}: {' '.join(found[:10])}", flush=True)
        for end in report.ends[:10]:
            print(end, flush=True)
        wrong += report.wrong
        number += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
