"""Kill the consumer at random moments and restart the broker while jobs come in; afterwards everything must be right.

Some jobs have a higher priority, and preempt those recordings that have several windows.

A short run is part of `make test`; `make soak` is a long one (`python -m tests.acceptance.chaos --help`).
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from tinydb import TinyDB

from tests.acceptance.harness import SPEECH, Bus, Consumer, repeated_long
from tests.conftest import Mosquitto

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


@dataclass(frozen=True)
class Report:
    """What went wrong, by the names of the jobs; empty is right."""

    jobs: int
    kills: int
    broker_restarts: int
    lost: tuple[str, ...]
    duplicated: tuple[str, ...]
    out_of_order: tuple[str, ...]
    disagreeing: tuple[str, ...]
    garbled: tuple[str, ...]
    """Recordings with several windows whose transcript is not that of the others."""
    attempts: int
    preemptions: int
    deferred: tuple[str, ...]
    """Jobs that got another attempt after a temporary failure, which no run causes on purpose; they are no fault."""

    @property
    def wrong(self) -> int:
        faults = (self.lost, self.duplicated, self.out_of_order, self.disagreeing, self.garbled)
        return sum(map(len, faults))


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
    consumer gets them at QoS 1.
    """

    def __init__(self, port: int, jobs: int, pause_s: float, watcher: Bus) -> None:
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="producer", clean_session=False)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._jobs = jobs
        self._pause_s = pause_s
        self._watcher = watcher
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = threading.Event()
        for number in range(self._jobs):
            name = _name(number)
            if number % SPEECH_EVERY == 0:
                sent = self._client.publish(f"cesar/audio/{name}", SPEECH.read_bytes(), qos=2)
            elif number % NAMELESS_EVERY > 1:
                request = {"job_id": name, "audio_path": "talk.wav" if _is_talk(number) else "noise.wav"}
                payload = json.dumps(request | ({"priority": _priority(number)} if _priority(number) else {}))
                sent = self._client.publish("cesar/jobs", payload, qos=2)
            else:
                metadata = {} if name == NAMELESS else {"name": name}
                payload = json.dumps({"audio_path": "noise.wav", "metadata": metadata})
                sent = self._client.publish("cesar/jobs", payload, qos=2)
            if _is_talk(number):
                self._watcher.wait(f"cesar/status/{name}", lambda status: status["status"] != "queued", PATIENCE_S)
            pause.wait(self._pause_s)
        # It is "not connected" if it was queued between two connections, which is no failure.
        sent.rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        sent.wait_for_publish(PATIENCE_S)

    def finish(self) -> None:
        self._thread.join(PATIENCE_S)
        self._client.disconnect()
        self._client.loop_stop()


def run(folder: Path, mosquitto: Mosquitto, *, jobs: int, kills: int, broker_restarts: int, seed: int) -> Report:
    """One run; everything that it starts has ended when it returns."""
    dice = random.Random(seed)  # noqa: S311 - chance, no secret
    audio = folder / "audio"
    audio.mkdir()
    _noise(audio / "noise.wav")
    repeated_long(audio / "talk.wav", times=2)
    consumer = Consumer(
        folder,
        "--broker",
        mosquitto.url,
        "--audio-dir",
        str(audio),
        environ={"CESAR_WORKER__MAX_ATTEMPTS": "100000", "CESAR_TRANSCRIBER__WINDOW": "30"},
    )
    watcher = Bus(mosquitto.port, client_id="watcher", protocol=MQTTProtocolVersion.MQTTv311)
    producer = Producer(mosquitto.port, jobs, pause_s=0.1, watcher=watcher)
    try:
        _disturb(consumer, mosquitto, dice, kills=kills, broker_restarts=broker_restarts)
        producer.finish()
        _wait_until_all_are_final(mosquitto.port, jobs)
        code = consumer.stop()
    finally:
        if consumer.process.poll() is None:
            consumer.kill()
    if code != 0:
        raise RuntimeError(f"the consumer ended with {code}:\n{consumer.logged()[-2000:]}")
    watcher.close()
    return _report(consumer, mosquitto.port, watcher, jobs, kills=kills, broker_restarts=broker_restarts)


def _disturb(
    consumer: Consumer, mosquitto: Mosquitto, dice: random.Random, *, kills: int, broker_restarts: int
) -> None:
    pause = threading.Event()
    disturbances = ["kill"] * kills + ["broker"] * broker_restarts
    dice.shuffle(disturbances)
    for disturbance in disturbances:
        pause.wait(dice.uniform(0.0, 1.5))
        if disturbance == "broker":
            mosquitto.restart()
        else:
            consumer.process.send_signal(signal.SIGKILL)
            consumer.process.wait()
            # Sometimes it is killed while it is starting, recovering its ledger, or connecting.
            consumer.start(ready=None if dice.random() < 0.3 else "Connected to ")


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


def _report(consumer: Consumer, port: int, watcher: Bus, jobs: int, *, kills: int, broker_restarts: int) -> Report:
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        ledger = sorted((document.doc_id, dict(document)) for document in stock.table("jobs"))
    rows = [document for _, document in ledger]
    names = [_named(row) for row in rows]
    expected = [_name(number) for number in range(jobs)]
    completed = Counter(_named(row) for row in rows if row["state"] == "completed")
    retained = _retained(port)
    by_id = {row["job_id"]: row for row in rows}
    return Report(
        jobs=jobs,
        kills=kills,
        broker_restarts=broker_restarts,
        lost=tuple((Counter(expected) - completed).elements()),
        duplicated=tuple((Counter(names) - Counter(expected)).elements()) + _undone(watcher),
        out_of_order=tuple(i for i, j in zip(names, expected, strict=False) if i != j) + _overtaken(rows),
        disagreeing=tuple(i for i, row in by_id.items() if not _agrees(row, retained.get(i)))
        + tuple(i for i in retained if i not in by_id),
        garbled=_garbled(rows),
        attempts=sum(row["attempt"] for row in rows),
        preemptions=sum(row["attempt"] - 1 - row.get("crashes", 0) - row.get("retries", 0) for row in rows),
        deferred=tuple(row["job_id"] for row in rows if row.get("retries")),
    )


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
    """Jobs that were seen completed, and in work again afterwards."""
    completed: set[str] = set()
    undone: list[str] = []
    for status in watcher.every_status():
        if status["job_id"] in completed and status["status"] != "completed":
            undone.append(status["job_id"])
        if status["status"] == "completed":
            completed.add(status["job_id"])
    return tuple(undone)


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


def _garbled(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    talks = [row for row in rows if row["audio"][1] == "talk.wav"]
    texts = Counter(row.get("result_text") for row in talks)
    return tuple(
        row["job_id"] for row in talks if [row.get("result_text")] != [text for text, _ in texts.most_common(1)]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--broker-restarts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cesar-mqtt-soak-") as name:
        folder = Path(name)
        mosquitto = Mosquitto(
            folder,
            ["persistence true", f"persistence_location {folder}/", "max_queued_messages 0"],
        )
        mosquitto.start()
        started = time.monotonic()
        try:
            report = run(
                folder,
                mosquitto,
                jobs=arguments.jobs,
                kills=arguments.kills,
                broker_restarts=arguments.broker_restarts,
                seed=arguments.seed,
            )
        finally:
            mosquitto.stop()
    print(f"seed {arguments.seed}: {report.jobs} jobs, {report.kills} kills, {report.broker_restarts} broker restarts,")
    print(f"{report.attempts} attempts, {report.preemptions} preemptions, {time.monotonic() - started:.0f} s")
    for name in ("lost", "duplicated", "out_of_order", "disagreeing", "garbled", "deferred"):
        found = getattr(report, name)
        print(f"{name:>14} {len(found):>5} {' '.join(found[:10])}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
