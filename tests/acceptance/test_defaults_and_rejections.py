"""`set`, `rejected`, `retry_last` and `cancel_all` on mosquitto, with a real consumer that is stopped and started."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, command, words
from tests.conftest import Mosquitto

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]


def ask(bus: Bus, name: str, **fields: Any) -> dict[str, Any]:
    transaction = f"{name}-{len(bus.seen(f'cesar/response/{name}'))}"
    bus.publish(f"cesar/request/{name}", {**fields, "transaction": transaction})
    return bus.wait(f"cesar/response/{name}", lambda response: response["transaction"] == transaction)


def test_defaults_last_over_a_restart_and_count_for_jobs_that_name_none(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url)
    assert "knows English only" in consumer.logged()
    bus = join(mosquitto.port)
    refused = ask(bus, "set", default_language="de")
    assert refused["error"] == "Nothing was set: the default model 'tiny.en' knows English only, and not 'de'."
    assert ask(bus, "set", default_language="English")["data"]["default_language"] == "en"
    bus.wait("cesar/consumer/cesar/info", lambda info: info["default_language"] == "en")
    assert consumer.stop() == 0
    read = len(consumer.logged())
    consumer.start()
    assert "knows English only" not in consumer.logged()[read:]
    bus.publish("cesar/audio/note", SPEECH.read_bytes())
    end = bus.status("note")
    assert (end["language"], end["detected_language"], end["warnings"]) == ("en", "en", [])
    assert words(end["result_text"]) == SPOKEN
    assert ask(bus, "set", default_model="nonsense")["status"] == "error"
    assert ask(bus, "set", default_model="base")["data"] == {
        "default_model": "base",
        "default_language": "en",
        "consumer": "cesar",
    }
    assert ask(bus, "models")["data"]["default"] == "base"
    bus.publish("cesar/jobs", {"job_id": "later", "audio_path": "missing.wav"})
    assert bus.status("later")["model_size"] == "base"
    assert consumer.stop() == 0


def test_what_failed_is_retried_and_what_waits_is_cancelled_at_once(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    serve("--broker", mosquitto.url, "--audio-dir", str(tmp_path))
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", {"job_id": "early", "audio_path": "early.wav"})
    assert bus.status("early")["error_code"] == "audio_not_found"
    shutil.copy(SPEECH, tmp_path / "early.wav")
    assert ask(bus, "retry_last")["data"] == {"job_id": "early", "status": "queued", "consumer": "cesar"}
    assert words(bus.status("early", "completed")["result_text"]) == SPOKEN
    assert ask(bus, "retry_last")["status"] == "error"

    ask(bus, "pause")
    for number in range(20):
        bus.publish("cesar/jobs", {"job_id": f"job-{number}", "audio_path": "early.wav"})
    assert ask(bus, "cancel_all")["data"] == {"cancelled": 20, "processing": None, "consumer": "cesar"}
    for number in range(20):
        assert bus.status(f"job-{number}")["status"] == "cancelled"
    assert {event["event_type"] for event in bus.seen("cesar/events") if event["job_id"] == "job-7"} >= {"cancelled"}


def test_rejections_are_shown_with_their_reasons_and_without_secrets(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    serve("--broker", mosquitto.url)
    bus = join(mosquitto.port)
    none = command("rejected", "--broker", mosquitto.url)
    assert (none.returncode, none.stdout) == (0, "Nothing was rejected since the consumer's start.\n")
    bus.publish("cesar/jobs", "{")
    bus.publish("cesar/jobs", {"job_id": "a", "path": "a.wav", "audio_url": "http://user:PASSWORD@host/a?token=SECRET"})
    bus.wait("cesar/rejected", lambda rejection: rejection["reason"] == "invalid_request")
    data = ask(bus, "rejected")["data"]
    assert [each["reason"] for each in data["rejected"]] == ["invalid_request", "malformed_json"]
    assert data["total"] == 2
    shown = command("rejected", "--broker", mosquitto.url, "--limit", "1")
    assert (shown.returncode, shown.stderr) == (
        0,
        "cesar-mqtt: 2 messages in all; a consumer keeps the newest 100 since its start.\n",
    )
    assert "did you mean audio_path" in shown.stdout
    lines = command("rejected", "--broker", mosquitto.url, "--json").stdout.splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["invalid_request", "malformed_json"]
    assert not any(secret in json.dumps(data) + shown.stdout for secret in ("PASSWORD", "SECRET"))
