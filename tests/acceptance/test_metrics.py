"""The numbers of a whole consumer over HTTP, and what its log says of each job."""

import json
import signal
import socket
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cesar_mqtt.errors import ExitCode
from tests.acceptance.harness import SPEECH, Bus, Consumer, command
from tests.conftest import find_free_port

pytestmark = pytest.mark.model


def scrape(port: int) -> dict[str, float]:
    """Every number by its name, with the values of its labels behind it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def test_a_consumer_tells_its_numbers_and_logs_every_job_with_action_and_id(
    serve: Callable[..., Consumer], join: Callable[..., Bus]
) -> None:
    broker_port, port = find_free_port(), find_free_port()
    consumer = serve(
        *("--broker", f"embedded://127.0.0.1:{broker_port}", "--log-format", "json", "--log-level", "debug"),
        environ={"CESAR_METRICS__PORT": str(port)},
    )
    bus = join(broker_port)
    bus.publish("cesar/audio/speech", SPEECH.read_bytes())
    bus.publish("cesar/jobs", {"job_id": "lost", "audio_path": "lost.wav"})
    bus.publish("cesar/jobs", {"job_id": "wrong", "audio_path": "a.wav", "beam_sise": 5})
    bus.publish("cesar/jobs", "[1]")
    bus.status("speech")
    bus.status("lost")
    bus.wait("cesar/rejected", lambda refused: refused["reason"] == "malformed_json" or refused["job_id"] is None)
    told = scrape(port)
    assert told["cesar_jobs_total completed"] == 1
    assert told["cesar_jobs_total error"] == 2, "one failed, one was recorded although it was refused"
    assert told["cesar_job_errors_total audio_not_found"] == 1
    assert told["cesar_rejected_total invalid_request"] >= 1
    assert told["cesar_job_work_seconds_count"] == told["cesar_job_wait_seconds_count"] == 2
    assert told["cesar_audio_seconds_total"] > 1
    assert told["cesar_job_speed_ratio"] > 0
    assert told["cesar_model_loads_total tiny.en"] == 1
    assert told["cesar_fsync_seconds_count ledger"] > 3
    assert told["cesar_fsync_seconds_count spool"] > 0
    assert told["cesar_broker_connected"] == told["cesar_worker_alive"] == 1
    assert told["cesar_jobs_queued"] == told["cesar_jobs_processing"] == 0
    assert told["cesar_ledger_bytes journal"] > 0
    assert told["cesar_rss_bytes"] > 1 << 20
    consumer.signal(signal.SIGTERM)
    assert consumer.wait() == ExitCode.OK
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    lines = [json.loads(line) for line in consumer.logged().splitlines() if '"logger": "cesar_mqtt' in line]
    check_log(lines)


def check_log(lines: list[dict[str, Any]]) -> None:
    said = {(line.get("job_id"), line.get("action")) for line in lines}
    assert {("speech", "taken_in"), ("speech", "started"), ("speech", "completed")} <= said
    assert {("lost", "taken_in"), ("lost", "started"), ("lost", "failed"), ("wrong", "rejected")} <= said
    for line in lines:
        about = [name for name in ("speech", "lost", "wrong") if name in line["message"].split()]
        assert not about or ("action" in line and line["job_id"] in about), line


def test_a_taken_port_ends_the_start_with_a_sentence_that_names_it(serve: Callable[..., Consumer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        consumer = serve(
            *("--broker", f"embedded://127.0.0.1:{find_free_port()}"),
            environ={"CESAR_METRICS__PORT": str(port)},
            ready=None,
        )
        assert consumer.wait() == ExitCode.CONFIG
    assert f"metrics.port {port} on 127.0.0.1 cannot be opened" in consumer.logged()


def test_a_port_that_is_none_is_refused_before_anything_is_opened() -> None:
    refused = command("serve", environ={"CESAR_METRICS__PORT": "70000"})
    assert refused.returncode == ExitCode.CONFIG
    assert "CESAR_METRICS__PORT" in refused.stderr
