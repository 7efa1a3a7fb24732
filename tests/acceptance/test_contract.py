"""Every kind of message of the AsyncAPI document is seen at a real consumer, and is as the document says."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cesar_mqtt.protocol.commands import COMMANDS
from cesar_mqtt.protocol.fields import FORMATS
from tests.acceptance.harness import LONG, Bus, Consumer
from tests.conftest import Mosquitto
from tests.document import Fault, Judge, Seen, default_document

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]

INBOX = "cesar/replies"
SHORT = {"pause": "", "resume": "", "health": "", "models": "", "list": ""} | dict.fromkeys(
    ("cancel", "retry", "delete", "get", "result"), "nobody"
)


def asking(name: str) -> Properties:
    """Ask for an answer on a topic of our own."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ResponseTopic = f"{INBOX}/{name}"
    properties.CorrelationData = name.encode()
    return properties


def every_kind() -> set[Seen]:
    channels = default_document()["channels"]
    return {Seen(name, message) for name, channel in channels.items() for message in channel["messages"]}


def request(bus: Bus, command: str, payload: dict[str, Any] | str) -> dict[str, Any]:
    """Ask, and return the answer to this and to no earlier request."""
    before = len(bus.seen(f"cesar/response/{command}"))
    bus.publish(f"cesar/request/{command}", payload, properties=asking(command))
    bus.wait(f"cesar/response/{command}", lambda _: len(bus.seen(f"cesar/response/{command}")) > before)
    return bus.seen(f"cesar/response/{command}")[-1]


def drive(bus: Bus) -> dict[str, dict[str, Any]]:
    """Let each kind of message be sent at least once, in both directions; the answers to all commands."""
    bus.publish("cesar/audio/long", LONG.read_bytes(), properties=asking("audio"))
    bus.status("long", "processing")
    answers = {"pause": request(bus, "pause", {"transaction": 0.5})}
    answers["cancel"] = request(bus, "cancel", {"job_id": "current", "transaction": "a"})
    bus.status("long", "cancelled")
    answers["retry"] = request(bus, "retry", {"job_id": "long"})
    answers["cancel_all"] = request(bus, "cancel_all", {})
    answers["retry_last"] = request(bus, "retry_last", {"transaction": "b"})
    request(bus, "cancel", "long")
    bus.publish("cesar/jobs", {"job_id": "kept", "audio_path": "speech.wav", "formats": ["txt"]})
    note = {"job_id": "note", "audio_path": "speech.wav", "formats": [*FORMATS], "stream": True}
    bus.publish("cesar/jobs", {**note, "word_timestamps": True}, properties=asking("job"))
    bus.publish("cesar/jobs", "speech.wav")
    bus.publish("cesar/jobs", {"job_id": "typo", "audio_pth": "speech.wav"}, properties=asking("typo"))
    answers["resume"] = request(bus, "resume", {})
    bus.status("note", "completed")
    answers["get"] = request(bus, "get", {"job_id": "note", "transaction": True})
    answers["result"] = request(bus, "result", {"job_id": "note", "format": "srt"})
    answers["list"] = request(bus, "list", {"limit": 2})
    answers["health"] = request(bus, "health", {})
    answers["rejected"] = request(bus, "rejected", {"limit": 5})
    answers["set"] = request(bus, "set", {"default_language": "en"})
    answers["models"] = request(bus, "models", {"transaction": None})
    answers["delete"] = request(bus, "delete", {"job_id": "note"})
    for job_id in ("gone", "missing"):
        bus.publish("cesar/jobs", {"job_id": job_id, "audio_path": "missing.wav"})
        bus.status(job_id, "error")
        if job_id == "gone":
            bus.wait("cesar/consumer/cesar/last_error")
            request(bus, "delete", job_id)
    for command, payload in SHORT.items():
        request(bus, command, payload)
    request(bus, "dance", {"transaction": 1})
    return answers


def answered(bus: Bus) -> Iterator[Seen | Fault]:
    """What came on the topics that the requests named, which the document cannot know."""
    judge = Judge(default_document())
    for message in bus.messages:
        if message.topic.startswith(f"{INBOX}/"):
            name = message.topic.rpartition("/")[2]
            assert getattr(message.properties, "CorrelationData", None) == name.encode()
            parameters = {} if name in {"audio", "job", "typo"} else {"command": name}
            yield judge.judge_payload("answers", bytes(message.payload), topic=message.topic, parameters=parameters)


def retained(join: Join, port: int) -> set[str]:
    """The channels of what a subscriber that comes now receives."""
    late = join(port)
    late.settle()
    late.close()
    return {seen.channel for seen in late.kinds}


def said_to_be_retained() -> set[str]:
    told = default_document()["operations"].values()
    return {
        operation["channel"]["$ref"].rpartition("/")[2] for operation in told if operation["bindings"]["mqtt"]["retain"]
    }


def test_every_kind_of_message_has_been_seen_and_is_as_the_document_says(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    answers = drive(bus)
    for name in ("state", "queue", "last", "last_error", "info", "health"):
        bus.wait(f"cesar/consumer/cesar/{name}")
    assert retained(join, mosquitto.port) == said_to_be_retained()
    assert consumer.stop() == 0
    bus.wait("cesar/consumer/cesar/state", lambda state: state["state"] == "offline")
    bus.close()

    assert {command: answer["status"] for command, answer in answers.items()} == dict.fromkeys(COMMANDS, "ok")
    seen = {*bus.kinds, *answered(bus)}
    assert [fault for fault in seen if isinstance(fault, Fault)] == []
    assert every_kind() - seen == set(), "nothing has covered these"


def test_a_message_that_the_document_does_not_know_fails_the_test_that_saw_it(mosquitto: Mosquitto, join: Join) -> None:
    watching, other = join(mosquitto.port), join(mosquitto.port)
    other.publish("cesar/status/note", {"job_id": "note", "status": "done"})
    other.publish("cesar/consumer/cesar/mood", {"mood": "good"})
    other.publish("cesar/rejected", {"reason": "boredom"}, retain=True)
    watching.wait("cesar/rejected")

    with pytest.raises(pytest.fail.Exception) as caught:
        watching.close()

    told = str(caught.value)
    assert "3 messages" in told
    assert "cesar/status/note status: " in told
    assert "cesar/consumer/cesar/mood is no channel" in told
    assert "(schema: " in told
    other.close()
