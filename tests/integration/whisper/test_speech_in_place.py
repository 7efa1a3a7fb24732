"""What the real models make of speech that is decoded range by range, each encoded at its own length."""

from pathlib import Path

import numpy as np
import pytest

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.vad import Range, speech_probabilities, speech_ranges
from cesar_mqtt.config import ModelSettings
from cesar_mqtt.errors import JobFailedError
from cesar_mqtt.transcript import TranscriptionOptions
from cesar_mqtt.whisper.chunk import RawSegment
from cesar_mqtt.whisper.decoding import Language
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.pipeline import Pipeline
from tests.conftest import report_missing

DATA = Path(__file__).resolve().parents[2] / "data"

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def store() -> ModelStore:
    return ModelStore(ModelSettings(download=False, cpu_threads=1))


def decode(name: str) -> Samples:
    with open_audio(DATA / name, AudioLimits(max_bytes=1 << 30, max_duration_s=600.0)) as audio:
        return np.concatenate(list(audio.blocks()))


def silence(duration_s: float) -> Samples:
    return np.zeros(round(duration_s * SAMPLE_RATE), np.float32)


def transcribe(
    store: ModelStore, samples: Samples, options: TranscriptionOptions, *, short: bool = True
) -> tuple[list[RawSegment], Language | None]:
    try:
        model = store.load(options.model_size)
    except JobFailedError:
        report_missing(f"the model {options.model_size} is not on this machine")
    pipeline = Pipeline(model, options, device="cpu", should_stop=lambda: False, short_encoder_input=short)
    speech: tuple[Range, ...] = ((0, len(samples)),)
    if options.vad_filter:
        speech = speech_ranges(speech_probabilities(samples), len(samples))
    segments, language = pipeline.transcribe(samples, speech, options.language)
    return list(segments), language


def text(segments: list[RawSegment]) -> str:
    return "".join(segment.text for segment in segments).strip().lower()


@pytest.mark.parametrize("model", ["tiny.en", "base"])
def test_no_segment_and_no_word_spans_silence_that_was_left_out(model: str, store: ModelStore) -> None:
    options = TranscriptionOptions(model, language="en", word_timestamps=True)
    segments, _ = transcribe(store, decode("gap20.flac"), options)
    times = [(one.start, one.end) for segment in segments for one in (segment, *(segment.words or ()))]
    assert all(end < 6.0 or start > 25.0 for start, end in times)
    before = [segment for segment in segments if segment.end < 6.0]
    assert before[-1].end == pytest.approx(5.5, abs=0.5)
    assert "before it rains" in text(before)
    assert "ticket" in text(segments[len(before) :])


def test_words_have_the_same_times_when_the_encoder_is_given_less(store: ModelStore) -> None:
    options = TranscriptionOptions("tiny.en", language="en", word_timestamps=True)
    found = [transcribe(store, decode("speech.wav"), options, short=short)[0] for short in (True, False)]
    short, full = ([word for segment in segments for word in segment.words or ()] for segments in found)
    assert [word.word for word in short] == [word.word for word in full]
    assert [word.start for word in short] == pytest.approx([word.start for word in full], abs=0.25)
    assert [word.end for word in short] == pytest.approx([word.end for word in full], abs=0.25)


def test_the_language_may_change_within_a_recording(store: ModelStore) -> None:
    samples = np.concatenate([decode("spanish.ogg"), silence(0.7), decode("speech.wav")])
    segments, _ = transcribe(store, samples, TranscriptionOptions("base", multilingual=True))
    assert "lunes" in text(segments)
    assert "plumber" in text(segments)
    assert "lamp" in text(segments)


def test_a_language_that_was_detected_elsewhere_does_not_turn_a_range_into_nonsense(store: ModelStore) -> None:
    model = store.load("base")
    pipeline = Pipeline(model, TranscriptionOptions("base"), device="cpu", should_stop=lambda: False)
    samples = decode("speech.wav")
    segments, language = pipeline.transcribe(samples, [(0, len(samples))], "es")  # as in a Spanish recording
    assert "plumber" in text(list(segments))
    assert language == ("es", 1.0)  # what the other windows are given stays


@pytest.mark.parametrize("model", ["tiny.en", "base"])
@pytest.mark.parametrize("loudness", [0.0, 0.01, 0.3])
def test_without_the_vad_silence_and_noise_yield_no_text(model: str, loudness: float, store: ModelStore) -> None:
    noise = np.random.default_rng(1).normal(scale=loudness, size=5 * SAMPLE_RATE).astype(np.float32)
    segments, _ = transcribe(
        store, noise, TranscriptionOptions(model, language="en", vad_filter=False, temperature=0.0)
    )
    assert segments == []
