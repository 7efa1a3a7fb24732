"""Two languages through the multilingual model that comes with the extra `offline`."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.samples import SAMPLE_RATE
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.transcript import Transcript, TranscriptionOptions
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.conftest import report_missing
from tests.recordings import decode, write_wav

pytestmark = [pytest.mark.model]

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transcriber]:
    store = ModelStore(ModelSettings(download=False), folder=tmp_path_factory.mktemp("models"))
    here = {model.name for model in store.describe().models if model.origin is not None}
    if "base" not in here:
        report_missing("the extra offline is not installed")
    yield Transcriber(store, AudioSettings())
    store.unload()


def heard(transcriber: Transcriber, name: str, language: str | None = None) -> Transcript:
    return heard_in(transcriber, DATA / f"{name}.ogg", language)


def heard_in(transcriber: Transcriber, path: Path, language: str | None = None) -> Transcript:
    options = TranscriptionOptions("base", language=language)
    recording = transcriber.open(path, options)
    try:
        return transcriber.transcribe(
            recording,
            options,
            on_progress=lambda _: None,
            on_segment=lambda _: None,
            on_window=lambda _: None,
            should_stop=lambda: False,
        )
    finally:
        recording.close()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(("name", "code"), [("german", "de"), ("spanish", "es")])
def test_a_language_is_detected_and_its_words_are_transcribed(name: str, code: str, transcriber: Transcriber) -> None:
    transcript = heard(transcriber, name)
    expected = words((DATA / f"{name}.txt").read_text())
    missed = [word for word in expected if word not in words(transcript.text)]
    assert transcript.language == code
    assert transcript.language_probability is not None
    assert transcript.language_probability > 0.5
    assert len(missed) <= len(expected) // 5, transcript.text


@pytest.mark.parametrize("first", ["english", "german"])
def test_a_change_of_the_language_that_nobody_announced_is_followed(
    first: str, transcriber: Transcriber, tmp_path: Path
) -> None:
    english, other = decode(DATA / "long.ogg")[0][: 12 * SAMPLE_RATE], "spanish" if first == "english" else "german"
    foreign = decode(DATA / f"{other}.ogg")[0]
    parts = [english, foreign, foreign] if first == "english" else [foreign, english]
    path = write_wav(tmp_path / "a.wav", np.concatenate(parts), SAMPLE_RATE)
    text = words(heard_in(transcriber, path).text)
    spoken = words((DATA / f"{other}.txt").read_text())
    assert len(set(spoken) & set(text)) >= len(set(spoken)) * 2 // 3, text
    assert {"recording", "message", "writes"} <= set(text)


def test_a_language_that_is_given_is_certain(transcriber: Transcriber) -> None:
    transcript = heard(transcriber, "spanish", "es")
    assert (transcript.language, transcript.language_probability) == ("es", 1.0)
    assert "lunes" in transcript.text
