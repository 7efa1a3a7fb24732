"""Two languages through the multilingual model that comes with the extra `offline`."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.transcript import Transcript, TranscriptionOptions
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.conftest import report_missing

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
    options = TranscriptionOptions("base", language=language)
    recording = transcriber.open(DATA / f"{name}.ogg", options)
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


def test_a_language_that_is_given_is_certain(transcriber: Transcriber) -> None:
    transcript = heard(transcriber, "spanish", "es")
    assert (transcript.language, transcript.language_probability) == ("es", 1.0)
    assert "lunes" in transcript.text
