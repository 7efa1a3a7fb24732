"""From PUBLISH to a retained transcript: the command as a process, a real broker, the real model, real audio."""

import base64
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.harness import DATA, LONG, SPEECH, SPOKEN, Bus, Consumer, words
from tests.conftest import Mosquitto, need, run

pytestmark = [pytest.mark.model]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


@pytest.mark.mosquitto
def test_a_file_sent_with_mosquitto_pub_is_a_retained_transcript_for_whoever_comes_later(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url, fresh=True)
    bus = join(mosquitto.port)
    port = str(mosquitto.port)

    run(need("mosquitto_pub"), "-p", port, "-q", "1", "-t", "cesar/audio/note-1", "-f", str(SPEECH))
    bus.status("note-1")
    late = run(need("mosquitto_sub"), "-p", port, "-t", "cesar/status/#", "-C", "1", "-W", "100")

    status = json.loads(late.stdout)
    assert status["job_id"] == "note-1"
    assert status["status"] == "completed"
    assert words(status["result_text"]) == SPOKEN
    assert status["progress"] == 1
    assert (status["detected_language"], status["warnings"]) == (None, ["language_assumed"])  # tiny.en knows no other
    assert status["audio_duration"] == pytest.approx(4.0, abs=0.3)
    assert status["error_code"] is None
    assert bus.states("note-1") == ["queued", "processing", "completed"]


def test_the_embedded_broker_carries_a_job_the_whole_way(serve: Serve, join: Join, free_port: int) -> None:
    consumer = serve("--broker", f"embedded://127.0.0.1:{free_port}", fresh=True)
    consumer.wait_for_log(f"mosquitto_pub -p {free_port} -q 1")
    bus = join(free_port)
    bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")

    bus.publish("cesar/audio/note-1", SPEECH.read_bytes())

    assert words(bus.status("note-1")["result_text"]) == SPOKEN
    late = join(free_port)
    assert late.status("note-1")["status"] == "completed"
    assert consumer.stop() == 0


@pytest.mark.mosquitto
def test_every_way_to_send_audio_gives_the_same_transcript(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    audio = base64.b64encode(SPEECH.read_bytes()).decode()

    bus.publish("cesar/audio/bytes", SPEECH.read_bytes())
    bus.publish("cesar/jobs", {"job_id": "base64", "audio_base64": audio, "language": "English"})
    bus.publish("cesar/jobs", {"job_id": "relative", "audio_path": "speech.wav", "metadata": {"room": "hall"}})
    bus.publish("cesar/jobs", {"job_id": "absolute", "audio_path": str(SPEECH)})
    bus.publish("cesar/jobs", "speech.wav\n")

    for job_id in ("bytes", "base64", "relative", "absolute"):
        assert words(bus.status(job_id)["result_text"]) == SPOKEN
    short = bus.wait("cesar/consumer/cesar/last", lambda last: last["job_id"] not in _NAMED)
    assert words(short["text"]) == SPOKEN
    assert bus.status("relative")["metadata"] == {"room": "hall"}
    assert bus.status("relative")["audio_source"] == "speech.wav"
    assert bus.status("base64")["language"] == "en"


_NAMED = {"bytes", "base64", "relative", "absolute"}


@pytest.mark.mosquitto
def test_who_is_told_of_the_last_job_has_its_event_and_its_status(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    for number in range(10):
        bus.publish(
            "cesar/jobs", {"job_id": f"job-{number}", "audio_path": ("speech.wav", "not-there.wav")[number % 2]}
        )
    bus.wait("cesar/consumer/cesar/last", lambda last: last["job_id"] == "job-8")
    bus.wait("cesar/consumer/cesar/last_error", lambda last: last["job_id"] == "job-9")
    told: set[tuple[str, str]] = set()
    for message in bus.messages:
        if message.topic.startswith(("cesar/events", "cesar/status/")):
            event = json.loads(message.payload)
            told.add((event["job_id"], event.get("event_type") or f"status {event['status']}"))
        elif message.topic in ("cesar/consumer/cesar/last", "cesar/consumer/cesar/last_error"):
            state = "error" if message.topic.endswith("error") else "completed"
            job_id = json.loads(message.payload)["job_id"]
            assert {(job_id, state), (job_id, f"status {state}")} <= told


@pytest.mark.mosquitto
def test_user_properties_of_mqtt_5_set_fields_and_metadata(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = [("language", "en"), ("beam_size", "1"), ("room", "porch")]

    bus.publish("cesar/audio/note-5", SPEECH.read_bytes(), properties=properties)

    status = bus.status("note-5")
    assert status["status"] == "completed"
    assert status["language"] == "en"
    assert status["metadata"] == {"room": "porch"}


@pytest.mark.mosquitto
def test_jobs_wait_in_order_while_one_is_in_work_and_are_picked_up_by_themselves(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "long", "audio_path": LONG.name, "beam_size": 1})
    bus.status("long", "processing")

    for number in range(1, 5):
        bus.publish("cesar/jobs", {"job_id": f"job-{number}", "audio_path": "speech.wav"})

    for number in range(1, 5):
        assert bus.status(f"job-{number}", "queued")["queue_position"] == number
    ended = [bus.status(job_id) for job_id in ("long", "job-1", "job-2", "job-3", "job-4")]
    assert [status["status"] for status in ended] == ["completed"] * 5
    starts = [status["started_at"] for status in ended]
    ends = [status["completed_at"] for status in ended]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False)), "one at a time, in order"
    positions = [status["queue_position"] for status in bus.seen("cesar/status/job-4") if status["status"] == "queued"]
    assert positions == [4, 3, 2, 1], "the position is told again whenever it changes"


@pytest.mark.mosquitto
def test_a_failing_job_says_why_and_the_next_one_completes(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)

    bus.publish("cesar/jobs", {"job_id": "missing", "audio_path": "there-is-no-such.wav"})
    bus.publish("cesar/jobs", {"job_id": "outside", "audio_path": "/etc/passwd"})
    bus.publish("cesar/audio/junk", b"this is no audio, whatever its topic says")
    bus.publish("cesar/audio/good", SPEECH.read_bytes())

    assert bus.status("good")["status"] == "completed"
    for job_id, code in (
        ("missing", "audio_not_found"),
        ("outside", "audio_not_allowed"),
        ("junk", "audio_unreadable"),
    ):
        status = bus.status(job_id)
        assert (status["status"], status["error_code"], status["retryable"]) == ("error", code, False)
        assert status["error_message"].endswith(".")
        assert "Traceback" not in status["error_message"]
        assert "/etc" not in status["error_message"]
    queue = bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["completed_total"] == 1)
    assert queue["error_total"] == 3


@pytest.mark.mosquitto
def test_the_same_recording_is_found_however_a_program_names_it(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    folder = tmp_path / "Zoë"
    folder.mkdir()
    shutil.copy(SPEECH, folder / "Café one.wav")
    serve("--broker", mosquitto.url, "--audio-dir", str(tmp_path))
    bus = join(mosquitto.port)
    encoded = base64.b64encode(SPEECH.read_bytes()).decode()

    bus.publish("cesar/jobs", {"job_id": "nfd", "audio_path": unicodedata.normalize("NFD", "Zoë/Café one.wav")})
    bus.publish("cesar/jobs", {"job_id": "uri", "audio_base64": f"data:audio/wav;base64,{encoded}"})
    bus.publish("cesar/jobs", {"job_id": "file", "audio_path": (folder / "Café one.wav").as_uri(), "language": " en "})
    bus.publish("cesar/jobs", {"job_id": "typo", "audio_path": "speech.wav", "model_size": "smal"})
    bus.publish("cesar/jobs", {"job_id": "other", "path": "speech.wav"})
    bus.publish("cesar/jobs", f" {(folder / 'Café one.wav').as_uri()}\n")

    for job_id in ("nfd", "uri", "file"):
        assert words(bus.status(job_id)["result_text"]) == SPOKEN
    assert "(did you mean 'small'?): use one of tiny.en, " in bus.status("typo")["error_message"]
    assert bus.status("other")["error_message"] == "There is no field 'path' (did you mean audio_path?)."
    bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["completed_total"] == 4)


@pytest.mark.mosquitto
def test_what_is_wrong_is_refused_by_reason_and_never_blocks_a_good_job(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    limits = {"CESAR_QUEUE__MAX_PAYLOAD_BYTES": "400000"}
    serve("--broker", mosquitto.url, environ=limits)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "first", "audio_path": "speech.wav"})
    bus.status("first")

    bus.publish("cesar/jobs", '{"audio_path": ')
    bus.publish("cesar/jobs", b"\xff\xfe\x00")
    bus.publish("cesar/jobs", {"job_id": "typo", "audio_pth": "speech.wav"})
    bus.publish("cesar/jobs", {"job_id": "not an id", "audio_path": "speech.wav"})
    bus.publish("cesar/audio/a/b", SPEECH.read_bytes())
    bus.publish("cesar/jobs", {"job_id": "first", "audio_path": "long.ogg"})
    bus.publish("cesar/audio/large", bytes(400_001))
    bus.publish("cesar/jobs", "")
    bus.publish("cesar/jobs", {"job_id": "second", "audio_path": "speech.wav"})

    assert bus.status("second")["status"] == "completed"
    assert [refusal["reason"] for refusal in bus.seen("cesar/rejected")] == [
        "malformed_json",
        "malformed_json",
        "invalid_request",
        "invalid_job_id",
        "invalid_job_id",
        "job_id_conflict",
        "payload_too_large",
    ]
    typo = bus.status("typo")
    assert typo["error_code"] == "invalid_request"
    assert "audio_path" in typo["error_message"], "a typo is answered with what was meant"
    assert words(bus.status("first")["result_text"]) == SPOKEN, "the job of a conflicting id stays as it is"


@pytest.mark.mosquitto
def test_whoever_waits_for_a_wrong_request_recognises_its_status(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = [("job_id", "other"), ("room", "porch")]
    typo = {"job_id": "typo", "audio_path": "speech.wav", "langauge": "de", "metadata": {"room": "porch"}}

    bus.publish("cesar/audio/sent", SPEECH.read_bytes(), properties=properties)
    bus.publish("cesar/jobs", typo)

    for job_id, source in (("sent", "upload"), ("typo", "speech.wav")):
        status = bus.status(job_id)
        assert (status["error_code"], status["metadata"]) == ("invalid_request", {"room": "porch"})
        assert status["audio_source"] == source
    bus.publish("cesar/audio/empty", "")
    consumer.wait_for_log("Empty upload ignored: no job is created (job empty)")
    assert bus.seen("cesar/status/empty") == bus.seen("cesar/status/other") == []


@pytest.mark.mosquitto
def test_what_home_assistant_node_red_and_a_shell_write_is_taken_as_it_is_meant(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    names = ("task", "vad_filter", "word_timestamps", "formats", "stream", "metadata", "temperature", "audio_url")
    nulls = dict.fromkeys(names)
    lines = base64.encodebytes(SPEECH.read_bytes()).decode()

    bus.publish("cesar/jobs", {"job_id": "path", "audio_path": "sub/../speech.wav", "language": "auto", **nulls})
    bus.publish("cesar/jobs", {"job_id": "path", "audio_path": "sub/../speech.wav", "language": ""})
    bus.publish("cesar/jobs", {"job_id": "lines", "audio_base64": lines, "beam_size": 5.0, "batch_size": 1.0})
    bus.publish("cesar/jobs", {"job_id": "prompt", "audio_path": "speech.wav", "initial_prompt": "plumber " * 4_000})

    for job_id in ("path", "lines", "prompt"):
        assert words(bus.status(job_id)["result_text"]) == SPOKEN
    assert bus.status("prompt")["warnings"] == ["initial_prompt_truncated", "language_assumed"]
    assert bus.seen("cesar/rejected") == []


@pytest.mark.mosquitto
def test_one_job_more_than_may_wait_is_refused(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url, environ={"CESAR_QUEUE__MAX_QUEUED": "1"})
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "long", "audio_path": LONG.name, "beam_size": 1})
    bus.status("long", "processing")

    bus.publish("cesar/jobs", {"job_id": "waits", "audio_path": "speech.wav"})
    bus.publish("cesar/jobs", {"job_id": "too-many", "audio_path": "speech.wav"})

    bus.publish("cesar/jobs", "speech.wav")

    bus.wait("cesar/rejected", lambda _: len(bus.seen("cesar/rejected")) > 1)
    refusals = [(refusal["reason"], refusal["job_id"]) for refusal in bus.seen("cesar/rejected")]
    assert refusals == [("queue_full", "too-many"), ("queue_full", None)]
    assert bus.status("waits")["status"] == "completed"


@pytest.mark.mosquitto
def test_the_same_id_and_request_again_runs_nothing_twice(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    for _ in range(3):
        bus.publish("cesar/audio/once", SPEECH.read_bytes())
    bus.status("once")
    before = len(bus.seen("cesar/status/once"))

    bus.publish("cesar/audio/once", SPEECH.read_bytes())

    bus.wait("cesar/status/once", lambda _: len(bus.seen("cesar/status/once")) > before)
    assert bus.states("once")[-1] == "completed"
    assert {status["attempt"] for status in bus.seen("cesar/status/once")} == {0, 1}
    assert bus.seen("cesar/rejected") == []
    consumer.stop()
    assert list((consumer.data_dir / "spool").iterdir()) == []


@pytest.mark.mosquitto
def test_a_job_retained_by_mistake_runs_once_for_all_consumers_to_come(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_BROKER__PROTOCOL": "3.1.1"})
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", "speech.wav", retain=True)
    bus.wait("cesar/consumer/cesar/last")
    consumer.stop()
    consumer.start()
    bus.publish("cesar/jobs", {"job_id": "after", "audio_path": "speech.wav"})
    bus.status("after")
    consumer.stop()
    consumer.start()
    bus.publish("cesar/jobs", {"job_id": "last", "audio_path": "speech.wav"})
    bus.status("last")

    topics = {message.topic for message in bus.messages if message.topic.startswith("cesar/status/")}
    assert len(topics) == 3, "one for the job that was retained by mistake, however often it comes back"
    consumer.stop()


@pytest.mark.mosquitto
def test_a_retained_job_with_an_id_does_not_run_again_after_its_deletion(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url, environ={"CESAR_BROKER__PROTOCOL": "3.1.1"})
    bus = join(mosquitto.port)
    bus.publish("cesar/audio/ret1", SPEECH.read_bytes(), retain=True)
    bus.publish("cesar/jobs", {"job_id": "ret2", "audio_path": "speech.wav"}, retain=True)
    bus.publish("cesar/audio/ret3", b"no audio", retain=True)
    for job_id in ("ret1", "ret2", "ret3"):
        bus.status(job_id)
        bus.publish("cesar/request/delete", job_id)
    bus.wait("cesar/events", lambda _: [e["event_type"] for e in bus.seen("cesar/events")].count("deleted") == 3)

    def jobs_after(end: Callable[[], object]) -> object:
        end()
        consumer.start()
        bus.publish("cesar/request/list", {"transaction": str(end)})
        answer = bus.wait("cesar/response/list", lambda answer: answer["transaction"] == str(end))
        return answer["data"]["jobs"]

    assert [jobs_after(consumer.stop), jobs_after(consumer.kill)] == [[], []]
    events = [(event["job_id"], event["event_type"]) for event in bus.seen("cesar/events")]
    assert len(events) == len(set(events)), "each job was queued, started and deleted once"

    bus.publish("cesar/jobs", {"job_id": "ret2", "audio_path": "speech.wav"}, retain=True)  # on purpose
    bus.wait("cesar/events", lambda _: [e["event_type"] for e in bus.seen("cesar/events")].count("completed") == 3)
    consumer.stop()


@pytest.mark.mosquitto
def test_a_consumer_that_starts_before_its_broker_finds_it(
    serve: Serve, join: Join, start_mosquitto: Callable[..., Mosquitto]
) -> None:
    mosquitto = start_mosquitto()
    mosquitto.stop()
    consumer = serve("--broker", mosquitto.url, ready="Connecting to")

    mosquitto.start()
    consumer.wait_for_log("Connected to ")
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "late", "audio_path": "speech.wav"})

    assert bus.status("late")["status"] == "completed"


@pytest.mark.mosquitto
def test_a_broker_that_forgot_everything_is_told_everything_again(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/audio/good", SPEECH.read_bytes())
    bus.publish("cesar/audio/junk", b"no audio")
    bus.status("good")
    bus.status("junk")
    bus.close()

    mosquitto.restart(kill=True)  # no persistence: its sessions and retained messages are gone

    after = join(mosquitto.port)
    assert words(after.status("good")["result_text"]) == SPOKEN
    assert after.status("junk")["error_code"] == "audio_unreadable"
    after.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "online")
    assert after.wait("cesar/consumer/cesar/last")["job_id"] == "good"
    assert after.wait("cesar/consumer/cesar/last_error")["job_id"] == "junk"


def test_stock_programs_can_read_the_paths_of_a_folder_with_a_space(
    serve: Serve, join: Join, free_port: int, tmp_path: Path
) -> None:
    folder = tmp_path / "voice notes"
    folder.mkdir()
    shutil.copy(SPEECH, folder / "a note, with ünïcödé.wav")
    serve("--broker", f"embedded://127.0.0.1:{free_port}", "--audio-dir", str(folder))
    bus = join(free_port)
    bus.publish("cesar/jobs", {"job_id": "unicode", "audio_path": "a note, with ünïcödé.wav"})
    bus.publish("cesar/jobs", {"job_id": "other", "audio_path": str(DATA / "speech.wav")})
    assert words(bus.status("unicode")["result_text"]) == SPOKEN
    assert bus.status("other")["status"] == "completed"
