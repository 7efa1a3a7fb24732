"""A job of a higher priority and the job that it preempts: the command as a process, mosquitto, the real model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, command, repeated_long, words
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]


def test_a_job_of_a_higher_priority_starts_in_the_middle_of_another_which_continues_afterwards(
    mosquitto: Mosquitto, serve: Callable[..., Consumer], join: Callable[..., Bus], tmp_path: Path
) -> None:
    talk = repeated_long(tmp_path / "talk.wav", times=3)
    consumer = serve(
        "--broker", mosquitto.url, "--audio-dir", str(tmp_path), environ={"CESAR_TRANSCRIBER__WINDOW": "30"}
    )
    bus = join(mosquitto.port, protocol=MQTTProtocolVersion.MQTTv5)
    bus.publish("cesar/jobs", {"job_id": "talk", "audio_path": talk.name})
    bus.publish("cesar/jobs", {"job_id": "later", "audio_path": "speech.wav"})
    bus.status("talk", "processing")
    urgent = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    urgent.UserProperty = [("priority", "9"), ("room", "porch")]
    bus.publish("cesar/audio/urgent", SPEECH.read_bytes(), properties=urgent)

    waits = bus.wait("cesar/status/talk", lambda status: status["status"] == "queued" and status["attempt"] == 1)
    ends = {name: bus.status(name) for name in ("urgent", "talk", "later")}
    assert bus.states("talk") == ["queued", "processing", "queued", "processing", "completed"]
    assert (waits["queue_position"], waits["started_at"]) == (2, None), "behind the urgent one, before the later one"
    assert sorted(ends, key=lambda name: ends[name]["started_at"]) == ["urgent", "talk", "later"]
    assert (ends["urgent"]["priority"], ends["urgent"]["metadata"]) == (9, {"room": "porch"})
    assert not {"priority"} & (ends["talk"].keys() | ends["later"].keys())
    assert words(ends["urgent"]["result_text"]) == words(ends["later"]["result_text"]) == SPOKEN
    assert [ends[name]["attempt"] for name in ends] == [1, 2, 1]
    again = [status for status in bus.seen("cesar/status/talk") if status["attempt"] == 2]
    assert min(status["processed_duration"] for status in again if status["processed_duration"] is not None) > 10.0
    assert '"crashes"' not in (consumer.data_dir / "ledger.json.journal").read_text(errors="replace")

    listed = command("jobs", "--broker", mosquitto.url, "--json").stdout
    assert listed.count('"priority": 9') == 1
    shown = command("show", "urgent", "--broker", mosquitto.url).stdout
    assert any(line.split() == ["priority", "9"] for line in shown.splitlines())


def test_submit_sends_a_priority(
    mosquitto: Mosquitto, serve: Callable[..., Consumer], join: Callable[..., Bus]
) -> None:
    serve("--broker", mosquitto.url, environ={"CESAR_QUEUE__MAX_PRIORITY": "5"})
    bus = join(mosquitto.port)
    arguments = ("submit", "--broker", mosquitto.url, "--by-path", "--no-wait", "--job-id", "note", "speech.wav")
    assert command(*arguments, "--priority", "7").returncode == 0
    assert bus.wait("cesar/jobs")["priority"] == 7
    assert bus.status("note", "queued")["priority"] == 5, "as far as it is allowed"
    assert command(*arguments, "--priority", "10").returncode == 2
