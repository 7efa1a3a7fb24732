"""`output.directory` on a bus where any client may publish anything."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from cesar_mqtt.config import BrokerSettings, OutputSettings
from cesar_mqtt.gateway.transcript_writer import TranscriptWriter
from cesar_mqtt.protocol.topics import Topics
from tests.conftest import PATIENCE_S, Mosquitto

LATER = "2099-01-01T00:00:00.000Z"

pytestmark = pytest.mark.mosquitto


class FakeConsumer:
    """It is online, and answers the command `result` with what `pages` returns for a format and an offset."""

    def __init__(self, port: int) -> None:
        self.pages: Callable[[str, int], dict[str, Any]] = lambda name, _: {"text": f"{name}.\n", "more": False}
        self.asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe("cesar/request/result", qos=1)
        assert subscribed.wait(PATIENCE_S)
        self.publish("cesar/consumer/cesar/state", {"state": "online"})

    def _on_message(self, client: Client, _userdata: object, message: MQTTMessage) -> None:
        request = json.loads(message.payload)
        data = self.pages(request["format"], request["offset"])
        answer = {"status": "ok", "data": data, "error": None, "transaction": request["transaction"]}
        client.publish("cesar/response/result", json.dumps(answer), qos=1)
        self.asked.put(request)

    def publish(self, topic: str, document: object) -> None:
        self._client.publish(topic, json.dumps(document), qos=1, retain=True).wait_for_publish(PATIENCE_S)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def consumer(mosquitto: Mosquitto) -> Iterator[FakeConsumer]:
    made = FakeConsumer(mosquitto.port)
    yield made
    made.close()


@pytest.fixture
def writer(mosquitto: Mosquitto, consumer: FakeConsumer, tmp_path: Path) -> Iterator[TranscriptWriter]:
    assert consumer
    made = TranscriptWriter(
        OutputSettings(directory=tmp_path / "texts", formats=("txt", "srt", "md")),
        BrokerSettings(url=mosquitto.url),
        Topics("cesar", "cesar"),
        data_dir=tmp_path / "data",
        has_inbox=False,
    )
    made.start()
    assert made._bus.wait_connected(PATIENCE_S) is not None
    yield made
    assert made.alive
    made.close()


def completed(**fields: Any) -> dict[str, Any]:
    return {"status": "completed", "completed_at": LATER, "audio_source": "upload", "formats": [], **fields}


def wait_for(path: Path) -> bytes:
    pause = threading.Event()
    for _ in range(int(PATIENCE_S * 20)):
        if path.exists():
            return path.read_bytes()
        pause.wait(0.05)
    pytest.fail(f"{path} was not written; there is {sorted(path.parent.parent.rglob('*'))}")


def test_hostile_statuses_and_responses_write_nothing_elsewhere_and_stop_nothing(
    writer: TranscriptWriter, consumer: FakeConsumer, tmp_path: Path
) -> None:
    hostile: tuple[dict[str, Any], ...] = (
        {"metadata": {"file": "../../../escaped.wav"}, "formats": ["../../../escaped", "srt", 7]},
        {"metadata": [], "formats": "txt", "consumer": ["a"]},
        {"metadata": {"file": ["a"]}, "audio_source": "http://[", "formats": None},
        {"audio_source": 7, "completed_at": 9},
    )
    for number, fields in enumerate(hostile):
        consumer.publish(f"cesar/status/hostile-{number}", completed(**fields))
    for nonsense in ({"text": 7, "more": False}, {"text": "", "more": True}, {}):
        consumer.pages = lambda *_, page=nonsense: page
        consumer.publish(f"cesar/status/bad-{len(nonsense)}-{nonsense.get('text')}", completed())
        assert consumer.asked.get(timeout=PATIENCE_S)
    consumer.pages = lambda name, offset: (
        {"text": f"{name} ü", "more": True} if not offset else {"text": f"+{offset}", "more": False}
    )
    consumer.publish("cesar/status/good", completed(audio_source="porch/talk.wav", formats=["srt"]))

    assert wait_for(tmp_path / "texts" / "talk.srt") == "srt ü+6".encode()
    assert wait_for(tmp_path / "texts" / "talk.txt") == "txt ü+6".encode()
    assert wait_for(tmp_path / "texts" / "talk.md") == "md ü+5".encode()
    assert not list(tmp_path.glob("escaped*"))
    assert {path.parent for path in tmp_path.rglob("*.srt")} == {tmp_path / "texts"}
    assert writer.alive
