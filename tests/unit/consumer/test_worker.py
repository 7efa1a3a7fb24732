import dataclasses
import errno
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cesar_mqtt.audio.paths import resolve_audio_path
from cesar_mqtt.consumer.events import JobEvents, JobObserver
from cesar_mqtt.consumer.progress import ProgressMeter
from cesar_mqtt.consumer.worker import Worker
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError, LedgerError, Preempted
from cesar_mqtt.jobs import Job, JobState
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.payloads import JobProgress
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window
from cesar_mqtt.whisper.onnx_models import DiarizationError
from cesar_mqtt.whisper.speakers import LabelledWindows
from tests import factories
from tests.conftest import PATIENCE_S

if TYPE_CHECKING:
    from cesar_mqtt.consumer.prefetch import Prefetcher

HELLO = Transcript(
    text="Hello there.",
    language="en",
    language_probability=0.97,
    no_speech=False,
    audio_duration_s=2.5,
    windows=(factories.window(0, factories.segment(text="Hello there."), until_s=2.5, language_probability=0.97),),
    warnings=("audio_truncated",),
)


@dataclass
class Call:
    """The arguments of one transcription."""

    path: Path
    options: TranscriptionOptions
    done: Sequence[Window]
    on_progress: Callable[[Progress], None]
    on_segment: Callable[[Segment], None]
    on_window: Callable[[Window], None]
    should_stop: Callable[[], bool]
    should_yield: Callable[[], bool]


def say_hello(call: Call) -> Transcript:
    """What a transcriber does with a recording of `HELLO`, or with one of which all windows are `done`."""
    windows = tuple(call.done) or HELLO.windows
    for segment in () if call.done else HELLO.windows[0].segments:
        if call.should_stop():
            raise Cancelled
        call.on_segment(segment)
    if call.should_stop():
        raise Cancelled
    call.on_progress(Progress(HELLO.audio_duration_s, HELLO.audio_duration_s))
    return dataclasses.replace(HELLO, windows=windows)


class FakeTranscriber:
    """Returns what `script` returns, and records the calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.script: Callable[[Call], Transcript] = say_hello
        self.warm_ups: list[str] = []
        self.warm_up_error: Exception | None = None

    def transcribe(
        self,
        recording: Any,
        options: TranscriptionOptions,
        *,
        done: Sequence[Window],
        on_progress: Callable[[Progress], None],
        on_segment: Callable[[Segment], None],
        on_window: Callable[[Window], None],
        should_stop: Callable[[], bool],
        should_yield: Callable[[], bool],
    ) -> Transcript:
        self.calls.append(Call(recording, options, done, on_progress, on_segment, on_window, should_stop, should_yield))
        return self.script(self.calls[-1])

    def warm_up(self, model_size: str) -> None:
        self.warm_ups.append(model_size)
        if self.warm_up_error is not None:
            raise self.warm_up_error


class FakePrefetcher:
    """Hands out the path of a job's audio as its recording, and records the releases."""

    def __init__(self, spool: Spool, directory: Path) -> None:
        self._spool = spool
        self._directory = directory
        self.released: list[tuple[str, bool]] = []
        self.audio: str | None = None
        self.looking: Callable[[], object] = lambda: None

    def take(self, job: Job, should_stop: Callable[[], bool]) -> Any:
        if should_stop():
            raise Cancelled
        if job.audio is None:
            raise JobFailedError(ErrorCode.INTERNAL, "The job has no audio. Submit it again.")
        if job.audio.kind == "spool":
            path = self._spool.path(job.audio.name)
            if not path.exists():
                raise JobFailedError(ErrorCode.AUDIO_NOT_FOUND, "The recording is gone from the spool.")
            return ClosablePath(path)
        return ClosablePath(resolve_audio_path(job.audio.name, [self._directory]))

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        if should_stop():
            raise Cancelled
        self.looking()
        return self.audio

    def release(self, job: Job, *, final: bool) -> None:
        self.released.append((job.job_id, final))


class FakeObserver(JobObserver):
    """Records the events; `until` waits for one."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self._changed = threading.Condition()

    def _add(self, what: object) -> None:
        with self._changed:
            self.received.append(what)
            self._changed.notify_all()

    def on_activity_changed(self, activity: Activity) -> None:
        self._add(activity)

    def on_degraded(self, thread: str, *, on: bool) -> None:
        if on or (thread, True) in self.received:
            self._add((thread, on))

    def on_progress(self, job: Job, live: JobProgress) -> None:
        self._add((job.job_id, live))

    def on_segment(self, job: Job, segment: Segment) -> None:
        self._add((job.job_id, segment))

    def on_finished(self, job: Job) -> None:
        self._add(job)

    @property
    def ended(self) -> list[Job]:
        return [what for what in self.received if isinstance(what, Job)]

    def until(self, satisfied: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(satisfied, PATIENCE_S), self.received


class RefusingDisk(Disk):
    """A real disk that refuses to write `refusals` times."""

    refusals = 0.0

    def write(self, descriptor: int, data: bytes | memoryview, offset: int) -> int:
        if self.refusals > 0:
            self.refusals -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().write(descriptor, data, offset)


class RacingLedger(Ledger):
    """A real ledger that runs a competing call at the worst moment, once."""

    before_claim: Callable[[], object] | None = None
    after_processing: Callable[[], object] | None = None

    def claim(self) -> Job | None:
        racer, self.before_claim = self.before_claim, None
        if racer is not None:
            racer()
        return super().claim()

    def processing(self) -> tuple[int, ...]:
        found = super().processing()
        racer, self.after_processing = self.after_processing, None
        if racer is not None:
            racer()
        return found


def one_speaker(windows: Sequence[Window], _should_stop: Callable[[], bool]) -> LabelledWindows:
    """What a labeller does with a recording in which one person speaks."""
    labelled = tuple(
        dataclasses.replace(
            window,
            segments=tuple(dataclasses.replace(segment, speaker="Speaker 1") for segment in window.segments),
        )
        for window in windows
    )
    return LabelledWindows(labelled, 1)


class FakeLabeller:
    """Returns what `script` returns, and counts the calls; its recordings are paths, as those of the transcriber."""

    def __init__(self) -> None:
        self.calls = 0
        self.script: Callable[[Sequence[Window], Callable[[], bool]], LabelledWindows] = one_speaker

    def label(
        self,
        _recording: object,
        options: TranscriptionOptions,
        windows: Sequence[Window],
        *,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> LabelledWindows:
        assert options.diarize
        assert options.word_timestamps
        self.calls += 1
        on_progress(1.25)
        return self.script(windows, should_stop)


class ClosablePath(type(Path())):  # type: ignore[misc]
    """What stands for a recording, where the worker closes it before the diarization."""

    def close(self) -> None:
        pass

    def wait_until_open(self, should_stop: Callable[[], bool]) -> None:
        pass


class Bench:
    """A worker with a fake transcriber between a real ledger and spool."""

    def __init__(self, folder: Path, *, warm_up: str | None = None) -> None:
        self.folder = folder
        self.disk = RefusingDisk()
        self.ledger = RacingLedger(folder / "ledger.json", disk=self.disk)
        self.spool = Spool(folder / "spool")
        self.audio = folder / "audio"
        self.audio.mkdir(exist_ok=True)
        (self.audio / "porch.wav").write_bytes(b"RIFF")
        (folder / "secret.wav").write_bytes(b"RIFF")
        self.transcriber = FakeTranscriber()
        self.observer = FakeObserver()
        self.prefetcher = FakePrefetcher(self.spool, self.audio)
        self.labeller = FakeLabeller()
        self.worker = self.make_worker(warm_up=warm_up)

    def make_worker(self, **settings: Any) -> Worker:
        return Worker(
            self.ledger,
            self.transcriber,
            prefetcher=cast("Prefetcher", self.prefetcher),
            labeller=self.labeller,
            spool=self.spool,
            events=JobEvents(self.observer),
            **settings,
        )

    def add(self, *job_ids: str, path: str = "porch.wav", **fields: Any) -> None:
        for job_id in job_ids:
            self.ledger.append([factories.new_job(job_id, path, **fields)])

    def add_upload(self, job_id: str) -> Path:
        [name] = self.spool.store([b"RIFF"])
        self.ledger.append([factories.new_job(job_id, name, kind="spool")])
        return self.spool.path(name)

    def job(self, job_id: str) -> Job:
        job = self.ledger.get(job_id)
        assert job is not None
        return job

    def fails_with(self, error: Exception) -> None:
        def script(_call: Call) -> Transcript:
            raise error

        self.transcriber.script = script

    def blocks(self) -> "Gate":
        """Let each transcription wait until the gate is opened."""
        gate = Gate()

        def script(_call: Call) -> Transcript:
            gate.entered.set()
            assert gate.opened.wait(PATIENCE_S)
            return HELLO

        self.transcriber.script = script
        return gate


class Gate:
    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()


@contextmanager
def opened(folder: Path, *, warm_up: str | None = None) -> Iterator[Bench]:
    bench = Bench(folder, warm_up=warm_up)
    try:
        yield bench
    finally:
        bench.disk.refusals = 0
        bench.worker.request_stop()
        assert bench.worker.join(PATIENCE_S)
        bench.ledger.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with opened(tmp_path) as bench:
        yield bench


@pytest.fixture
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.worker._DISK_RETRY_S", 0.001)


@pytest.fixture
def _endless_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cesar_mqtt.consumer.worker._DISK_RETRY_S", 3600.0)


# -- one job -------------------------------------------------------------------------------------------------------


def test_run_once_without_a_ready_job_returns_false(bench: Bench) -> None:
    assert bench.worker.run_once() is False
    assert bench.observer.received == []


@pytest.mark.parametrize(("kept", "beam_size"), [({}, 5), ({"beam_size": "auto"}, "auto"), ({"beam_size": 1}, 1)])
def test_a_job_without_a_beam_size_is_of_version_1_and_has_its_default(
    bench: Bench, kept: dict[str, object], beam_size: int | str
) -> None:
    bench.add("a", options=kept)
    bench.worker.run_once()
    assert bench.transcriber.calls[-1].options.beam_size == beam_size


@pytest.mark.parametrize(
    ("formats", "options", "timed"),
    [
        (("srt",), {}, True),
        (("json", "vtt"), {}, True),
        (("txt", "tsv", "json"), {}, False),
        ((), {"word_timestamps": True}, True),
    ],
)
def test_the_times_of_words_are_computed_where_subtitles_need_them(
    bench: Bench, formats: tuple[str, ...], options: dict[str, bool], *, timed: bool
) -> None:
    bench.add("a", formats=formats, options=options)
    bench.worker.run_once()
    assert bench.transcriber.calls[-1].options.word_timestamps is timed


def test_run_once_processes_a_job_to_its_end(bench: Bench) -> None:
    bench.add(
        "a", options={"language": "de", "task": "translate", "initial_prompt": "x", "beam_size": 2, "vad_filter": False}
    )
    assert bench.worker.run_once() is True
    job = bench.job("a")
    assert job.state is JobState.COMPLETED
    assert job.attempt == 1
    assert job.result_text == "Hello there."
    assert job.detected_language == "en"
    assert job.language_probability == 0.97
    assert job.no_speech is False
    assert job.audio_duration == 2.5
    assert job.warnings == ("audio_truncated",)
    [call] = bench.transcriber.calls
    assert call.path == bench.audio / "porch.wav"
    assert call.options == TranscriptionOptions("base", "de", "translate", "x", 2, vad_filter=False)


def test_the_claim_is_on_disk_before_the_transcription_and_the_end_before_the_report(bench: Bench) -> None:
    bench.add("a")
    seen: list[tuple[JobState, int]] = []

    def script(_call: Call) -> Transcript:
        seen.append((bench.job("a").state, bench.job("a").attempt))
        return HELLO

    bench.transcriber.script = script
    bench.worker.run_once()
    assert seen == [(JobState.PROCESSING, 1)]
    assert bench.observer.ended == [bench.job("a")]
    assert bench.observer.ended[0].state is JobState.COMPLETED


def test_jobs_run_oldest_first(bench: Bench) -> None:
    bench.add("c", "a", "b")
    while bench.worker.run_once():
        pass
    assert [job.job_id for job in bench.observer.ended] == ["c", "a", "b"]


def test_silence_is_recorded_as_no_speech(bench: Bench) -> None:
    silence = dataclasses.replace(HELLO, text="", language=None, language_probability=None, no_speech=True, windows=())
    bench.transcriber.script = lambda _call: silence
    bench.add("a")
    bench.worker.run_once()
    job = bench.job("a")
    assert (job.state, job.result_text, job.no_speech, job.detected_language) == (JobState.COMPLETED, "", True, None)


def test_the_activity_is_reported_around_each_job_even_when_it_fails(bench: Bench) -> None:
    bench.add("a")
    bench.worker.run_once()
    bench.fails_with(RuntimeError("x"))
    bench.add("b")
    bench.worker.run_once()
    assert [what for what in bench.observer.received if isinstance(what, str)] == ["processing", "idle"] * 2


def test_no_transcript_reaches_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.add("a", options={"initial_prompt": "Passwort"})
    with caplog.at_level(logging.DEBUG):
        bench.worker.run_once()
    assert "completed" in caplog.text
    assert "Hello" not in caplog.text
    assert "Passwort" not in caplog.text


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ErrorCode)
def test_a_failed_job_has_the_error_code_and_message_of_the_failure(bench: Bench, code: ErrorCode) -> None:
    bench.fails_with(JobFailedError(code, "Do something about it."))
    bench.add("a")
    bench.worker.run_once()
    job = bench.job("a")
    assert (job.state, job.error_code, job.error_message) == (JobState.ERROR, code, "Do something about it.")
    assert bench.observer.ended == [job]
    assert job.result_text is None


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nothing.wav", ErrorCode.AUDIO_NOT_FOUND),
        ("../secret.wav", ErrorCode.AUDIO_NOT_ALLOWED),
        ("/etc/passwd", ErrorCode.AUDIO_NOT_ALLOWED),
        ("a\0b", ErrorCode.AUDIO_NOT_ALLOWED),
    ],
)
def test_a_path_that_cannot_be_used_never_reaches_the_transcriber(bench: Bench, path: str, code: ErrorCode) -> None:
    bench.add("a", path=path)
    bench.worker.run_once()
    assert bench.job("a").error_code is code
    assert bench.transcriber.calls == []
    assert str(bench.folder) not in (bench.job("a").error_message or "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA: /secret/path broke"),
        MemoryError("/secret/path"),
        OSError(errno.EIO, "Input/output error", "/secret/path"),
        KeyError("/secret/path"),
        RecursionError("/secret/path"),
        LookupError(),
    ],
)
def test_an_unexpected_error_ends_the_job_without_its_details_and_the_next_job_completes(
    bench: Bench, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bench.add("a", "b")
    bench.fails_with(error)
    bench.worker.run_once()
    job = bench.job("a")
    assert (job.state, job.error_code) == (JobState.ERROR, ErrorCode.INTERNAL)
    assert job.error_message == "The transcription failed unexpectedly; see the consumer's log. Retry, or report it."
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]
    bench.transcriber.script = lambda _call: HELLO
    bench.worker.run_once()
    assert bench.job("b").state is JobState.COMPLETED


def test_a_job_without_audio_or_with_options_of_a_later_version_fails_by_itself(bench: Bench) -> None:
    bench.ledger.append([factories.new_job("a", None)])
    bench.add("b", options={"voice": "x"})
    bench.add("c")
    while bench.worker.run_once():
        pass
    assert [job.error_code for job in bench.observer.ended] == [ErrorCode.INTERNAL, ErrorCode.INTERNAL, None]


@pytest.mark.parametrize(
    "unwritable",
    [
        dataclasses.replace(HELLO, audio_duration_s=math.nan),
        dataclasses.replace(HELLO, language_probability=math.inf),
        None,
    ],
)
def test_a_result_that_the_ledger_cannot_store_ends_the_job_and_not_the_worker(
    bench: Bench, unwritable: Transcript
) -> None:
    bench.transcriber.script = lambda _call: unwritable
    bench.add("a", "b")
    bench.worker.run_once()
    assert (bench.job("a").state, bench.job("a").error_code) == (JobState.ERROR, ErrorCode.INTERNAL)
    bench.transcriber.script = lambda _call: HELLO
    bench.worker.run_once()
    assert bench.job("b").state is JobState.COMPLETED


def test_surrogates_are_replaced_before_they_are_stored(bench: Bench) -> None:
    bench.fails_with(JobFailedError(ErrorCode.AUDIO_UNREADABLE, "caf\udce9.wav cannot be read."))
    bench.add("a", "b")
    bench.worker.run_once()
    bench.transcriber.script = lambda _call: dataclasses.replace(HELLO, text="Hello \ud83d.")
    bench.worker.run_once()
    assert bench.job("a").error_message == "caf?.wav cannot be read."
    assert bench.job("b").result_text == "Hello ?."


# -- the spool -----------------------------------------------------------------------------------------------------


def test_an_upload_is_read_from_the_spool_and_removed_once_its_transcript_is_on_disk(bench: Bench) -> None:
    path = bench.add_upload("a")
    states = []

    def script(call: Call) -> Transcript:
        states.append((call.path, call.path.exists()))
        return HELLO

    bench.transcriber.script = script
    bench.worker.run_once()
    assert states == [(path, True)]
    assert bench.job("a").state is JobState.COMPLETED
    assert not path.exists()


@pytest.mark.parametrize("code", ErrorCode)
def test_an_upload_is_kept_exactly_as_long_as_a_retry_may_help(bench: Bench, code: ErrorCode) -> None:
    path = bench.add_upload("a")
    bench.fails_with(JobFailedError(code, "It failed."))
    bench.worker.run_once()
    assert path.exists() is code.retryable
    assert bench.ledger.needed_spool_files() == ({path.name} if code.retryable else set())


def test_a_file_given_by_path_is_never_removed(bench: Bench) -> None:
    bench.add("a")
    bench.worker.run_once()
    assert (bench.audio / "porch.wav").exists()


def test_an_upload_is_kept_when_the_job_is_requeued(bench: Bench) -> None:
    path = bench.add_upload("a")

    def script(_call: Call) -> Transcript:
        bench.worker.abandon()
        return HELLO

    bench.transcriber.script = script
    bench.worker.run_once()
    assert bench.job("a").state is JobState.QUEUED
    assert path.exists()


# -- a disk that refuses -------------------------------------------------------------------------------------------


def test_a_claim_that_the_disk_refuses_starts_nothing_and_the_job_stays_queued(bench: Bench) -> None:
    bench.add("a")
    bench.disk.refusals = 1
    with pytest.raises(LedgerError):
        bench.worker.run_once()
    assert bench.transcriber.calls == []
    assert (bench.job("a").state, bench.job("a").attempt) == (JobState.QUEUED, 0)
    bench.worker.run_once()
    assert (bench.job("a").state, bench.job("a").attempt) == (JobState.COMPLETED, 1)


@pytest.mark.usefixtures("_quick_retries")
def test_the_thread_repeats_a_refused_claim_until_the_disk_takes_it(bench: Bench) -> None:
    bench.add("a")
    bench.disk.refusals = 3
    bench.worker.start()
    bench.observer.until(lambda: bench.observer.ended)
    assert bench.job("a").attempt == 1
    assert len(bench.transcriber.calls) == 1
    assert bench.observer.received[:4] == ["idle", *[("worker", True)] * 3]
    assert bench.observer.received.index(("worker", False)) < bench.observer.received.index("processing")


@pytest.mark.usefixtures("_quick_retries")
@pytest.mark.parametrize("error", [None, JobFailedError(ErrorCode.AUDIO_EMPTY, "It is empty.")])
def test_an_end_that_the_disk_refuses_is_persisted_later_and_the_audio_is_transcribed_once(
    bench: Bench, error: Exception | None
) -> None:
    bench.add("a", "b")

    def script(_call: Call) -> Transcript:
        bench.disk.refusals = 3
        if error is not None:
            raise error
        return HELLO

    bench.transcriber.script = script
    bench.worker.run_once()
    assert bench.job("a").state is (JobState.COMPLETED if error is None else JobState.ERROR)
    assert len(bench.transcriber.calls) == 1
    assert len(bench.observer.ended) == 1
    degradations = [what for what in bench.observer.received if type(what) is tuple]  # a job is a named tuple
    assert degradations == [*[("worker", True)] * 3, ("worker", False)]
    assert bench.job("b").state is JobState.QUEUED


@pytest.mark.usefixtures("_endless_retries")
def test_a_stop_while_a_claim_is_refused_ends_at_once(bench: Bench) -> None:
    bench.add("a")
    bench.disk.refusals = math.inf
    bench.worker.start()
    bench.observer.until(lambda: ("worker", True) in bench.observer.received)
    bench.worker.request_stop()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.QUEUED


@pytest.mark.usefixtures("_endless_retries")
def test_a_forced_stop_while_an_end_is_refused_requeues_the_job(bench: Bench) -> None:
    bench.add("a")

    def script(_call: Call) -> Transcript:
        bench.disk.refusals = 1
        return HELLO

    bench.transcriber.script = script
    bench.worker.start()
    bench.observer.until(lambda: ("worker", True) in bench.observer.received)
    bench.worker.abandon()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.QUEUED
    assert bench.observer.ended == []


@pytest.mark.usefixtures("_endless_retries")
def test_a_forced_stop_ends_the_worker_although_the_disk_refuses_every_write(bench: Bench) -> None:
    bench.add("a")

    def script(_call: Call) -> Transcript:
        bench.disk.refusals = math.inf
        return HELLO

    bench.transcriber.script = script
    bench.worker.start()
    bench.observer.until(lambda: ("worker", True) in bench.observer.received)
    with pytest.raises(LedgerError):
        bench.worker.abandon()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.PROCESSING


# -- stopping ------------------------------------------------------------------------------------------------------


def test_a_stop_lets_the_current_job_finish_and_starts_no_other(bench: Bench) -> None:
    gate = bench.blocks()
    bench.add("a", "b")
    bench.worker.start()
    assert gate.entered.wait(PATIENCE_S)
    bench.worker.request_stop()
    assert not bench.worker.join(0)
    assert not bench.transcriber.calls[0].should_stop()
    gate.opened.set()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.COMPLETED
    assert (bench.job("b").state, bench.job("b").attempt) == (JobState.QUEUED, 0)


def test_a_stop_wakes_a_worker_that_waits_for_work(bench: Bench) -> None:
    bench.worker.start()
    bench.observer.until(lambda: "idle" in bench.observer.received)
    bench.worker.request_stop()
    assert bench.worker.join(PATIENCE_S)


def test_a_worker_that_was_never_started_has_ended(bench: Bench) -> None:
    bench.worker.request_stop()
    assert bench.worker.join(0)


def stops_when_asked(call: Call) -> Transcript:
    while not call.should_stop():
        call.on_progress(Progress(0.5, 2.5))
    raise Cancelled


def test_a_forced_stop_requeues_the_job_at_the_front_and_ends_the_attempt(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.transcriber.script = stops_when_asked
    bench.add("a", "b")
    bench.worker.start()
    bench.observer.until(lambda: [what for what in bench.observer.received if what[0] == "a"])
    bench.worker.abandon()
    assert bench.job("a").state is JobState.QUEUED  # at once, not when the model is done
    assert bench.worker.join(PATIENCE_S)
    job = bench.job("a")
    assert (job.state, job.attempt, job.started_at, job.queue_position) == (JobState.QUEUED, 1, None, 1)
    assert bench.observer.ended == []
    assert len(bench.transcriber.calls) == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("late", [None, RuntimeError("late"), JobFailedError(ErrorCode.AUDIO_EMPTY, "It is empty.")])
def test_the_outcome_of_an_abandoned_job_is_dropped(bench: Bench, late: Exception | None) -> None:
    gate = Gate()

    def script(_call: Call) -> Transcript:
        gate.entered.set()
        assert gate.opened.wait(PATIENCE_S)
        if late is not None:
            raise late
        return HELLO

    bench.transcriber.script = script
    bench.add("a")
    bench.worker.start()
    assert gate.entered.wait(PATIENCE_S)
    bench.worker.abandon()
    gate.opened.set()
    assert bench.worker.join(PATIENCE_S)
    job = bench.job("a")
    assert (job.state, job.result_text, job.error_code) == (JobState.QUEUED, None, None)
    assert bench.observer.ended == []


def test_a_forced_stop_gives_the_job_free_before_the_model_is_done(bench: Bench) -> None:
    gate = bench.blocks()
    bench.add("a")
    bench.worker.start()
    assert gate.entered.wait(PATIENCE_S)
    assert bench.worker.may_run_jobs
    bench.worker.abandon()
    assert not bench.worker.may_run_jobs
    bench.ledger.forget(bench.job("a").seq)  # as a shared queue does, to which it was given back
    gate.opened.set()
    assert bench.worker.join(PATIENCE_S)
    assert bench.observer.ended == []


def test_a_job_that_ends_during_a_forced_stop_stays_final(bench: Bench) -> None:
    bench.add("a")
    job = bench.ledger.claim()
    assert job is not None
    bench.ledger.after_processing = lambda: bench.ledger.complete(job.seq, factories.result())
    bench.worker.abandon()
    assert bench.job("a").state is JobState.COMPLETED


def test_a_result_that_comes_just_after_the_requeue_is_dropped(bench: Bench) -> None:
    bench.add("a")

    def script(_call: Call) -> Transcript:
        bench.ledger.requeue(bench.job("a").seq)  # what `abandon` does, before it is known here
        return HELLO

    bench.transcriber.script = script
    bench.worker.run_once()
    assert bench.job("a").state is JobState.QUEUED
    assert bench.observer.ended == []


def test_a_job_that_is_claimed_during_a_forced_stop_is_requeued_at_once(bench: Bench) -> None:
    bench.add("a")
    bench.ledger.before_claim = bench.worker.abandon
    bench.worker.start()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.QUEUED
    assert bench.transcriber.calls == []


def test_the_next_start_requeues_a_job_whose_requeue_the_disk_refused(bench: Bench) -> None:
    bench.add("a")
    bench.ledger.claim()
    bench.disk.refusals = 1
    with pytest.raises(LedgerError):
        bench.worker.abandon()
    bench.ledger.close()
    with opened(bench.folder) as restarted:
        assert restarted.job("a").state is JobState.QUEUED
        restarted.worker.run_once()
        assert restarted.job("a").state is JobState.COMPLETED
        assert restarted.job("a").attempt == 2


# -- the thread ----------------------------------------------------------------------------------------------------


def test_a_job_starts_as_soon_as_it_is_queued(bench: Bench) -> None:
    gate = bench.blocks()
    gate.opened.set()
    bench.worker.start()
    bench.observer.until(lambda: "idle" in bench.observer.received)
    latencies_s = []
    for number in range(5):
        gate.entered.clear()
        started = time.monotonic()
        bench.add(f"job-{number}")
        assert gate.entered.wait(PATIENCE_S)
        latencies_s.append(time.monotonic() - started)
        bench.observer.until(lambda: len(bench.observer.ended) == number + 1)  # noqa: B023 - called before the next number
    assert min(latencies_s) < 0.25  # polling would take longer


def test_the_thread_processes_all_queued_jobs_one_at_a_time(bench: Bench) -> None:
    at_work = []

    def script(_call: Call) -> Transcript:
        at_work.append(len(bench.ledger.processing()))
        return HELLO

    bench.transcriber.script = script
    bench.add(*(f"job-{number}" for number in range(20)))
    bench.worker.start()
    bench.observer.until(lambda: len(bench.observer.ended) == 20)
    assert [job.job_id for job in bench.observer.ended] == [f"job-{number}" for number in range(20)]
    assert at_work == [1] * 20


def test_the_model_is_loaded_before_the_first_job(tmp_path: Path) -> None:
    with opened(tmp_path, warm_up="tiny.en") as bench:
        bench.add("a")
        bench.worker.start()
        bench.observer.until(lambda: bench.observer.ended)
        assert bench.transcriber.warm_ups == ["tiny.en"]
        assert bench.observer.received[:3] == ["loading", "idle", "processing"]


@pytest.mark.parametrize(
    "error",
    [
        JobFailedError(ErrorCode.MODEL_UNAVAILABLE, "The model is not here."),
        RuntimeError("CUDA driver version is insufficient"),
        MemoryError(),
        ImportError("libcublas"),
    ],
)
def test_a_model_that_cannot_be_warmed_up_does_not_end_the_worker(tmp_path: Path, error: Exception) -> None:
    with opened(tmp_path, warm_up="base") as bench:
        bench.transcriber.warm_up_error = error
        bench.add("a")
        bench.worker.start()
        bench.observer.until(lambda: bench.observer.ended)
        assert bench.observer.received[:2] == ["loading", "idle"]
        assert bench.job("a").state is JobState.COMPLETED


# -- progress ------------------------------------------------------------------------------------------------------


def test_progress_is_reported_for_the_running_job(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        call.on_progress(Progress(0.0, 2.5))
        call.on_progress(Progress(1.0, 2.5))
        return HELLO

    bench.transcriber.script = script
    bench.add("a")
    bench.worker.run_once()
    (first_id, first), (_, second) = (what for what in bench.observer.received if type(what) is tuple)
    assert first_id == "a"
    assert (first.progress, first.processed_duration, first.audio_duration) == (0.0, 0.0, 2.5)
    assert (first.speed, first.eta) == (None, None)
    assert (second.progress, second.processed_duration) == (0.4, 1.0)


def test_speed_and_eta_follow_from_what_is_processed_and_how_long_it_took() -> None:
    lives: list[JobProgress] = []
    clock = iter([100.0, 100.5, 105.0, 110.0])
    meter = ProgressMeter(lives.append, lambda: next(clock))
    for processed_s in (0.0, 20.0, 60.0):
        meter.add(Progress(processed_s, 60.0))
    assert [(live.speed, live.eta) for live in lives] == [(None, None), (4.0, 10.0), (6.0, 0.0)]


def test_what_an_earlier_attempt_processed_does_not_count_as_speed() -> None:
    lives: list[JobProgress] = []
    clock = iter([100.0, 100.5, 110.0])
    meter = ProgressMeter(lives.append, lambda: next(clock))
    for processed_s in (600.0, 650.0):
        meter.add(Progress(processed_s, 700.0))
    assert [(live.progress, live.speed, live.eta) for live in lives] == [(0.857, None, None), (0.929, 5.0, 10.0)]


def test_while_the_duration_is_unknown_progress_is_0() -> None:
    lives: list[JobProgress] = []
    meter = ProgressMeter(lives.append)
    for duration_s in (None, 60.0):
        meter.add(Progress(30.0, duration_s))
    assert [(live.progress, live.processed_duration, live.audio_duration) for live in lives] == [
        (0.0, 30.0, None),
        (0.5, 30.0, 60.0),
    ]


durations = st.just(0.0) | st.floats(0.001, 400_000.0).map(lambda seconds: round(seconds, 3))
steps = st.lists(st.tuples(st.floats(-0.5, 1.5), st.floats(0, 100_000)), min_size=1, max_size=20)


@settings(deadline=None)
@given(durations, steps)
def test_progress_never_goes_back_never_reaches_one_and_always_has_a_finite_eta(
    duration_s: float, processed: list[tuple[float, float]]
) -> None:
    lives: list[Any] = []
    now_s = 1000.0
    meter = ProgressMeter(lives.append, lambda: now_s)
    for share, took_s in processed:
        now_s += took_s
        meter.add(Progress(round(share * duration_s, 3), duration_s))
    assert len(lives) == len(processed)
    assert all(0.0 <= live.progress < 1.0 for live in lives)
    assert [live.progress for live in lives] == sorted(live.progress for live in lives)
    assert [live.processed_duration for live in lives] == sorted(live.processed_duration for live in lives)
    assert all(0.0 <= live.processed_duration <= duration_s for live in lives)
    assert all(live.eta is None or (math.isfinite(live.eta) and live.eta >= 0) for live in lives)
    assert all(live.speed is None or (math.isfinite(live.speed) and live.speed >= 0) for live in lives)


# -- transient failures --------------------------------------------------------------------------------------------


def patient(bench: Bench, retries: int) -> Worker:
    """A worker that tries again, after no time worth waiting for."""
    return bench.make_worker(retries=retries, retry_delay_s=1e-9)


@pytest.mark.parametrize("code", [ErrorCode.AUDIO_IO_ERROR, ErrorCode.MODEL_UNAVAILABLE, ErrorCode.INTERNAL])
def test_a_transient_failure_is_retried_as_often_as_allowed(bench: Bench, code: ErrorCode) -> None:
    worker = patient(bench, retries=2)
    bench.add("a")
    bench.fails_with(JobFailedError(code, "Not now."))
    seen = []
    while worker.run_once():
        seen.append((bench.job("a").state, bench.job("a").retries))
    assert seen == [(JobState.QUEUED, 1), (JobState.QUEUED, 2), (JobState.ERROR, 2)]
    assert bench.job("a").error_code is code
    assert len(bench.transcriber.calls) == 3


@pytest.fixture
def delays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays of all retries, in seconds; none of them is waited for."""
    noted: list[float] = []
    defer = bench.ledger.defer

    def note(seq: int, delay_s: float) -> None:
        noted.append(delay_s)
        defer(seq, 0.0)

    monkeypatch.setattr(bench.ledger, "defer", note)
    return noted


def test_each_retry_waits_four_times_as_long_within_a_fifth(bench: Bench, delays: list[float]) -> None:
    worker = bench.make_worker(retries=3, retry_delay_s=2.0)
    bench.add("a")
    bench.fails_with(JobFailedError(ErrorCode.INTERNAL, "Not now."))
    while worker.run_once():
        pass
    assert delays == [pytest.approx(seconds, rel=0.2) for seconds in (2.0, 8.0, 32.0)]


def test_no_retry_waits_longer_than_an_hour_however_many_there_were(bench: Bench, delays: list[float]) -> None:
    """The delay of the 512th has no number: the worker's thread ended with OverflowError."""
    worker = bench.make_worker(retries=600, retry_delay_s=2.0)
    bench.add("a")
    bench.fails_with(JobFailedError(ErrorCode.INTERNAL, "Not now."))
    while worker.run_once():
        pass
    assert len(delays) == 600
    assert max(delays) <= 1.2 * 3600.0
    patient = bench.make_worker(retries=1, retry_delay_s=86_400.0)
    bench.add("b")
    assert patient.run_once()
    assert delays[-1] == pytest.approx(86_400.0, rel=0.2)


def test_a_permanent_failure_is_not_retried(bench: Bench) -> None:
    worker = patient(bench, retries=2)
    bench.add("a")
    bench.fails_with(JobFailedError(ErrorCode.AUDIO_EMPTY, "It is empty."))
    assert worker.run_once()
    assert bench.job("a").state is JobState.ERROR


def test_a_deferred_job_does_not_hold_up_the_next(bench: Bench) -> None:
    worker = bench.make_worker(retries=1, retry_delay_s=3600.0)
    bench.add("a", "b")
    bench.fails_with(JobFailedError(ErrorCode.MODEL_UNAVAILABLE, "Not now."))
    assert worker.run_once()
    bench.transcriber.script = lambda _call: HELLO
    assert worker.run_once()
    assert not worker.run_once()
    assert (bench.job("a").state, bench.job("b").state) == (JobState.QUEUED, JobState.COMPLETED)


# -- preemption ----------------------------------------------------------------------------------------------------


def two_windows(call: Call) -> Transcript:
    """What a transcriber does with a recording of three windows."""
    for number in range(len(call.done), 2):
        call.on_window(factories.window(number))
        if call.should_yield():
            raise Preempted
    return dataclasses.replace(HELLO, windows=tuple(factories.window(number) for number in range(3)))


def ended_in_order(bench: Bench) -> list[str]:
    return [job.job_id for job in bench.observer.ended]


def test_a_job_of_a_higher_priority_starts_behind_the_window_and_the_running_one_continues_afterwards(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def script(call: Call) -> Transcript:
        if len(bench.transcriber.calls) == 1:
            bench.add("high", "higher", priority=5)
        return two_windows(call)

    bench.transcriber.script = script
    bench.add("low", "later")
    with caplog.at_level(logging.INFO):
        assert bench.worker.run_once()
    waits = bench.job("low")
    assert (waits.state, waits.attempt, waits.crashes, waits.queue_position) == (JobState.QUEUED, 1, 0, 3)
    assert bench.prefetcher.released == [("low", False)]
    assert bench.observer.ended == []
    [line] = [record for record in caplog.records if record.__dict__["action"] == "preempted"]
    assert (line.levelno, line.__dict__["job_id"]) == (logging.INFO, "low")
    assert line.message.endswith("continues at 600.0 s of the recording")
    while bench.worker.run_once():
        pass
    assert ended_in_order(bench) == ["high", "higher", "low", "later"]
    again = bench.transcriber.calls[3]
    assert (again.done, bench.job("low").attempt) == ((factories.window(0),), 2)


def test_an_equal_priority_and_a_stop_let_the_running_job_finish(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        bench.add(f"equal-{len(bench.transcriber.calls)}", priority=2)
        assert not call.should_yield()
        bench.add(f"high-{len(bench.transcriber.calls)}", priority=3)
        assert call.should_yield()
        bench.worker.request_stop()
        assert not call.should_yield(), "no other job is started after a stop"
        return HELLO

    bench.transcriber.script = script
    bench.add("low", priority=2)
    bench.worker.run_once()
    assert bench.job("low").state is JobState.COMPLETED


def test_a_window_that_is_not_on_disk_is_not_given_up_for_a_higher_priority(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        bench.add("high", priority=1)
        bench.disk.refusals = 1
        call.on_window(factories.window(0))
        assert not call.should_yield()
        call.on_window(factories.window(1))
        assert call.should_yield()
        raise Preempted

    bench.transcriber.script = script
    bench.add("low")
    bench.worker.run_once()
    assert len(bench.ledger.windows(bench.job("low").seq)) == 2


def test_a_job_that_is_cancelled_while_it_yields_ends_cancelled(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        call.on_window(factories.window(0))
        bench.ledger.cancel("low")
        raise Preempted

    bench.transcriber.script = script
    bench.add("low")
    bench.worker.run_once()
    assert ended_in_order(bench) == ["low"]
    assert bench.job("low").state is JobState.CANCELLED
    assert bench.prefetcher.released == [("low", True)]


def test_a_forced_stop_while_a_job_yields_requeues_it_once(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        call.on_window(factories.window(0))
        bench.worker.abandon()
        raise Preempted

    bench.transcriber.script = script
    bench.add("low")
    bench.worker.run_once()
    job = bench.job("low")
    assert (job.state, job.attempt, bench.ledger.preempted()) == (JobState.QUEUED, 1, frozenset())


@pytest.mark.usefixtures("_quick_retries")
def test_a_preemption_that_the_disk_refuses_is_persisted_later(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        call.on_window(factories.window(0))
        bench.disk.refusals = 3
        raise Preempted

    bench.transcriber.script = script
    bench.add("low")
    bench.worker.run_once()
    assert bench.job("low").state is JobState.QUEUED
    assert bench.ledger.preempted() == {bench.job("low").seq}


def test_the_upload_of_a_preempted_job_is_kept(bench: Bench) -> None:
    path = bench.add_upload("low")

    def script(call: Call) -> Transcript:
        if len(bench.transcriber.calls) == 1:
            bench.add("high", priority=1)
        assert path.exists()
        return two_windows(call)

    bench.transcriber.script = script
    while bench.worker.run_once():
        pass
    assert ended_in_order(bench) == ["high", "low"]
    assert not path.exists()


# -- cancel and timeout --------------------------------------------------------------------------------------------


def stops_when_cancelled(call: Call) -> Transcript:
    if call.should_stop():
        raise Cancelled
    return HELLO


def test_a_running_job_that_is_cancelled_ends_cancelled_and_the_next_one_starts(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        if len(bench.transcriber.calls) == 1:
            bench.ledger.cancel("a")
        return stops_when_cancelled(call)

    bench.transcriber.script = script
    bench.add("a", "b")
    assert bench.worker.run_once()
    assert bench.worker.run_once()
    assert (bench.job("a").state, bench.job("b").state) == (JobState.CANCELLED, JobState.COMPLETED)
    assert bench.job("a").error_code is None
    assert [job.job_id for job in bench.observer.ended] == ["a", "b"]
    assert bench.prefetcher.released == [("a", True), ("b", True)]


def test_a_cancelled_upload_keeps_its_audio_for_a_retry(bench: Bench) -> None:
    def script(_call: Call) -> Transcript:
        bench.ledger.cancel("a")
        raise Cancelled

    path = bench.add_upload("a")
    bench.transcriber.script = script
    bench.worker.run_once()
    assert path.exists()
    bench.transcriber.script = lambda _call: HELLO
    bench.ledger.retry("a")
    bench.worker.run_once()
    assert bench.job("a").state is JobState.COMPLETED
    assert not path.exists()


def test_a_job_that_completes_although_it_was_cancelled_is_completed(bench: Bench) -> None:
    def script(_call: Call) -> Transcript:
        bench.ledger.cancel("a")
        return HELLO

    bench.transcriber.script = script
    bench.add("a")
    bench.worker.run_once()
    assert bench.job("a").state is JobState.COMPLETED
    assert not bench.ledger.is_cancelling(bench.job("a").seq)


def test_a_job_over_its_timeout_ends_with_an_error_that_names_the_limit(bench: Bench) -> None:
    now_s = 100.0

    stops = []

    def script(call: Call) -> Transcript:
        nonlocal now_s
        stops.append(call.should_stop())
        now_s += 61.0
        return stops_when_cancelled(call)

    bench.transcriber.script = script
    bench.add("a", "b")
    worker = bench.make_worker(timeout_s=60.0, monotonic=lambda: now_s, retries=2)
    worker.run_once()
    job = bench.job("a")
    assert stops == [False], "the limit counts from the start of the attempt"
    assert (job.state, job.error_code) == (JobState.ERROR, ErrorCode.TIMEOUT)
    assert "worker.job_timeout, 60.0 s" in (job.error_message or "")


def test_a_cancel_while_the_audio_is_fetched_ends_the_job(bench: Bench) -> None:
    bench.add("a")
    claim = bench.ledger.claim

    def cancelled_at_once() -> Job | None:
        job = claim()
        bench.ledger.cancel("a")
        return job

    bench.ledger.claim = cancelled_at_once  # type: ignore[method-assign]
    bench.worker.run_once()
    assert bench.job("a").state is JobState.CANCELLED
    assert bench.transcriber.calls == []


# -- windows and segments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audio", [None, "the same"])
def test_the_next_attempt_resumes_behind_the_finished_windows(bench: Bench, audio: str | None) -> None:
    def script(call: Call) -> Transcript:
        if len(call.done) < 2:
            call.on_window(factories.window(len(call.done)))
            raise JobFailedError(ErrorCode.INTERNAL, "Not now.")
        return dataclasses.replace(HELLO, windows=(*call.done, factories.window(2)))

    bench.transcriber.script = script
    bench.prefetcher.audio = audio
    bench.add("a")
    worker = patient(bench, retries=2)
    for _ in range(3):
        worker.run_once()
    assert [call.done for call in bench.transcriber.calls] == [
        (),
        (factories.window(0),),
        (factories.window(0), factories.window(1)),
    ]
    assert bench.job("a").state is JobState.COMPLETED


def broken_off(bench: Bench, before: str | None) -> Worker:
    """Work on a job that fails behind two windows of an audio, and then find another one there."""

    def script(call: Call) -> Transcript:
        if len(bench.transcriber.calls) == 1:
            call.on_window(factories.window(0))
            call.on_window(factories.window(1))
            raise JobFailedError(ErrorCode.INTERNAL, "Not now.")
        if len(bench.transcriber.calls) == 2:
            call.on_window(dataclasses.replace(factories.window(0), text=" something else"))
            raise JobFailedError(ErrorCode.INTERNAL, "Not now.")
        return dataclasses.replace(HELLO, windows=tuple(call.done))

    bench.transcriber.script = script
    bench.prefetcher.audio = before
    bench.add("a", formats=("txt",))
    worker = patient(bench, retries=2)
    worker.run_once()
    assert len(bench.ledger.windows(bench.job("a").seq)) == 2
    bench.prefetcher.audio = "another"
    return worker


@pytest.mark.parametrize("before", ["one", None], ids=["another", "unknown"])
def test_finished_windows_of_other_audio_are_dropped_and_the_job_starts_from_the_beginning(
    bench: Bench, before: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    worker = broken_off(bench, before)
    bench.prefetcher.released.clear()
    worker.run_once()
    assert bench.prefetcher.released == [("a", False)] * 2, "opened behind what was finished, and then anew"
    worker.run_once()
    new = dataclasses.replace(factories.window(0), text=" something else")
    assert [call.done for call in bench.transcriber.calls] == [(), (), (new,)]
    assert bench.job("a").state is JobState.COMPLETED
    assert bench.ledger.windows(bench.job("a").seq) == (new,)
    [warning] = [record for record in caplog.records if "starting from the beginning" in record.message]
    assert (warning.levelno, warning.__dict__["job_id"]) == (logging.WARNING, "a")


@pytest.mark.usefixtures("_quick_retries")
def test_dropping_windows_of_other_audio_is_repeated_until_the_disk_takes_it(bench: Bench) -> None:
    worker = broken_off(bench, "one")
    looks = iter([3, 0])
    bench.prefetcher.looking = lambda: setattr(bench.disk, "refusals", next(looks))
    worker.run_once()
    assert [call.done for call in bench.transcriber.calls] == [(), ()]
    degradations = [what for what in bench.observer.received if isinstance(what, tuple) and what[0] == "worker"]
    assert degradations[:4] == [*[("worker", True)] * 3, ("worker", False)]


@pytest.mark.usefixtures("_endless_retries")
def test_a_forced_stop_ends_the_wait_for_windows_that_the_disk_does_not_drop(bench: Bench) -> None:
    broken_off(bench, "one")
    bench.prefetcher.looking = lambda: setattr(bench.disk, "refusals", 1)
    bench.worker.start()
    bench.observer.until(lambda: ("worker", True) in bench.observer.received)
    bench.worker.abandon()
    assert bench.worker.join(PATIENCE_S)
    assert bench.job("a").state is JobState.QUEUED
    assert len(bench.transcriber.calls) == 1
    assert bench.prefetcher.released[-1] == ("a", False)


def test_a_window_that_the_disk_refuses_is_written_with_the_next_and_holds_nothing_up(bench: Bench) -> None:
    def script(call: Call) -> Transcript:
        bench.disk.refusals = 1
        call.on_window(factories.window(0))
        assert bench.ledger.windows(bench.job("a").seq) == ()
        call.on_window(factories.window(1))
        assert bench.ledger.windows(bench.job("a").seq) == (factories.window(0), factories.window(1))
        return HELLO

    bench.transcriber.script = script
    bench.add("a")
    bench.worker.run_once()
    assert bench.job("a").state is JobState.COMPLETED


def test_segments_are_reported_at_once_for_jobs_that_asked_for_stream(bench: Bench) -> None:
    segment = factories.segment()

    def script(call: Call) -> Transcript:
        call.on_segment(segment)
        return HELLO

    bench.transcriber.script = script
    bench.add("a", stream=True)
    bench.add("b")
    bench.worker.run_once()
    bench.worker.run_once()
    assert [what for what in bench.observer.received if type(what) is tuple] == [("a", segment)]


# -- idleness ------------------------------------------------------------------------------------------------------


def test_on_idle_is_called_after_a_time_without_a_job(bench: Bench) -> None:
    idle = threading.Semaphore(0)
    worker = bench.make_worker(idle_s=0.01, on_idle=idle.release)
    worker.start()
    assert idle.acquire(timeout=PATIENCE_S)
    bench.add("a")
    bench.observer.until(lambda: bench.observer.ended)
    assert idle.acquire(timeout=PATIENCE_S)
    worker.request_stop()
    assert worker.join(PATIENCE_S)


# -- speakers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def diarized(bench: Bench) -> Bench:
    """With a job that asks for speakers."""
    bench.add("a", options={"diarize": True})
    return bench


def test_the_text_is_recorded_before_the_speakers_are_told_apart(diarized: Bench) -> None:
    before: list[Job] = []

    def script(windows: Sequence[Window], should_stop: Callable[[], bool]) -> LabelledWindows:
        before.append(diarized.job("a"))
        return one_speaker(windows, should_stop)

    diarized.labeller.script = script
    assert diarized.worker.run_once()
    assert [(job.state, job.result_text, job.speakers) for job in before] == [
        (JobState.PROCESSING, "Hello there.", None)
    ]
    done = diarized.job("a")
    assert (done.state, done.speakers, done.diarization_error) == (JobState.COMPLETED, 1, None)
    assert (done.result_text, done.warnings) == ("Hello there.", ("audio_truncated",))
    assert {segment.speaker for segment in diarized.ledger.windows(done.seq)[0].segments} == {"Speaker 1"}
    lives = [what[1] for what in diarized.observer.received if isinstance(what, tuple)]
    shares = [live.diarization for live in lives if isinstance(live, JobProgress)]
    assert [share for share in shares if share is not None] == [0.0, 0.5]


def test_a_job_that_does_not_ask_for_speakers_has_none(bench: Bench) -> None:
    bench.add("a")
    bench.worker.run_once()
    assert (bench.labeller.calls, bench.job("a").speakers) == (0, None)


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (DiarizationError("A model is missing.", "Fetch it."), "A model is missing. Fetch it."),
        (JobFailedError(ErrorCode.AUDIO_IO_ERROR, "The share is gone."), "The share is gone."),
        (ZeroDivisionError("nobody expects it"), "unexpectedly; see the consumer's log"),
    ],
)
def test_no_failure_of_the_labeller_costs_the_text_and_none_is_repeated_by_itself(
    diarized: Bench, failure: Exception, sentence: str
) -> None:
    def script(*_: object) -> LabelledWindows:
        raise failure

    diarized.labeller.script = script
    worker = diarized.make_worker(retries=2)
    assert worker.run_once()
    assert not worker.run_once()
    done = diarized.job("a")
    assert (done.state, done.error_code, done.result_text) == (JobState.COMPLETED, None, "Hello there.")
    assert sentence in (done.diarization_error or "")
    assert "nobody" not in (done.diarization_error or "")


def test_a_retry_labels_without_transcribing_again(diarized: Bench) -> None:
    def script(*_: object) -> LabelledWindows:
        raise DiarizationError("A model is missing.")

    diarized.labeller.script = script
    diarized.worker.run_once()
    diarized.ledger.retry("a")
    diarized.labeller.script = one_speaker
    assert diarized.worker.run_once()
    done = diarized.job("a")
    assert (done.attempt, done.speakers, done.diarization_error) == (2, 1, None)
    assert (len(diarized.transcriber.calls), diarized.labeller.calls) == (1, 2)


def test_a_retry_does_not_label_other_audio(diarized: Bench) -> None:
    diarized.prefetcher.audio = "first"
    diarized.labeller.script = lambda *_: (_ for _ in ()).throw(DiarizationError("A model is missing."))
    diarized.worker.run_once()
    diarized.ledger.retry("a")
    diarized.prefetcher.audio = "second"
    diarized.worker.run_once()
    done = diarized.job("a")
    assert (done.state, done.result_text, diarized.labeller.calls) == (JobState.COMPLETED, "Hello there.", 1)
    assert "has changed since it was transcribed" in (done.diarization_error or "")


def test_a_cancel_in_the_first_diarization_cancels_the_job_and_keeps_its_text(diarized: Bench) -> None:
    def script(_windows: object, should_stop: Callable[[], bool]) -> LabelledWindows:
        assert not should_stop()
        diarized.ledger.cancel("a")
        assert should_stop()
        raise Cancelled

    diarized.labeller.script = script
    diarized.worker.run_once()
    assert (diarized.job("a").state, diarized.job("a").result_text) == (JobState.CANCELLED, "Hello there.")


def test_a_timeout_in_the_diarization_leaves_the_job_completed(diarized: Bench) -> None:
    now_s = 0.0

    def script(_windows: object, should_stop: Callable[[], bool]) -> LabelledWindows:
        nonlocal now_s
        now_s = 61.0
        assert should_stop()
        raise Cancelled

    diarized.labeller.script = script
    diarized.make_worker(timeout_s=60.0, monotonic=lambda: now_s).run_once()
    done = diarized.job("a")
    assert (done.state, done.result_text) == (JobState.COMPLETED, "Hello there.")
    assert "longer than worker.job_timeout" in (done.diarization_error or "")


def test_a_forced_stop_in_the_diarization_requeues_the_job_and_the_next_attempt_labels_alone(diarized: Bench) -> None:
    def script(_windows: object, should_stop: Callable[[], bool]) -> LabelledWindows:
        diarized.worker.abandon()
        assert should_stop()
        raise Cancelled

    diarized.labeller.script = script
    diarized.worker.run_once()
    queued = diarized.job("a")
    assert (queued.state, queued.result_text) == (JobState.QUEUED, "Hello there.")
    diarized.labeller.script = one_speaker
    assert diarized.make_worker().run_once()
    assert (diarized.job("a").speakers, len(diarized.transcriber.calls)) == (1, 1)
