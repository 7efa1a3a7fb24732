from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cesar_mqtt.audio.decoder import SAMPLE_RATE, Samples
from cesar_mqtt.whisper import batched
from cesar_mqtt.whisper.batched import transcribe_batched


def raw(start: float, end: float, text: str, **values: object) -> SimpleNamespace:
    usual = {"avg_logprob": -0.25, "no_speech_prob": 0.01, "compression_ratio": 1.2, "words": None}
    return SimpleNamespace(start=start, end=end, text=text, **usual | values)


class FakeModel:
    """Stands in for WhisperModel: gets to 20 s of each piece, and in the plain pipeline yields one more segment."""

    frames_per_second = 100

    def __init__(self, *, reached_s: float = 20.0) -> None:
        self.reached_s = reached_s
        self.calls: list[dict[str, Any]] = []
        self.transcribed_s: list[float] = []

    def _split_segments_by_timestamps(self, **_: object) -> tuple[list[object], int, bool]:
        return [], int(self.reached_s * self.frames_per_second), False

    def transcribe(self, samples: Samples, **options: Any) -> tuple[Iterator[SimpleNamespace], None]:
        self.calls.append(options)
        self.transcribed_s.append(len(samples) / SAMPLE_RATE)
        word = SimpleNamespace(start=0.5, end=0.75, word=" remainder")
        return iter([raw(0.5, 1.0, " remainder", words=[word])]), None


class FakePipeline:
    """Stands in for faster-whisper's: yields one segment for each piece, and has the model split it up."""

    made: list["FakePipeline"]

    def __init__(self, model: Any) -> None:
        self.model = model
        self.options: dict[str, Any] = {}
        FakePipeline.made.append(self)

    def transcribe(self, _: Samples, **options: Any) -> tuple[Iterator[SimpleNamespace], SimpleNamespace]:
        self.options = options
        return self._segments(options["clip_timestamps"]), SimpleNamespace(language=options["language"] or "de")

    def _segments(self, pieces: list[dict[str, float]]) -> Iterator[SimpleNamespace]:
        for piece in pieces:  # as the real one: the whole batch first
            self.model._split_segments_by_timestamps(
                time_offset=piece["start"], segment_duration=piece["end"] - piece["start"]
            )
        for piece in pieces:
            yield raw(piece["start"] + 1.0, piece["start"] + 2.0, f" from {piece['start']:.0f}")


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePipeline.made = []
    monkeypatch.setattr(batched, "BatchedInferencePipeline", FakePipeline)
    monkeypatch.setattr(
        batched, "split", lambda samples, limit: [(s, s + limit) for s in range(0, len(samples), limit)]
    )


def transcribe(model: FakeModel, *, duration_s: float, batch_size: int = 2, language: str | None = None) -> list[Any]:
    samples = np.zeros(int(duration_s * SAMPLE_RATE), np.float32)
    whisper: Any = model
    segments, _ = transcribe_batched(
        whisper, samples, language, vad_filter=False, batch_size=batch_size, options={"beam_size": 3, "hotwords": None}
    )
    return list(segments)


def test_the_remainder_of_a_piece_is_transcribed_if_the_model_did_not_get_to_its_end() -> None:
    model = FakeModel()
    found = transcribe(model, duration_s=90.0)
    assert [(segment.start, segment.end, segment.text) for segment in found] == [
        (1.0, 2.0, " from 0"),
        (20.5, 20.75, " remainder"),
        (31.0, 32.0, " from 30"),
        (50.5, 50.75, " remainder"),
        (61.0, 62.0, " from 60"),
        (80.5, 80.75, " remainder"),
    ]
    assert model.transcribed_s == [10.0, 10.0, 10.0]
    assert [(word.start, word.end) for word in found[1].words] == [(20.5, 20.75)]


@pytest.mark.parametrize(("reached_s", "remainders"), [(29.7, 3), (29.85, 0), (30.0, 0)])
def test_less_than_a_word_at_the_end_is_not_missed(reached_s: float, remainders: int) -> None:
    model = FakeModel(reached_s=reached_s)
    transcribe(model, duration_s=90.0)
    assert len(model.transcribed_s) == remainders


def test_pieces_are_transcribed_in_batches_and_the_language_is_detected_in_the_first() -> None:
    model = FakeModel()
    transcribe(model, duration_s=150.0)
    assert [len(pipeline.options["clip_timestamps"]) for pipeline in FakePipeline.made] == [2, 2, 1]
    assert [pipeline.options["batch_size"] for pipeline in FakePipeline.made] == [2, 2, 1]
    assert [pipeline.options["language"] for pipeline in FakePipeline.made] == [None, "de", "de"]
    assert {pipeline.options["without_timestamps"] for pipeline in FakePipeline.made} == {False}
    assert {options["language"] for options in model.calls} == {"de"}
    assert {(options["beam_size"], options["vad_filter"]) for options in model.calls} == {(3, False)}


def test_a_batch_is_started_once_the_one_before_was_taken() -> None:
    model: Any = FakeModel()
    samples = np.zeros(150 * SAMPLE_RATE, np.float32)
    segments, info = transcribe_batched(model, samples, "en", vad_filter=False, batch_size=2, options={})
    assert (info.language, len(FakePipeline.made)) == ("en", 1)
    next(segments)
    assert len(FakePipeline.made) == 1
    list(segments)
    assert len(FakePipeline.made) == 3


def test_what_the_model_makes_up_for_silence_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = [
        raw(0, 1, " Hello."),
        raw(1, 2, "  "),
        raw(2, 3, " you", no_speech_prob=0.9, avg_logprob=-1.2),
        raw(3, 4, " bit of a bit of a", no_speech_prob=0.9, compression_ratio=5.0),
        raw(4, 5, " quiet, but clear", no_speech_prob=0.9, avg_logprob=-0.5),
        raw(5, 6, " mumbled", no_speech_prob=0.1, avg_logprob=-1.2),
        raw(6, 7, " la la la la", no_speech_prob=0.1, compression_ratio=5.0),
    ]
    monkeypatch.setattr(FakePipeline, "_segments", lambda _self, _pieces: iter(heard))
    found = transcribe(FakeModel(), duration_s=30.0)
    assert [segment.text.split()[0] for segment in found] == ["Hello.", "quiet,", "mumbled", "la"]


def test_without_speech_the_model_is_not_called() -> None:
    model: Any = FakeModel()
    segments, info = transcribe_batched(
        model, np.zeros(60 * SAMPLE_RATE, np.float32), None, vad_filter=True, batch_size=2, options={}
    )
    assert (list(segments), info) == ([], None)
    assert FakePipeline.made == []
