"""Consumers that share one queue on a NATS server: a job from its request to its final status."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, words
from tests.nats_server import NatsServer

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
