"""Who speaks, through the command as a process: by voice and by channel, and what a failure costs."""

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.acceptance.harness import SMALL, SPEECH, SPOKEN, Bus, Consumer, wait_until, words
from tests.conftest import Mosquitto
from tests.diarization import MODELS_DIRECTORY, needs_diarization
from tests.recordings import decode, write_wav

pytestmark = [pytest.mark.model, pytest.mark.mosquitto]

Serve = Callable[..., Consumer]
Join = Callable[..., Bus]
WITH_MODELS = SMALL | {"CESAR_MODELS__DIRECTORY": str(MODELS_DIRECTORY)}
GERMAN = SPEECH.with_name("german.ogg")
FORMATS = ["txt", "srt", "vtt", "json", "md"]


def result(bus: Bus, job_id: str, name: str) -> str:
    """The newest file of a job in one format."""
    topic = f"cesar/result/{job_id}/{name}"
    wait_until(lambda: any(message.topic == topic for message in bus.messages))
    return [message.payload.decode() for message in bus.messages if message.topic == topic][-1]


def call(path: Path) -> Path:
    """Make a telephone call: a side on each channel, the second one after the first, which leaks into its channel."""
    voice = decode(SPEECH)[0]
    silence = np.zeros(len(voice) + 8_000, np.float32)
    left, right = np.concatenate((voice, silence)), np.concatenate((silence, voice))
    stereo = np.stack((left, right + 0.05 * left), axis=1)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes((stereo * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    return path


def completed(bus: Bus, job_id: str, attempt: int) -> dict[str, Any]:
    return bus.wait(
        f"cesar/status/{job_id}", lambda status: status["status"] == "completed" and status["attempt"] == attempt
    )


def test_each_side_of_a_call_is_a_speaker_in_every_format(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    folder = tmp_path / "calls"
    folder.mkdir()
    call(folder / "call.wav")
    serve("--broker", mosquitto.url, "--audio-dir", str(folder))
    bus = join(mosquitto.port)
    asked = {"audio_path": "call.wav", "diarize": "channels", "formats": FORMATS, "word_timestamps": True}
    bus.publish("cesar/jobs", json.dumps({"job_id": "call", **asked}))
    status = bus.status("call")
    assert (status["status"], status["speakers"], status["diarization_error"]) == ("completed", 2, None)
    assert words(status["result_text"]) == SPOKEN * 2

    segments = json.loads(result(bus, "call", "json"))["segments"]
    assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
    assert all(word["speaker"] == segment["speaker"] for segment in segments for word in segment["words"])
    for speaker in ("Speaker 1", "Speaker 2"):
        spoken = " ".join(segment["text"] for segment in segments if segment["speaker"] == speaker)
        assert words(spoken) == SPOKEN
    lines = result(bus, "call", "txt").splitlines()
    assert [line.partition(": ")[0] for line in lines] == [segment["speaker"] for segment in segments]
    for name, mark in (("srt", "Speaker {}: "), ("vtt", "<v Speaker {}>"), ("md", "## Speaker {}, 00:00:0")):
        text = result(bus, "call", name)
        assert 0 < text.index(mark.format(1)) < text.index(mark.format(2))


def test_missing_and_damaged_models_cost_no_text_and_a_retry_repeats_the_diarization_alone(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    own = {"CESAR_MODELS__DIRECTORY": str(tmp_path), "CESAR_MODELS__DOWNLOAD": "false"}
    consumer = serve("--broker", mosquitto.url, environ=own)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", json.dumps({"job_id": "a", "audio_path": "speech.wav", "diarize": True}))
    status = bus.status("a")
    assert (status["status"], status["error_code"], status["speakers"]) == ("completed", None, None)
    assert words(status["result_text"]) == SPOKEN
    assert "diarization_failed" in status["warnings"]
    assert "are not on this machine, and may not be downloaded" in status["diarization_error"]

    damaged = tmp_path / "diarization"
    damaged.mkdir()
    for name in ("segmentation.onnx", "embedding.onnx"):
        (damaged / name).write_bytes(b"no model")
    bus.publish("cesar/request/retry", json.dumps({"job_id": "a"}))
    again = completed(bus, "a", 2)
    assert "is damaged, or another one" in again["diarization_error"]
    assert bus.states("a") == ["queued", "processing", "completed", "queued", "processing", "completed"]
    seen = bus.seen("cesar/status/a")
    first = next(number for number, each in enumerate(seen) if each["status"] == "completed")
    assert {each["result_text"] for each in seen[first:]} == {status["result_text"]}
    assert consumer.logged().count("Job transcribed") == 1


@needs_diarization
def test_a_kill_in_the_diarization_costs_no_text_and_nothing_is_transcribed_again(
    mosquitto: Mosquitto, serve: Serve, join: Join
) -> None:
    consumer = serve("--broker", mosquitto.url, environ=WITH_MODELS)
    bus = join(mosquitto.port)
    asked = {"audio_path": "long.ogg", "diarize": True, "max_speakers": 1, "formats": ["json"]}
    bus.publish("cesar/jobs", json.dumps({"job_id": "long", **asked}))
    bus.wait("cesar/status/long", lambda status: "diarization_progress" in status)
    consumer.kill()
    consumer.start()
    status = completed(bus, "long", 1)
    text = status["result_text"]
    assert words(text)
    assert status["diarization_error"].startswith("The process died while it told the speakers apart")
    assert "diarization_failed" in status["warnings"]
    assert all("speaker" not in each for each in json.loads(result(bus, "long", "json"))["segments"])

    bus.publish("cesar/request/retry", json.dumps({"job_id": "long"}))
    done = completed(bus, "long", 2)
    assert (done["speakers"], done["diarization_error"], done["result_text"]) == (1, None, text)
    assert "diarization_failed" not in done["warnings"]
    wait_until(lambda: '"Speaker 1"' in result(bus, "long", "json"))
    assert consumer.logged().count("Job transcribed") == 1
    after_the_kill = [each["result_text"] for each in bus.seen("cesar/status/long")][-4:]
    assert set(after_the_kill) == {text}


@needs_diarization
def test_a_diarization_is_cancelled_and_continued_by_a_retry(mosquitto: Mosquitto, serve: Serve, join: Join) -> None:
    consumer = serve("--broker", mosquitto.url, environ=WITH_MODELS)
    bus = join(mosquitto.port)
    bus.publish("cesar/jobs", json.dumps({"job_id": "long", "audio_path": "long.ogg", "diarize": True}))
    bus.wait("cesar/status/long", lambda status: "diarization_progress" in status)
    bus.publish("cesar/request/cancel", json.dumps({"job_id": "long"}))
    cancelled = bus.status("long")
    assert (cancelled["status"], bool(cancelled["result_text"])) == ("cancelled", True)
    bus.publish("cesar/request/retry", json.dumps({"job_id": "long"}))
    done = completed(bus, "long", 2)
    assert (done["result_text"], done["diarization_error"]) == (cancelled["result_text"], None)
    assert done["speakers"] >= 1
    assert consumer.logged().count("Job transcribed") == 1


@needs_diarization
def test_a_known_voice_has_its_name_in_every_format_and_another_one_a_number(
    mosquitto: Mosquitto, serve: Serve, join: Join, tmp_path: Path
) -> None:
    voices, audio = tmp_path / "voices", tmp_path / "audio"
    voices.mkdir()
    audio.mkdir()
    speech = decode(SPEECH)[0]
    half = len(speech) // 2
    write_wav(voices / "Ada Lovelace.wav", speech[:half], 16_000)
    write_wav(audio / "ada.wav", np.tile(speech[half:], 2), 16_000)
    write_wav(audio / "other.wav", decode(GERMAN)[0], 16_000)
    known = {"CESAR_SPEAKERS__DIRECTORY": str(voices)}
    serve("--broker", mosquitto.url, "--audio-dir", str(audio), environ=WITH_MODELS | known)
    bus = join(mosquitto.port)
    for name in ("ada", "other"):
        asked = {"audio_path": f"{name}.wav", "diarize": True, "formats": ["txt", "vtt", "json"]}
        asked["word_timestamps"] = True
        bus.publish("cesar/jobs", json.dumps({"job_id": name, **asked}))
    for name, speaker in (("ada", "Ada Lovelace"), ("other", "Speaker 1")):
        status = bus.status(name)
        assert (status["status"], status["speakers"], status["diarization_error"]) == ("completed", 1, None)
        segments = json.loads(result(bus, name, "json"))["segments"]
        assert {segment["speaker"] for segment in segments} == {speaker}
        assert {word["speaker"] for segment in segments for word in segment["words"]} == {speaker}
        assert result(bus, name, "txt").startswith(f"{speaker}: ")
        assert f"<v {speaker}>" in result(bus, name, "vtt")
