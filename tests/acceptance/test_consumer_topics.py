"""What the consumer tells of itself and of each change, and jobs that expire: the command as a process, mosquitto."""

import json
from collections.abc import Callable

import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.harness import LONG, SPEECH, Bus, Consumer
from tests.conftest import Mosquitto

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
    expiring.MessageExpiryInterval = 1
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


def test_a_paused_consumer_accepts_and_stays_paused_over_a_restart(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    bus.publish("cesar/request/pause", b"")
    bus.publish("cesar/audio/note", LONG.read_bytes())
    bus.status("note", "queued")
    assert bus.wait("cesar/consumer/cesar/queue", lambda queue: queue["queued"] == 1)["paused"] is True
    assert consumer.stop() == 0
    consumer.start()
    again = join(mosquitto.port)
    assert again.wait("cesar/consumer/cesar/queue", lambda queue: queue["activity"] == "paused")["queued"] == 1
    assert bus.states("note") == ["queued"]
    again.publish("cesar/request/resume", b"")
    assert again.status("note", "completed")["status"] == "completed"
