"""What the broker retains comes to agree with the ledger, and the consumer notices what it cannot fix by itself."""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cesar_mqtt.config import BrokerSettings, Settings
from cesar_mqtt.consumer.worker import Worker
from cesar_mqtt.errors import ThreadDiedError
from cesar_mqtt.monitoring.signals import StopSignals
from cesar_mqtt.service import Service
from tests.acceptance.harness import LONG, PATIENCE_S, SPEECH, SPOKEN, Bus, Consumer, command, words
from tests.conftest import Mosquitto, StartMosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


def retained(join: Join, port: int, *job_ids: str) -> dict[str, str]:
    """The states that the broker retains, for a subscriber that comes now."""
    bus = join(port)
    bus.settle()
    return {s["job_id"]: s["status"] for s in bus.every_status() if s["job_id"] in job_ids}


def test_a_broker_that_is_killed_and_comes_back_with_old_messages_is_set_right(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join
) -> None:
    mosquitto = start_mosquitto(persistence=True)
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "saved", "audio_path": "speech.wav"})
    bus.status("saved")
    bus.close()
    mosquitto.restart()  # in order: it writes what it has to its file
    bus = join(mosquitto.port)
    bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
    bus.publish("cesar/jobs", {"job_id": "unsaved", "audio_path": "speech.wav"})
    bus.status("unsaved")
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["completed_total"] == 2)
    bus.close()

    mosquitto.restart(kill=True)  # it comes back with the session, and without what it has not saved

    late = join(mosquitto.port)
    assert late.status("unsaved")["status"] == "completed"
    assert late.status("saved")["status"] == "completed"


def test_a_broker_that_refused_a_status_is_told_it_when_it_may_take_it(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    access.write_text("topic readwrite cesar/jobs\ntopic readwrite cesar/consumer/#\ntopic read #\n")
    mosquitto = start_mosquitto(f"acl_file {access}", persistence=True)
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "a", "audio_path": "missing.wav"})
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["error_total"] == 1)
    consumer.wait_for_log("refused a message on cesar/status/a")
    bus.close()
    access.write_text("topic readwrite #\n")
    mosquitto.restart()
    assert join(mosquitto.port).status("a", "error")["error_code"] == "audio_not_found"


def test_a_job_deleted_by_retention_leaves_nothing_at_the_broker(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url, environ={"CESAR_RETENTION__MAX_FINISHED": "1"})
    bus = join(mosquitto.port)
    cleared = threading.Event()
    bus.on_cleared = cleared.set
    for job_id in ("old", "new"):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": "speech.wav"})
    bus.status("new")
    assert cleared.wait(PATIENCE_S)
    assert retained(join, mosquitto.port, "old", "new") == {"new": "completed"}


def test_without_an_id_a_redelivered_request_makes_no_second_job(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/audio/long", LONG.read_bytes())
    bus.status("long", "processing")
    for _ in range(10):
        for number in range(3):
            bus.publish("cesar/jobs", {"audio_path": "speech.wav", "metadata": {"number": number}})
        consumer.kill()
        consumer.start()
    bus.publish("cesar/jobs", {"job_id": "end", "audio_path": "speech.wav"})
    bus.wait("cesar/status/end")
    assert consumer.stop() == 0

    exported = command("ledger", "export", "--data-dir", str(consumer.data_dir))
    jobs = [json.loads(line) for line in exported.stdout.splitlines()]
    numbers = [job["metadata"]["number"] for job in jobs if "metadata" in job]
    assert numbers == [0, 1, 2] * 10, "each message once, in order, also the same one sent on purpose again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that can be filled up."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_acceptance_and_nothing_else_and_room_lets_it_go_on(
    small_disk: Path, mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    data = small_disk / "data"
    consumer = serve("--broker", mosquitto.url, "--data-dir", str(data))
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "before", "audio_path": "speech.wav"})
    bus.status("before")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass

    for number in range(3):  # their audio does not fit any more
        bus.publish(f"cesar/audio/during-{number}", SPEECH.read_bytes())
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "degraded")
    consumer.wait_for_log("has too little room")
    assert bus.seen("cesar/status/during-0") == [], "nothing is said to be accepted"

    filler.unlink()
    for number in range(3):
        assert words(bus.status(f"during-{number}")["result_text"]) == SPOKEN
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "idle" and queue["completed_total"] == 4)
    assert consumer.stop() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_ends_the_consumer_for_its_supervisor(
    mosquitto: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, join: Join
) -> None:
    def die(_worker: Worker) -> bool:
        raise SystemExit  # ends a thread without a word

    monkeypatch.setattr(Worker, "run_once", die)
    settings = Settings(data_dir=tmp_path / "data", broker=BrokerSettings(url=mosquitto.url))
    service = Service(settings, directory=tmp_path)
    bus = join(mosquitto.port)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            service.run(StopSignals())
        except ThreadDiedError as exc:
            ended.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
    bus.publish("cesar/jobs", "speech.wav")
    thread.join(PATIENCE_S)
    assert [str(exc) for exc in ended] == [
        "The worker thread ended unexpectedly. See the log for the reason, and start the consumer again."
    ]
    assert join(mosquitto.port).wait("cesar/consumer/cesar/state") == {"state": "offline"}


def test_two_consumers_of_one_name_are_told_from_a_bad_network(mosquitto: Mosquitto, serve: Serve) -> None:
    first = serve("--broker", mosquitto.url, name="first")
    second = serve("--broker", mosquitto.url, name="second")
    for consumer in (first, second):
        consumer.wait_for_log("other client")


def all_retained(broker: Mosquitto) -> list[str]:
    """Every topic on which the broker retains something."""
    late = Bus(broker.port, topic_filter="#")
    late.settle()
    late.leave()
    return sorted(message.topic for message in late.messages if message.retain)


def test_what_an_earlier_prefix_and_an_earlier_name_left_is_removed_on_request(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    bus = join(mosquitto.port)
    consumer = serve("--broker", mosquitto.url)
    bus.publish("cesar/jobs", {"job_id": "done", "audio_path": "speech.wav", "formats": ["txt", "srt"]})
    bus.status("done")
    bus.publish("cesar/request/pause", "")
    bus.publish("cesar/jobs", {"job_id": "waits", "audio_path": "speech.wav"})
    bus.status("waits", "queued")
    consumer.stop()
    assert "discovery remove" not in consumer.logged()
    bus.leave()
    other = join(mosquitto.port)
    foreign = {"job_id": "foreign", "status": "queued", "consumer": "other"}
    other.publish("cesar/status/foreign", foreign, retain=True)
    other.publish("cesar/result/foreign/txt", "theirs", retain=True)
    other.publish("cesar/consumer/other/state", {"state": "offline"}, retain=True)
    other.leave()
    theirs = ["cesar/consumer/other/state", "cesar/result/foreign/txt", "cesar/status/foreign"]

    flags = ("--broker", mosquitto.url, "--data-dir", str(consumer.data_dir))
    kitchen = ("--topic-prefix", "voice", "--name", "kitchen")
    for more in (("--topic-prefix", "voice"), kitchen):
        renamed = serve("--broker", mosquitto.url, *more)
        voice = join(mosquitto.port, topic_filter="voice/#")
        voice.wait("voice/status/waits")
        voice.leave()
        assert "the consumer 'cesar' below cesar/" in renamed.logged()
        if more != kitchen:
            renamed.stop()

    assert {"cesar/status/waits", "cesar/status/done", "cesar/result/done/srt"} <= set(all_retained(mosquitto))
    plain = command("discovery", "remove", "--name", "cesar", *flags)
    assert plain.returncode == 0
    assert "cesar/status/waits" in all_retained(mosquitto), "only the announcements"
    done = command("discovery", "remove", "--all", *flags, *kitchen)
    assert (done.returncode, done.stderr) == (
        0,
        "cesar-mqtt: The consumer 'kitchen' below voice/ is running: its topics stay.\n",
    )
    assert "removed cesar/result/done/srt" in done.stdout
    rest = all_retained(mosquitto)
    assert [topic for topic in rest if topic.startswith("cesar/")] == theirs
    assert [topic for topic in rest if "/consumer/cesar/" in topic] == []
    assert {"voice/status/waits", "voice/status/done", "voice/consumer/kitchen/state"} <= set(rest)
    assert [topic for topic in rest if topic.startswith("homeassistant/")] == [
        "homeassistant/device/cesar-mqtt_kitchen/config"
    ]

    renamed.stop()
    read = len(renamed.logged())
    renamed.start()
    assert "discovery remove" not in renamed.logged()[read:]
    renamed.stop()
    assert command("discovery", "remove", "--all", *flags, *kitchen).returncode == 0
    assert all_retained(mosquitto) == theirs
    assert "there is nothing to remove" in command("discovery", "remove", "--all", *flags, *kitchen).stdout
