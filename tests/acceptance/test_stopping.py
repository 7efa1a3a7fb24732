"""Stops, kills and restarts: no accepted job is lost, and every producer gets a final status."""

import contextlib
import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tinydb import TinyDB

from tests.acceptance.harness import LONG, PATIENCE_S, SPOKEN, Bus, Consumer, words
from tests.conftest import Mosquitto, StartMosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


def submit_and_wait_for_start(consumer: Consumer, bus: Bus, *, upload: bool = False) -> None:
    """Submit a long job, and two short ones behind it; return while the long one runs."""
    if upload:
        bus.publish("cesar/audio/long", LONG.read_bytes())
    else:
        bus.publish("cesar/jobs", {"job_id": "long", "audio_path": LONG.name, "beam_size": 1})
    bus.publish("cesar/jobs", {"job_id": "next", "audio_path": "speech.wav"})
    bus.publish("cesar/jobs", {"job_id": "last", "audio_path": "speech.wav"})
    bus.status("last", "queued")
    bus.status("long", "processing")
    assert consumer.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_mid_job_finishes_it_and_keeps_the_rest_queued(
    number: int, mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus)

    consumer.signal(number)
    assert consumer.wait() == 0

    late = join(mosquitto.port)
    assert late.status("long", "completed", "queued", "processing")["status"] == "completed"
    assert late.wait("cesar/status/next")["status"] == "queued"
    assert late.wait("cesar/status/last")["status"] == "queued"
    assert late.wait("cesar/consumer/cesar/state") == {"state": "offline"}
    assert [m.topic for m in bus.messages][-1] == "cesar/consumer/cesar/state", "after `offline` nothing more comes"
    assert any(queue["activity"] == "draining" for queue in bus.seen("cesar/consumer/cesar/queue"))
    assert not (consumer.data_dir / "ledger.json.journal").exists()
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        states = {job["job_id"]: job["state"] for job in stock.table("jobs")}
    assert states == {"long": "completed", "next": "queued", "last": "queued"}


def test_a_stop_during_a_burst_publishes_every_status_then_offline_and_then_disconnects(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    for number in range(300):
        bus.publish("cesar/jobs", {"job_id": f"burst-{number:03}", "audio_path": "missing.wav"})

    assert consumer.stop() == 0

    assert mosquitto.wait_logged("Received DISCONNECT from cesar")
    packets = [line for line in mosquitto.log if " from cesar" in line or "Sending PUBACK to cesar (" in line]
    offline = max(number for number, line in enumerate(packets) if "'cesar/consumer/cesar/state'" in line)
    published = [line for line in packets[:offline] if "Received PUBLISH from cesar (d0, q1" in line]
    acknowledged = [line for line in packets[:offline] if "Sending PUBACK to cesar" in line]
    assert len(published) == len(acknowledged) > 300, "nothing was in flight when it published offline"
    assert "Sending PUBACK" in packets[offline + 1]
    assert "Received DISCONNECT" in packets[offline + 2], "so the broker does not send the last will"
    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        states = {job["job_id"]: job["state"] for job in stock.table("jobs")}
    late = join(mosquitto.port)
    late.settle()
    assert {status["job_id"]: status["status"] for status in late.every_status()} == states


def test_a_restart_continues_with_the_queued_jobs(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus)
    assert consumer.stop() == 0

    consumer.start()

    assert words(bus.status("next")["result_text"]) == SPOKEN
    assert words(bus.status("last")["result_text"]) == SPOKEN
    assert bus.status("next")["completed_at"] <= bus.status("last")["started_at"]
    assert bus.states("long") == ["queued", "processing", "completed"], "a completed job does not run again"


def test_jobs_published_while_the_consumer_was_away_run_when_it_is_back(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    assert consumer.stop() == 0

    for number in range(3):
        bus.publish("cesar/jobs", {"job_id": f"away-{number}", "audio_path": "speech.wav"})
    consumer.start()

    ended = [bus.status(f"away-{number}") for number in range(3)]
    assert [status["status"] for status in ended] == ["completed"] * 3
    starts = [status["started_at"] for status in ended]
    assert starts == sorted(starts)


@pytest.mark.parametrize(("second", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_requeues_the_job_and_ends_at_once(
    second: int, code: int, mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus, upload=True)

    consumer.signal(signal.SIGTERM)
    consumer.wait_for_log("a second signal stops at once")
    consumer.signal(second)
    assert consumer.wait() == code

    late = join(mosquitto.port)
    assert late.wait("cesar/status/long")["status"] == "queued"
    assert late.wait("cesar/consumer/cesar/state") == {"state": "offline"}
    consumer.start()
    ended = late.status("long")
    assert (ended["status"], ended["attempt"]) == ("completed", 2)
    assert ended["completed_at"] <= late.status("next")["started_at"], "it kept its place at the front"


def test_a_second_signal_ends_the_wait_for_a_broker_that_is_away(mosquitto: Mosquitto, serve: Serve) -> None:
    consumer = serve("--broker", mosquitto.url)
    mosquitto.kill()
    consumer.wait_for_log("Lost the connection")
    consumer.signal(signal.SIGTERM)
    consumer.signal(signal.SIGINT)
    assert consumer.wait() in {130, 143}, "two signals at once arrive in either order"


def test_a_broker_that_goes_away_during_the_stop_gets_the_final_status_at_the_next_start(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join
) -> None:
    mosquitto = start_mosquitto(persistence=True)
    consumer = serve("--broker", mosquitto.url)
    submit_and_wait_for_start(consumer, join(mosquitto.port))
    consumer.signal(signal.SIGTERM)
    consumer.wait_for_log("Stopping after the current job")
    mosquitto.kill()
    assert consumer.wait() == 69
    assert "has not acknowledged everything" in consumer.logged()

    mosquitto.start()
    consumer.start()

    ended = join(mosquitto.port).status("long")
    assert (ended["status"], ended["attempt"]) == ("completed", 1), (
        "the status is published, the job does not run again"
    )
    assert join(mosquitto.port).status("last")["status"] == "completed"


def test_a_closed_terminal_stops_the_consumer_as_a_signal_does(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url)
    consumer.signal(signal.SIGHUP)
    assert consumer.wait() == 0
    assert join(mosquitto.port).wait("cesar/consumer/cesar/state") == {"state": "offline"}
    assert "Stopped; jobs in the queue: 0" in consumer.logged()


def test_the_drain_timeout_bounds_the_wait_for_the_current_job(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_WORKER__DRAIN_TIMEOUT": "0.2"})
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus)

    consumer.signal(signal.SIGTERM)

    assert consumer.wait() == 143
    assert join(mosquitto.port).wait("cesar/status/long")["status"] == "queued"


def test_a_consumer_killed_in_mid_job_starts_it_again_and_keeps_the_order(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus, upload=True)

    consumer.kill()
    bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "offline")  # the last will
    spool = consumer.data_dir / "spool"
    (spool / "orphan").write_bytes(b"RIFF")  # a crash between spool and ledger leaves such a file
    consumer.start()
    assert not (spool / "orphan").exists()

    ended = [bus.status(job_id) for job_id in ("long", "next", "last")]
    assert [status["status"] for status in ended] == ["completed"] * 3
    assert [status["attempt"] for status in ended] == [2, 1, 1]
    assert ended[0]["completed_at"] <= ended[1]["started_at"]
    assert bus.states("long") == ["queued", "processing", "queued", "processing", "completed"]


def test_a_job_that_kills_the_process_ends_as_crashed_and_the_next_one_completes(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_WORKER__MAX_ATTEMPTS": "2"})
    bus = join(mosquitto.port)
    submit_and_wait_for_start(consumer, bus)

    consumer.kill()
    consumer.start()
    bus.wait("cesar/status/long", lambda status: status["status"] == "processing" and status["attempt"] == 2)
    consumer.kill()
    consumer.start()

    ended = bus.status("long")
    assert (ended["status"], ended["error_code"], ended["retryable"]) == ("error", "crashed", True)
    assert bus.status("next")["status"] == "completed"


def test_a_second_consumer_on_the_same_ledger_ends_with_75(mosquitto: Mosquitto, serve: Serve) -> None:
    first = serve("--broker", mosquitto.url)

    second = serve("--broker", mosquitto.url, "--name", "other", "--data-dir", str(first.data_dir), ready=None)

    assert second.wait() == 75
    assert "in use by another consumer" in second.logged()
    assert first.stop() == 0


def test_the_ledger_of_a_running_consumer_opens_in_stock_tinydb(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "one", "audio_path": "speech.wav"})
    bus.status("one")
    assert consumer.stop() == 0
    consumer.start()
    bus.publish("cesar/jobs", {"job_id": "two", "audio_path": "speech.wav"})
    bus.status("two")

    with TinyDB(consumer.data_dir / "ledger.json", access_mode="r") as stock:
        jobs = {job["job_id"] for job in stock.table("jobs")}
    assert jobs == {"one"}, "the checkpoint; later changes are in the journal"
    journal = (consumer.data_dir / "ledger.json.journal").read_text()
    assert json.dumps("two") in journal


def test_systemd_is_notified_of_the_start_of_each_second_and_of_the_stop(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.closing(manager):
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "20000000"}
        consumer = serve("--broker", mosquitto.url, environ=environ)
        assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"WATCHDOG=1"
        submit_and_wait_for_start(consumer, join(mosquitto.port))
        consumer.signal(signal.SIGTERM)
        states = [manager.recv(100)]
        while states[-1] != b"STOPPING=1":
            states.append(manager.recv(100))
        assert set(states) <= {b"WATCHDOG=1", b"STOPPING=1"}
        assert manager.recv(100) == b"WATCHDOG=1", "the current job may take longer than the watchdog waits"
        assert consumer.wait() == 0
