"""What the consumer tells of itself and of each change, and jobs that expire: the command as a process, mosquitto."""

import json
import wave
from collections.abc import Callable
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.harness import SPEECH, Bus, Consumer, words
from tests.conftest import Mosquitto, StartMosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


def test_info_and_health_are_retained_and_hold_no_secret(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url.replace("://", "://porch:hunter2@"))
    bus = join(mosquitto.port)
    info = bus.wait("cesar/consumer/cesar/info")
    health = bus.wait("cesar/consumer/cesar/health")
    assert info["models"][0] == info["default_model"] == "tiny.en"
    assert (info["device"], info["compute_type"]) == ("cpu", "int8")
    assert info["limits"]["max_payload_bytes"] == 256 << 20
    assert info["settings"]["consumer"]["name"] == "cesar"
    assert (health["worker_alive"], health["network_alive"]) == (True, True)
    assert health["rss_bytes"] > 50 << 20
    assert health["disk_free_bytes"] > 0
    bus.settle()
    assert not [m.topic for m in bus.messages if b"hunter2" in m.payload]
    assert "hunter2" not in consumer.logged()


def test_each_change_of_a_job_is_an_event(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "note", "audio_path": "speech.wav", "metadata": {"room": "porch"}})
    done = bus.wait("cesar/events", lambda event: event["event_type"] == "completed")
    assert [event["event_type"] for event in bus.seen("cesar/events")] == ["queued", "processing", "completed"]
    assert done["metadata"] == {"room": "porch"}
    assert "plumber" in done["text"]
    bus.publish("cesar/request/delete", "note")
    bus.wait("cesar/events", lambda event: event["event_type"] == "deleted")
    late = join(mosquitto.port)
    late.settle()
    assert late.seen("cesar/events") == [], "events are not retained"


def test_a_job_that_nobody_could_start_in_time_is_cancelled_as_expired(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    bus.publish("cesar/request/pause", b"")
    bus.wait("cesar/response/pause")
    expiring = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    expiring.MessageExpiryInterval = 5
    bus.publish("cesar/audio/by-message", SPEECH.read_bytes(), properties=expiring)
    bus.publish("cesar/jobs", {"job_id": "by-field", "audio_path": "speech.wav", "expires_in": 0.5})
    bus.publish("cesar/jobs", {"job_id": "patient", "audio_path": "speech.wav", "expires_in": 3600})
    for name in ("by-message", "by-field"):
        end = bus.status(name)
        assert (end["status"], end["error_code"], end["retryable"]) == ("cancelled", "expired", True)
    bus.publish("cesar/request/resume", b"")
    assert bus.status("patient")["status"] == "completed"
    bus.publish("cesar/request/retry", "by-message")
    assert bus.status("by-message", "completed")["status"] == "completed"


def test_a_producer_that_names_a_response_topic_is_answered_there(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    for number, payload in enumerate(('{"job_id": "a", "audio_path": "long.ogg"}', '{"audio_pat": "x"}')):
        asking = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        asking.ResponseTopic = "cesar/response/me"
        asking.CorrelationData = b"%d" % number
        bus.publish("cesar/jobs", payload, properties=asking)
    bus.wait("cesar/response/me", lambda answer: "reason" in answer)
    answers = [m for m in bus.messages if m.topic == "cesar/response/me"]
    assert [getattr(m.properties, "CorrelationData", None) for m in answers] == [b"0", b"1"]
    assert json.loads(answers[0].payload) == {"job_id": "a", "status": "queued"}
    assert json.loads(answers[1].payload)["reason"] == "invalid_request"


def several(times: int, file: Path) -> None:
    """Write the speech several times over."""
    with wave.open(str(SPEECH)) as speech, wave.open(str(file), "wb") as wav:
        wav.setparams(speech.getparams())
        wav.writeframes(speech.readframes(speech.getnframes()) * times)


def forget_replies(bus: Bus) -> None:
    """Keep what came on a topic of a test's own from being compared with the document, which cannot know it."""
    bus.messages[:] = [message for message in bus.messages if not message.topic.startswith("cesar/replies/")]


@pytest.mark.parametrize("limit", [3000, 1200], ids=["by the broker", "by a setting"])
def test_no_answer_is_too_large_for_the_broker(
    start_mosquitto: StartMosquitto, serve: Serve, join: Join, tmp_path: Path, limit: int
) -> None:
    """A result comes in pieces that fit, and so do a status and a list; what cannot be cut is an error, not silence."""
    set_here = {} if limit == 3000 else {"CESAR_BROKER__MAX_PACKET_BYTES": "1200"}
    broker = start_mosquitto(*([] if set_here else ["max_packet_size 3000"]))
    several(4, tmp_path / "talk.wav")
    serve("--broker", broker.url, "--audio-dir", str(tmp_path), environ=set_here)
    bus = join(broker.port, protocol=MQTTProtocolVersion.MQTTv5)
    talk = {"job_id": "talk", "audio_path": "talk.wav", "word_timestamps": True, "formats": ["json"], "stream": True}
    talk["temperature"] = 0  # what is repeated is otherwise decoded again at each temperature
    bus.publish("cesar/jobs", {**talk, "metadata": {"note": '"' * 500}})
    names = ["talk", *(f"ghost-{number}" for number in range(12))]
    for name in names[1:]:
        bus.publish("cesar/jobs", {"job_id": name, "audio_path": "no.wav"})
    for name in names:
        bus.status(name)

    whole, offset, more = "", 0, True
    while more:
        asked = {"job_id": "talk", "format": "json", "offset": offset, "transaction": [offset]}
        bus.publish("cesar/request/result", asked)
        piece = bus.wait("cesar/response/result", lambda said: said["transaction"] == [offset])["data"]  # noqa: B023 - called at once
        whole, offset, more = whole + piece["text"], offset + piece["length"], piece["more"]
    assert len(whole.encode()) == offset == piece["total"] > limit
    file = json.loads(whole)
    told = [word["word"] for segment in file["segments"] for word in segment["words"]]
    assert words("".join(told)) == words(file["text"])

    listed: list[str] = []
    after, more = None, True
    while more:
        bus.publish("cesar/request/list", {"after": after, "transaction": {"after": after}})
        page = bus.wait("cesar/response/list", lambda said: said["transaction"] == {"after": after})["data"]  # noqa: B023 - called at once
        listed, after, more = listed + [job["job_id"] for job in page["jobs"]], page["next"], page["next"] is not None
    assert listed == names

    replies = "cesar/replies/" + "me" * 100
    asking = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    asking.ResponseTopic, asking.CorrelationData = replies, b"c" * 200
    for command in ("get", "result"):
        bus.publish(f"cesar/request/{command}", "talk", properties=asking)
        at_reply = bus.wait(replies, lambda said: (command == "get") == ("more" not in said["data"]))  # noqa: B023 - called at once
        assert at_reply["status"] == "ok" or limit == 1200
    bus.publish("cesar/request/models", {"transaction": "x" * (limit - 200)})
    error = bus.wait("cesar/response/models")
    assert (error["status"], error["data"], error["transaction"]) == ("error", {"consumer": "cesar"}, None)
    assert "raise that limit" in error["error"]
    assert bus.seen("cesar/segments/talk"), "a segment without its words is better than a gap"
    bus.settle()
    assert max(len(m.topic) + len(m.payload) for m in bus.messages if m.topic.startswith("cesar/re")) < limit
    forget_replies(bus)


def test_an_answer_may_go_to_any_topic_that_means_nothing_else(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    for topic in ("cesar/request/pause", "cesar/status/a", "cesar/replies/1"):
        asking = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        asking.ResponseTopic, asking.CorrelationData = topic, b"1"
        bus.publish("cesar/request/health", {"transaction": topic}, properties=asking)
    assert bus.wait("cesar/replies/1")["transaction"] == "cesar/replies/1"
    bus.settle()
    assert bus.seen("cesar/status/a") == bus.seen("cesar/request/pause") == []
    forget_replies(bus)


def test_a_paused_consumer_accepts_and_stays_paused_over_a_restart(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/request/pause", b"")
    bus.publish("cesar/audio/note", SPEECH.read_bytes())
    bus.status("note", "queued")
    assert bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["queued"] == 1)["paused"] is True
    assert consumer.stop() == 0
    consumer.start()
    again = join(mosquitto.port)
    assert again.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "paused")["queued"] == 1
    assert bus.states("note") == ["queued"]
    again.publish("cesar/request/resume", b"")
    assert again.status("note", "completed")["status"] == "completed"
