"""Speech-to-text in the Wyoming protocol, with that project's own client, in front of a real consumer."""

import asyncio
import json
import re
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.error import Error
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping, Pong

from tests.acceptance.harness import SPEECH, SPOKEN, Bus, Consumer, FrontDoor, wait_until, words
from tests.conftest import PATIENCE_S, Mosquitto, find_free_port

pytestmark = pytest.mark.mosquitto

Serve = Callable[..., Consumer]


def _utterance() -> list[Event]:
    with wave.open(str(SPEECH)) as file:
        samples = file.readframes(file.getnframes())
    shape: dict[str, Any] = {"rate": 16_000, "width": 2, "channels": 1}
    chunks = [AudioChunk(audio=samples[n : n + 2048], **shape).event() for n in range(0, len(samples), 2048)]
    return [AudioStart(**shape).event(), *chunks, AudioStop().event()]


def ask(port: int, *events: Event, answers: int = 1) -> list[Event | None]:
    """Send events over one connection and return so many answers; None: the connection was closed."""

    async def talk() -> list[Event | None]:
        async with AsyncTcpClient("127.0.0.1", port) as client, asyncio.timeout(PATIENCE_S):
            for event in events:
                await client.write_event(event)
            return [await client.read_event() for _ in range(answers)]

    return asyncio.run(talk())


def knows_a_consumer(port: int) -> bool:
    """Whether the server has received what a consumer publishes, as other clients may have before it."""
    described, *_ = ask(port, Describe().event())
    assert described is not None
    return "tiny.en" in {model.name for program in Info.from_event(described).asr for model in program.models}


def said(event: Event | None) -> str:
    assert event is not None
    return Transcript.from_event(event).text


def error(event: Event | None) -> Error:
    assert event is not None
    return Error.from_event(event)


@pytest.mark.model
def test_an_utterance_is_a_job_of_a_high_priority_and_its_transcript_the_answer(
    mosquitto: Mosquitto, serve: Serve, join: Callable[..., Bus]
) -> None:
    port = find_free_port()
    consumer = serve("--broker", mosquitto.url, "--wyoming", f"127.0.0.1:{port}")
    consumer.wait_for_log("Wyoming is on ")
    bus = join(mosquitto.port)
    wait_until(lambda: knows_a_consumer(port))

    described, pong = ask(port, Describe().event(), Ping(text="a").event(), answers=2)
    assert described is not None
    (program,) = Info.from_event(described).asr
    models = {model.name: model.languages for model in program.models}
    assert models["tiny.en"] == ["en"]
    assert {"de", "en"} <= set(models["base"])
    assert next(iter(models)) == "tiny.en"  # the default comes first
    assert pong is not None
    assert Pong.from_event(pong).text == "a"

    asked = Transcribe(name="tiny.en", language="en", transcript_names=["Kitchen lamp", "plumber"]).event()
    first, second = ask(port, asked, *_utterance(), *_utterance(), answers=2)
    assert [words(said(first)), words(said(second))] == [SPOKEN, SPOKEN]
    assert first is not None
    assert Transcript.from_event(first).language == "en"
    status = bus.every_status()[-1]
    assert (status["priority"], status["metadata"], status["audio_source"]) == (9, {"source": "wyoming"}, "upload")
    assert re.fullmatch(r"wyoming-[0-9a-f]{16}", status["job_id"])
    assert consumer.stop() == 0


def test_a_client_learns_why_there_is_no_transcript_and_waits_no_longer(
    mosquitto: Mosquitto, serve: Serve, join: Callable[..., Bus]
) -> None:
    port = find_free_port()
    limits = {"CESAR_WYOMING__TIMEOUT": "5"}
    consumer = serve("--broker", mosquitto.url, "--wyoming", f"127.0.0.1:{port}", environ=limits)
    consumer.wait_for_log("Wyoming is on ")
    bus = join(mosquitto.port)
    wait_until(lambda: knows_a_consumer(port))

    refused, end = ask(port, Transcribe(language="tlh").event(), *_utterance(), answers=2)
    assert "is not a language that Whisper knows" in error(refused).text
    assert end is None

    bus.publish("cesar/request/pause", "")
    bus.wait("cesar/response/pause")
    late, end = ask(port, *_utterance(), answers=2)
    assert error(late).code == "timeout"
    assert end is None
    accepted = bus.wait("cesar/events", lambda event: event["event_type"] == "queued")
    assert bus.status(accepted["job_id"], "cancelled")["attempt"] == 0
    silence, *_ = ask(port, AudioStart(16_000, 2, 1).event(), AudioStop().event())
    assert said(silence) == ""


def test_what_a_client_sends_is_bounded_and_nonsense_ends_its_connection_only(
    mosquitto: Mosquitto, serve: Serve
) -> None:
    port = find_free_port()
    consumer = serve("--broker", mosquitto.url, "--wyoming", f"127.0.0.1:{port}")
    consumer.wait_for_log("Wyoming is on ")

    async def send(payload: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(PATIENCE_S):
            writer.write(payload)
            received = await reader.read()
        writer.close()
        return received

    greedy = json.dumps({"type": "audio-chunk", "payload_length": 1 << 40}).encode() + b"\n"
    deep = b"[" * 500_000 + b"\n"
    wrong = (
        deep,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00" * 4096 + b"\n",
        b'{"type": "transcribe", "data": 7}\n',
        b"[]\n",
        greedy,
    )
    for nonsense in wrong:
        assert asyncio.run(send(nonsense)) == b"", nonsense
    second = AudioChunk(rate=16_000, width=2, channels=1, audio=bytes(32_000)).event()
    long, *_ = ask(port, AudioStart(16_000, 2, 1).event(), *[second] * 301)
    assert error(long).code == "too_long"
    described, *_ = ask(port, Describe().event())
    assert described is not None
    assert consumer.stop() == 0
    assert "Traceback" not in consumer.logged()


@pytest.mark.model
@pytest.mark.parametrize("keep", [False, True])
def test_a_client_that_leaves_cancels_its_job_unless_it_is_kept(
    mosquitto: Mosquitto, serve: Serve, join: Callable[..., Bus], *, keep: bool
) -> None:
    port = find_free_port()
    settings = {"CESAR_WYOMING__KEEP_JOBS": str(keep).lower()}
    consumer = serve("--broker", mosquitto.url, "--wyoming", f"127.0.0.1:{port}", environ=settings)
    consumer.wait_for_log("Wyoming is on ")
    bus = join(mosquitto.port)
    wait_until(lambda: knows_a_consumer(port))
    bus.publish("cesar/request/pause", "")
    bus.wait("cesar/response/pause")

    ask(port, *_utterance(), answers=0)
    accepted = bus.wait("cesar/events", lambda event: event["event_type"] == "queued")
    if keep:
        bus.publish("cesar/request/resume", "")
        assert words(bus.status(accepted["job_id"], "completed")["result_text"]) == SPOKEN
    else:
        assert bus.status(accepted["job_id"], "cancelled")["attempt"] == 0


def test_samples_that_would_fill_the_memory_and_silent_clients_shut_nobody_out(
    mosquitto: Mosquitto, serve: Serve
) -> None:
    port = find_free_port()
    consumer = serve("--broker", mosquitto.url, "--wyoming", f"127.0.0.1:{port}")
    consumer.wait_for_log("Wyoming is on ")
    bombs: list[tuple[int, int, int]] = [(1, 2, 1), (0, 2, 1), (16_000, 0, 1), (16_000, 2, 3), (1 << 40, 2, 1)]
    for rate, width, channels in bombs:
        event = AudioChunk(rate=rate, width=width, channels=channels, audio=bytes(1 << 20)).event()
        (end,) = ask(port, AudioStart(rate, width, channels).event(), event)
        assert end is None

    async def crowd() -> Event | None:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        try:
            async with AsyncTcpClient("127.0.0.1", port) as client, asyncio.timeout(PATIENCE_S):
                await client.write_event(Describe().event())
                described: Event | None = await client.read_event()
            ended = [await reader.read() for reader, _ in silent[:8]]
            assert ended == [b""] * 8
            return described
        finally:
            for _, writer in silent:
                writer.close()

    described = asyncio.run(crowd())
    assert described is not None
    assert Info.from_event(described).asr[0].name == "cesar-mqtt"
    assert consumer.stop() == 0
    assert "Traceback" not in consumer.logged()
    assert "exception was never retrieved" not in consumer.logged()


@pytest.mark.model
def test_the_server_runs_beside_a_consumer_and_says_when_there_is_none(
    tmp_path: Path, mosquitto: Mosquitto, serve: Serve
) -> None:
    port = find_free_port()
    door = FrontDoor(tmp_path, "wyoming", f"127.0.0.1:{port}", "--broker", mosquitto.url, ready="Wyoming is on ")
    try:
        none, end = ask(port, *_utterance(), answers=2)
        assert error(none).code == "no_consumer"
        assert end is None

        serve("--broker", mosquitto.url)
        wait_until(lambda: knows_a_consumer(port))
        answer, *_ = ask(port, *_utterance())
        assert words(said(answer)) == SPOKEN
        assert door.stop() == 0
    finally:
        if door.process.poll() is None:
            door.kill()
