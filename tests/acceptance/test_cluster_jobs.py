"""Consumers that share one queue on a NATS server: a job from its request to its final status."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cesar_mqtt.errors import ExitCode
from tests.acceptance.harness import LONG, SPEECH, SPOKEN, Bus, Consumer, command, repeated_long, words
from tests.nats_server import NatsServer
from tests.recordings import tone, write_wav

pytestmark = pytest.mark.model

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]
READY = "The queue CESAR"


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    yield server
    server.close()


def test_a_job_and_an_upload_run_to_a_retained_completed(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    serve(environ=nats.environ("one"), ready=READY)
    bus.publish("cesar/jobs", {"job_id": "by-path", "audio_path": str(SPEECH)})
    bus.publish("cesar/audio/upload", SPEECH.read_bytes())
    assert words(bus.status("by-path", "completed")["result_text"]) == SPOKEN
    upload = bus.status("upload", "completed")
    assert (upload["consumer"], upload["attempt"]) == ("one", 1)
    assert bus.states("by-path") == bus.states("upload") == ["queued", "processing", "completed"]
    late = join(nats.mqtt_port, topic_filter="cesar/status/#")
    assert late.status("by-path")["status"] == "completed"


def test_a_recording_over_a_limit_is_rejected_with_what_to_do(
    nats: NatsServer, serve: Serve, join: Join, tmp_path: Path
) -> None:
    bus = join(nats.mqtt_port)
    serve(environ=nats.environ("one"), ready=READY)
    server_bytes = 1 << 20  # the default of max_payload
    bus.publish("cesar/audio/edge", bytes(server_bytes - 2000))
    assert "queue.jetstream.max_message_bytes" in bus.wait("cesar/rejected", lambda _: True)["detail"]
    large = tmp_path / "large.wav"
    write_wav(large, tone(server_bytes / 32_000, 16_000), 16_000)
    submitted = command("submit", str(large), "--broker", nats.mqtt_url)
    assert submitted.returncode == 1
    assert "max_payload" in submitted.stdout + submitted.stderr
    assert "--by-path" in submitted.stdout + submitted.stderr
    bus.publish("cesar/jobs", {"job_id": "behind", "audio_path": str(SPEECH)})
    assert words(bus.status("behind", "completed")["result_text"]) == SPOKEN


def final_statuses(bus: Bus, job_id: str) -> list[dict[str, Any]]:
    return [status for status in bus.seen(f"cesar/status/{job_id}") if status["status"] in ("completed", "error")]


def start_pair(nats: NatsServer, serve: Serve, *flags: str, **options: Any) -> dict[str, Consumer]:
    return {
        name: serve(*flags, name=name, environ=nats.environ(name, **options), ready=READY)
        for name in ("first", "second")
    }


def test_the_job_of_a_killed_consumer_goes_to_another_one_ahead_of_the_rest(
    nats: NatsServer, serve: Serve, join: Join
) -> None:
    bus = join(nats.mqtt_port)
    consumers = start_pair(nats, serve)
    bus.publish("cesar/jobs", {"job_id": "long", "audio_path": str(LONG)})
    for number in range(3):
        bus.publish("cesar/jobs", {"job_id": f"short-{number}", "audio_path": str(SPEECH)})
    running = consumers[bus.status("long", "processing")["consumer"]]
    bus.status("short-2", "queued")
    running.kill()
    taken = bus.status("long", "completed")
    assert taken["attempt"] == 2
    assert {status["created_at"] for status in bus.seen("cesar/status/long")} == {taken["created_at"]}
    bus.status("short-2", "completed")
    ended = [status["job_id"] for status in bus.every_status() if status["status"] == "completed"]
    assert ended == ["long", "short-0", "short-1", "short-2"]
    running.start()
    running.wait_for_log(READY)
    bus.publish("cesar/jobs", {"job_id": "last", "audio_path": str(SPEECH)})
    bus.status("last", "completed")
    assert len(final_statuses(bus, "long")) == 1


def hang_while_running(bus: Bus, consumers: dict[str, Consumer], recording: Path = LONG) -> str:
    """Have a consumer run the job `long`, stop it (SIGSTOP), and return its name."""
    bus.publish("cesar/jobs", {"job_id": "long", "audio_path": str(recording)})
    stopped: str = bus.status("long", "processing")["consumer"]
    consumers[stopped].signal(signal.SIGSTOP)
    return stopped


def test_a_consumer_that_comes_back_drops_what_another_one_has(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    consumers = start_pair(nats, serve)
    stopped = hang_while_running(bus, consumers)
    done = bus.status("long", "completed")
    consumers[stopped].signal(signal.SIGCONT)
    consumers[stopped].wait_for_log("Job given up")
    bus.publish("cesar/jobs", {"job_id": "next", "audio_path": str(SPEECH)})
    bus.status("next", "completed")
    assert done["consumer"] != stopped
    assert bus.seen("cesar/status/long")[-1] == done
    assert "another consumer" in consumers[stopped].logged()


def test_parallel_runs_one_job_in_each_consumer(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    start_pair(nats, serve, mode="parallel")
    for job_id in ("a", "b"):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(LONG)})
    assert {bus.status(job_id, "processing")["consumer"] for job_id in ("a", "b")} == {"first", "second"}
    assert [bus.status(job_id)["status"] for job_id in ("a", "b")] == ["completed", "completed"]


def test_one_id_is_one_job_in_the_whole_group(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    start_pair(nats, serve, mode="parallel")
    request = {"job_id": "same", "audio_path": str(SPEECH), "priority": 5, "language": "en"}
    for _ in range(3):
        bus.publish("cesar/jobs", request)
    bus.publish("cesar/jobs", {**request, "audio_path": str(LONG)})
    bus.publish("cesar/jobs", b"{")
    bus.publish("cesar/jobs", {"job_id": "other", "audio_path": str(SPEECH)})
    assert bus.status("same", "completed")["warnings"] == ["priority_ignored"]
    bus.status("other", "completed")
    assert len(final_statuses(bus, "same")) == 1
    assert bus.wait("cesar/rejected", lambda rejection: rejection["job_id"] == "same")["reason"] == "job_id_conflict"
    assert len(bus.seen("cesar/rejected")) == 2


def test_a_stop_finishes_the_job_and_a_limit_gives_it_back(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    first = serve(name="first", environ=nats.environ("first", ack_wait_s=30), ready=READY)
    bus.publish("cesar/jobs", {"job_id": "finished", "audio_path": str(LONG)})
    bus.publish("cesar/jobs", {"job_id": "given-back", "audio_path": str(LONG)})
    bus.status("finished", "processing")
    assert first.stop() == 0
    assert bus.states("finished")[-1] == "completed"
    assert bus.states("given-back") == ["queued"]
    limited = nats.environ("second", ack_wait_s=30) | {"CESAR_WORKER__DRAIN_TIMEOUT": "0.1"}
    second = serve(name="second", environ=limited, ready=READY)
    bus.status("given-back", "processing")
    second.stop()
    assert "Job given back" in second.logged()
    serve(name="third", environ=nats.environ("third", ack_wait_s=30), ready=READY)
    assert bus.status("given-back", "completed")["consumer"] == "third"


def test_a_queue_with_other_settings_ends_the_start_with_what_to_change(nats: NatsServer, serve: Serve) -> None:
    serve(name="first", environ=nats.environ("first"), ready=READY).stop()
    other = serve(name="second", environ=nats.environ("second", mode="parallel"), ready=None)
    assert other.wait() == ExitCode.CONFIG
    assert "all consumers of a group have one mode" in other.logged()


def respond(bus: Bus, command: str, job_id: str) -> dict[str, Any]:
    transaction = f"{command} {job_id}"
    bus.publish(f"cesar/request/{command}", {"job_id": job_id, "transaction": transaction})
    return bus.wait(f"cesar/response/{command}", lambda response: response["transaction"] == transaction)


def test_commands_reach_waiting_running_and_ended_jobs_wherever_they_are(
    nats: NatsServer, serve: Serve, join: Join
) -> None:
    bus = join(nats.mqtt_port)
    start_pair(nats, serve)
    bus.publish("cesar/jobs", {"job_id": "running", "audio_path": str(LONG)})
    for job_id in ("waiting", "gone", "kept"):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(SPEECH), "metadata": {"note": job_id}})
    bus.status("running", "processing")
    assert bus.status("kept", "queued")["queue_position"] == 3
    assert respond(bus, "get", "waiting")["data"]["status"] == "queued"
    assert respond(bus, "get", "unknown")["status"] == "error"
    assert respond(bus, "cancel", "waiting")["data"]["status"] == "cancelled"
    assert respond(bus, "delete", "gone")["data"]["status"] == "deleted"
    assert respond(bus, "cancel", "running")["data"]["status"] == "processing"
    assert bus.status("running")["status"] == bus.status("waiting")["status"] == "cancelled"
    bus.status("kept", "completed")
    assert respond(bus, "retry", "waiting")["data"]["status"] == "queued"
    again = bus.status("waiting", "completed")
    assert (again["metadata"], words(again["result_text"])) == ({"note": "waiting"}, SPOKEN)
    bus.wait("cesar/events", lambda event: (event["job_id"], event["event_type"]) == ("gone", "deleted"))
    assert set(bus.states("gone")) <= {"queued", "cancelled"}, "the latter, unless the deletion was faster"
    bus.publish("cesar/jobs", {"job_id": "gone", "audio_path": str(LONG)})
    bus.status("gone", "processing")


def test_a_pause_holds_for_a_consumer_that_joins_later(nats: NatsServer, serve: Serve, join: Join) -> None:
    bus = join(nats.mqtt_port)
    serve(name="first", environ=nats.environ("first"), ready=READY)
    bus.publish("cesar/request/pause", "")
    bus.wait("cesar/consumer/first/queue", lambda queue: queue["paused"])
    bus.publish("cesar/jobs", {"job_id": "held", "audio_path": str(SPEECH)})
    bus.status("held", "queued")
    serve(name="second", environ=nats.environ("second"), ready=READY)
    bus.wait("cesar/consumer/second/queue", lambda queue: queue["paused"])
    assert bus.states("held") == ["queued"]
    bus.publish("cesar/request/resume", "")
    bus.status("held", "completed")


def test_positions_follow_a_long_job(nats: NatsServer, serve: Serve, join: Join, tmp_path: Path) -> None:
    bus = join(nats.mqtt_port)
    recording = repeated_long(tmp_path / "hour.wav", times=75)
    serve("--audio-dir", str(tmp_path), name="first", environ=nats.environ("first"), ready=READY)
    bus.publish("cesar/jobs", {"job_id": "first", "audio_path": str(LONG)})
    bus.status("first", "processing")
    bus.publish("cesar/jobs", {"job_id": "long", "audio_path": str(recording)})
    for job_id in ("a", "b"):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": str(SPEECH)})
    assert bus.status("b", "queued")["queue_position"] == 3
    bus.wait("cesar/status/b", lambda status: status["queue_position"] == 2)
    bus.wait("cesar/status/a", lambda status: status["queue_position"] == 1)
    bus.wait("cesar/consumer/first/queue", lambda queue: queue["queued"] == 2)
    events = [event for event in bus.seen("cesar/events") if event["job_id"] == "b"]
    assert [event["event_type"] for event in events] == ["queued"]
    bus.publish("cesar/request/cancel_all", "")
    for job_id in ("long", "a", "b"):
        assert bus.status(job_id)["status"] == "cancelled"


def test_a_cancel_reaches_the_job_of_a_consumer_that_hangs(
    nats: NatsServer, serve: Serve, join: Join, tmp_path: Path
) -> None:
    bus = join(nats.mqtt_port)
    # The one that hangs may have been given the command, too: the other one runs the job until it is delivered again.
    recording = repeated_long(tmp_path / "hour.wav", times=75)
    consumers = start_pair(nats, serve, "--audio-dir", str(tmp_path))
    stopped = hang_while_running(bus, consumers, recording)
    bus.publish("cesar/request/cancel", {"job_id": "long"})
    cancelled = bus.status("long")
    consumers[stopped].signal(signal.SIGCONT)
    bus.publish("cesar/jobs", {"job_id": "next", "audio_path": str(SPEECH)})
    bus.status("next", "completed")
    assert (cancelled["status"], cancelled["consumer"] != stopped) == ("cancelled", True)
    assert bus.seen("cesar/status/long")[-1] == cancelled
