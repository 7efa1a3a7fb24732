"""The metrics of a whole consumer over HTTP, and the log lines of each job."""

import json
import signal
import socket
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cesar_mqtt.errors import ExitCode
from tests.acceptance.harness import SPEECH, Bus, Consumer, command, wait_until
from tests.conftest import PATIENCE_S, find_free_port

pytestmark = pytest.mark.model


def scrape(port: int) -> dict[str, float]:
    """Return every value by its name and the values of its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def test_a_consumer_serves_its_metrics_and_logs_every_job_with_action_and_id(
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
    bus.wait("cesar/rejected", lambda rejected: rejected["reason"] == "malformed_json" or rejected["job_id"] is None)
    wait_until(lambda: scrape(port)["cesar_jobs_processing"] == 0)  # the last status is published before
    metrics = scrape(port)
    assert metrics["cesar_jobs_total completed"] == 1
    assert metrics["cesar_jobs_total error"] == 2, "one failed, one was rejected and recorded"
    assert metrics["cesar_job_errors_total audio_not_found"] == 1
    assert metrics["cesar_rejected_total invalid_request"] >= 1
    assert metrics["cesar_job_work_seconds_count"] == metrics["cesar_job_wait_seconds_count"] == 2
    assert metrics["cesar_audio_seconds_total"] > 1
    assert metrics["cesar_job_speed_ratio"] > 0
    assert metrics["cesar_model_loads_total tiny.en"] == 1
    assert metrics["cesar_fsync_seconds_count ledger"] > 3
    assert metrics["cesar_fsync_seconds_count spool"] > 0
    assert metrics["cesar_broker_connected"] == metrics["cesar_worker_alive"] == 1
    assert metrics["cesar_jobs_queued"] == metrics["cesar_jobs_processing"] == 0
    assert metrics["cesar_ledger_bytes journal"] > 0
    assert metrics["cesar_rss_bytes"] > 1 << 20
    consumer.signal(signal.SIGTERM)
    assert consumer.wait() == ExitCode.OK
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    lines = [json.loads(line) for line in consumer.logged().splitlines() if '"logger": "cesar_mqtt' in line]
    check_log(lines)


def check_log(lines: list[dict[str, Any]]) -> None:
    logged = {(line.get("job_id"), line.get("action")) for line in lines}
    assert {("speech", "taken_in"), ("speech", "started"), ("speech", "completed")} <= logged
    assert {("lost", "taken_in"), ("lost", "started"), ("lost", "failed"), ("wrong", "rejected")} <= logged
    for line in lines:
        about = [name for name in ("speech", "lost", "wrong") if name in line["message"].split()]
        assert not about or ("action" in line and line["job_id"] in about), line


def test_a_taken_port_ends_the_start_with_an_error_that_names_it(serve: Callable[..., Consumer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        consumer = serve(
            *("--broker", f"embedded://127.0.0.1:{find_free_port()}"),
            environ={"CESAR_METRICS__PORT": str(port)},
            ready=None,
        )
        assert consumer.wait() == ExitCode.CONFIG
    assert f"metrics.port {port} on 127.0.0.1 cannot be opened" in consumer.logged()


def test_an_invalid_port_ends_the_start_before_anything_is_opened() -> None:
    refused = command("serve", environ={"CESAR_METRICS__PORT": "70000"})
    assert refused.returncode == ExitCode.CONFIG
    assert "CESAR_METRICS__PORT" in refused.stderr
