"""The worker: one job at a time, in the order of the queue, and each outcome on disk before it is reported.

It owns the thread "worker", the only caller of `run_once`; `request_stop`, `abandon` and `join` may be called from any.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from cesar_mqtt.consumer.events import JobEvents
from cesar_mqtt.consumer.progress import DiarizationMeter, ProgressMeter, WindowCheckpoints
from cesar_mqtt.errors import Cancelled, CesarError, ErrorCode, JobFailedError, LedgerError, Preempted
from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState, Result
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.redaction import redact_sentence
from cesar_mqtt.threads import StoppableThread
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window

if TYPE_CHECKING:
    from cesar_mqtt.audio.windows import Recording
    from cesar_mqtt.consumer.prefetch import Prefetcher
    from cesar_mqtt.whisper.speakers import LabelledWindows

log = get_logger(__name__)

_DISK_RETRY_S = 5.0
"""Between two attempts while the disk refuses. Constant: the queue waits for it, and one attempt is one small write."""
_DEFER_FACTOR = 4.0
"""Each further retry of a job waits this many times as long: 2 s, then 8 s with the default `worker.retry_delay`."""
_MAX_DEFER_S = 3600.0
"""The longest wait, unless `worker.retry_delay` is longer: that of the tenth retry would be six days."""
_MAX_DEFER_GROWTH = 30
_DEFER_JITTER = 0.2
"""Spreads the retries of consumers that were hit by one failure."""
_TRANSIENT = frozenset({ErrorCode.AUDIO_IO_ERROR, ErrorCode.MODEL_UNAVAILABLE, ErrorCode.INTERNAL})
"""Failures that may be over in a moment, so that the job is retried automatically. Downloads are not among them: they
have retries of their own, while other jobs run."""


class Transcribes(Protocol):
    """What the worker needs of a transcriber; tests have a fake one."""

    def transcribe(
        self,
        recording: "Recording",
        options: TranscriptionOptions,
        *,
        done: Sequence[Window],
        on_progress: Callable[[Progress], None],
        on_segment: Callable[[Segment], None],
        on_window: Callable[[Window], None],
        should_stop: Callable[[], bool],
        should_yield: Callable[[], bool],
    ) -> Transcript:
        """Return the transcript, which includes the windows that earlier attempts have `done`.

        Raises:
            JobFailedError: there can be no transcript.
            Cancelled: `should_stop` returned True.
            Preempted: `should_yield`, which is asked after each `on_window`, returned True.
        """

    def warm_up(self, model_size: str) -> None:
        """Load a model before it is needed. Raises JobFailedError."""


class LabelsSpeakers(Protocol):
    """What the worker needs to tell speakers apart; tests have a fake one."""

    def label(
        self,
        recording: "Recording",
        options: TranscriptionOptions,
        windows: Sequence[Window],
        *,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> "LabelledWindows":
        """Return the transcript with speakers. Raises CesarError, Cancelled."""


_WITH_CUES = frozenset({"srt", "vtt"})
"""The formats whose cues are cut at words."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How an attempt ended: with a result, by a cancel, by preemption, or with an error code and a message.

    Attributes:
        unlabelled: why the speakers of a job whose text is recorded were not told apart; it has failed in nothing else.
    """

    result: Result | None = None
    unlabelled: str | None = None
    cancelled: bool = False
    preempted: bool = False
    code: ErrorCode = ErrorCode.INTERNAL
    message: str = ""


_UNLABELLED = "The speakers could not be told apart, unexpectedly; see the consumer's log. Retry, or report it."
_OTHER_AUDIO = "The audio has changed since it was transcribed, so its speakers cannot be told apart: submit it again."
_UNEXPECTED = _Outcome(message="The transcription failed unexpectedly; see the consumer's log. Retry, or report it.")


class Worker(StoppableThread):
    """Works through the ledger's queue.

    Order of events, which is a promise: the claim with its attempt on disk, the transcription, the end on disk, the
    report. A failure of any kind ends the job, never the worker.
    """

    def __init__(
        self,
        ledger: Ledger,
        transcriber: Transcribes,
        *,
        prefetcher: "Prefetcher",
        labeller: LabelsSpeakers,
        spool: Spool,
        events: JobEvents,
        warm_up: str | None = None,
        retries: int = 0,
        retry_delay_s: float = 2.0,
        timeout_s: float | None = None,
        idle_s: float | None = None,
        on_idle: Callable[[], object] = lambda: None,
        may_end: Callable[[Job], bool] = lambda _job: True,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            ledger: the queue.
            transcriber: does the work.
            prefetcher: hands out the recordings.
            labeller: tells the speakers of transcribed recordings apart.
            spool: holds uploaded audio until no attempt needs it.
            events: receives what happens to jobs.
            warm_up: the model to load at the start; None: the first job loads its own.
            retries: how often a job is retried after a transient failure.
            retry_delay_s: the wait before the first retry; see `_DEFER_FACTOR` for further ones.
            timeout_s: the longest that one attempt may take; None: no limit.
            idle_s: after so many seconds without a job `on_idle` is called, in the worker's thread; None: never.
            on_idle: frees what is held only for the next job.
            may_end: asked before the end of an attempt is written; False: another consumer has the job.
            monotonic: seconds that never go back.
        """
        super().__init__("worker")
        self._ledger = ledger
        self._transcriber = transcriber
        self._prefetcher = prefetcher
        self._labeller = labeller
        self._spool = spool
        self._events = events
        self._warm_up_model = warm_up
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._on_idle = on_idle
        self._may_end = may_end
        self._monotonic = monotonic
        self._abandoned = threading.Event()

    @property
    def may_run_jobs(self) -> bool:
        """Whether it may still run a job; after `abandon` it only comes to the end of a computation that is dropped."""
        return self.alive and not self._abandoned.is_set()

    def abandon(self) -> None:
        """Requeue the running job at once and start no other; what its attempt still yields is dropped.

        Raises:
            LedgerError: the disk refused; the next start finds the job in `processing` and requeues it.
        """
        self._abandoned.set()
        self.request_stop()
        for seq in self._ledger.processing():
            self._requeue(seq)

    def _requeue(self, seq: int) -> None:
        try:
            job = self._ledger.requeue(seq)
        except IllegalTransitionError:
            return  # it has just ended, or was requeued
        log.warning("Running job requeued (%s)", job.state, action="requeued", job_id=job.job_id)

    # -- the thread ------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._ledger.wake()

    def _run(self) -> None:
        if self._warm_up_model is not None:
            self._warm_up(self._warm_up_model)
        self._events.activity("idle")
        while not self._stopping.is_set():
            if self._ledger.wait_for_work(self._stopping.is_set, self._idle_s):
                self._claim_and_process()
            elif not self._stopping.is_set():
                self._on_idle()

    def _warm_up(self, model_size: str) -> None:
        self._events.activity("loading")
        try:
            self._transcriber.warm_up(model_size)
        except JobFailedError as exc:
            log.warning("%s Jobs are accepted, but will end as %s.", exc, exc.code, action="model")
        except Exception:
            log.exception("Loading the model %s failed", model_size, action="model")

    def _claim_and_process(self) -> None:
        try:
            self.run_once()
        except LedgerError as exc:
            self._wait_for_disk(exc, self._stopping)

    def run_once(self) -> bool:
        """Claim the next job and process it until it ends or is requeued; False: no job is ready.

        Raises:
            LedgerError: the disk refused the claim (the job is still queued).
        """
        job = self._ledger.claim()
        if job is None:
            return False
        self._events.degraded("worker", on=False)
        if self._abandoned.is_set():  # a forced stop looked for a running job just before this claim
            self._requeue(job.seq)
            return True
        self._events.activity("processing")
        try:
            outcome = self._process(job)
            if outcome is not None:
                self._persist(job, outcome)
        finally:
            ended = self._ledger.get(job.job_id)
            self._prefetcher.release(job, final=ended is None or ended.state.final)
            self._events.activity("idle")
        return True

    def _wait_for_disk(self, error: LedgerError, until: threading.Event, job_id: str | None = None) -> None:
        """Report that the disk refuses, and wait before the next attempt; `until` ends the wait."""
        self._events.degraded("worker", on=True)
        log.error("%s Next attempt in %.0f s.", error, _DISK_RETRY_S, action="worker_degraded", job_id=job_id)
        until.wait(_DISK_RETRY_S)

    # -- one attempt -----------------------------------------------------------------------------------------------

    def _process(self, job: Job) -> _Outcome | None:
        """Transcribe, and tell the speakers apart if that is asked for; None: a forced stop has requeued the job."""
        log.info("Job started, attempt %d", job.attempt, action="started", job_id=job.job_id)
        deadline = math.inf if self._timeout_s is None else self._monotonic() + self._timeout_s

        def should_stop() -> bool:
            cut_short = self._abandoned.is_set() or self._monotonic() >= deadline
            return cut_short or self._ledger.is_cancelling(job.seq)

        try:
            return self._transcribe_and_label(job, should_stop)
        except JobFailedError as exc:
            return _Outcome(code=exc.code, message=_replace_surrogates(exc.message))
        except Cancelled:
            return self._outcome_of_cancel(job)
        except Preempted:
            return _Outcome(preempted=True)
        except Exception:
            log.exception("Job failed unexpectedly", action="failed", job_id=job.job_id)
            return _UNEXPECTED

    def _transcribe_and_label(self, job: Job, should_stop: Callable[[], bool]) -> _Outcome | None:
        if job.result_text is not None:
            return self._label(job, None, should_stop)
        recording, identity = self._open_unchanged(job, should_stop)
        result = _result(self._transcribe(job, recording, identity, should_stop))
        if not job.options.get("diarize"):
            return _Outcome(result)
        transcribed = self._record_text(job, result, identity)
        return self._label(transcribed, recording, should_stop)

    def _open_unchanged(self, job: Job, should_stop: Callable[[], bool]) -> tuple["Recording", str | None]:
        """Open the recording where its windows end; if it is another one by now, from its beginning."""
        recording, identity = self._open_recording(job, should_stop)
        if identity is not None and not self._keep_windows(job, identity, should_stop):
            message = "The audio has changed since the last attempt; starting from the beginning"
            log.warning(message, action="audio_changed", job_id=job.job_id)
            self._prefetcher.release(job, final=False)
            recording, identity = self._open_recording(job, should_stop)
        return recording, identity

    def _transcribe(
        self, job: Job, recording: "Recording", identity: str | None, should_stop: Callable[[], bool]
    ) -> Transcript:
        checkpoints = WindowCheckpoints(job, self._ledger, identity)

        def should_yield() -> bool:
            # After a stop no other job is started, so this one is finished; a window in memory only would be lost.
            kept_on = self._stopping.is_set() or checkpoints.are_pending
            return not kept_on and self._ledger.is_outranked(job.seq)

        return self._transcriber.transcribe(
            recording,
            options_of(job),
            done=self._ledger.windows(job.seq),
            on_progress=ProgressMeter(lambda live: self._events.progress(job, live), self._monotonic).add,
            on_segment=lambda segment: self._events.segment(job, segment) if job.stream else None,
            on_window=checkpoints.write,
            should_stop=should_stop,
            should_yield=should_yield,
        )

    def _record_text(self, job: Job, result: Result, identity: str | None) -> Job:
        """Write the transcript, until the disk takes it; from then on the job is never transcribed again."""
        while not self._abandoned.is_set():
            try:
                recorded = self._ledger.record_text(job.seq, result, identity=identity)
            except LedgerError as exc:
                self._wait_for_disk(exc, self._abandoned, job.job_id)
            except IllegalTransitionError:
                break  # a forced stop has just requeued the job
            else:
                self._events.degraded("worker", on=False)
                log.info("Job transcribed; telling the speakers apart", action="transcribed", job_id=job.job_id)
                return recorded
        raise Cancelled

    def _label(self, job: Job, recording: "Recording | None", should_stop: Callable[[], bool]) -> _Outcome | None:
        """Tell apart the speakers of a job whose text is recorded; no failure costs the text.

        `recording`: the one that was transcribed in this attempt; None: an earlier attempt did.
        """
        meter = DiarizationMeter(job.audio_duration, lambda live: self._events.progress(job, live), self._monotonic)
        meter.add(0.0)
        try:
            if recording is None:
                recording, identity = self._open_recording(job, should_stop)
                recording.wait_until_open(should_stop)
                if not self._ledger.is_of_audio(job.seq, identity):
                    return _Outcome(unlabelled=_OTHER_AUDIO)
            recording.close()
            windows = self._ledger.windows(job.seq)
            found = self._labeller.label(
                recording, options_of(job), windows, on_progress=meter.add, should_stop=should_stop
            )
        except Cancelled:
            ended = self._outcome_of_cancel(job)
            return ended if ended is None or ended.cancelled else _Outcome(unlabelled=ended.message)
        except CesarError as exc:
            return _Outcome(unlabelled=_replace_surrogates(str(exc)))
        except Exception:
            log.exception("Telling the speakers apart failed", action="diarization_failed", job_id=job.job_id)
            return _Outcome(unlabelled=_UNLABELLED)
        return _Outcome(_labelled_result(job, found))

    def _open_recording(self, job: Job, should_stop: Callable[[], bool]) -> tuple["Recording", str | None]:
        recording = self._prefetcher.take(job, should_stop)
        return recording, self._prefetcher.identity(should_stop)

    def _keep_windows(self, job: Job, identity: str, should_stop: Callable[[], bool]) -> bool:
        """Drop the windows of other audio, until the disk takes that: no transcript may mix two recordings.

        Returns False when it dropped some.
        """
        while not should_stop():
            try:
                kept = self._ledger.keep_windows_of(job.seq, identity)
            except LedgerError as exc:
                self._wait_for_disk(exc, self._abandoned, job.job_id)
            else:
                self._events.degraded("worker", on=False)
                return kept
        raise Cancelled

    def _outcome_of_cancel(self, job: Job) -> _Outcome | None:
        """Return why `should_stop` ended the attempt."""
        if self._abandoned.is_set():
            return None
        if self._ledger.is_cancelling(job.seq):
            return _Outcome(cancelled=True)
        message = "The job took longer than worker.job_timeout, {} s: raise that, or choose a smaller model, and retry."
        return _Outcome(code=ErrorCode.TIMEOUT, message=message.format(self._timeout_s))

    # -- end of a job ----------------------------------------------------------------------------------------------

    def _persist(self, job: Job, outcome: _Outcome) -> None:
        """Write the end of the attempt, until the disk takes it or a forced stop requeues the job; then report it."""
        if not self._may_end(job):
            return
        while not self._abandoned.is_set():
            try:
                self._write(job, outcome)
            except LedgerError as exc:
                self._wait_for_disk(exc, self._abandoned, job.job_id)
            except IllegalTransitionError:
                return  # a forced stop has just requeued the job
            except ValueError:
                if outcome.result is None:
                    raise
                log.exception("The ledger cannot store the result", action="failed", job_id=job.job_id)
                outcome = _UNEXPECTED if outcome.result.speakers is None else _Outcome(unlabelled=_UNLABELLED)
            else:
                self._events.degraded("worker", on=False)
                self._report(job)
                return

    def _write(self, job: Job, outcome: _Outcome) -> None:
        if outcome.result is not None:
            self._ledger.complete(job.seq, outcome.result)
        elif outcome.unlabelled is not None:
            message = "Job completed without speakers: %s"
            log.warning(message, outcome.unlabelled, action="diarization_failed", job_id=job.job_id)
            self._ledger.complete_without_speakers(job.seq, redact_sentence(outcome.unlabelled))
        elif outcome.cancelled:
            self._ledger.finish_cancelling(job.seq)
        elif outcome.preempted:
            self._preempt(job)
        elif outcome.code in _TRANSIENT and job.retries < self._retries:
            self._defer(job, outcome)
        else:
            self._ledger.fail(job.seq, outcome.code, redact_sentence(outcome.message))

    def _preempt(self, job: Job) -> None:
        requeued = self._ledger.preempt(job.seq)
        if requeued.state is JobState.QUEUED:
            message = "Job preempted by one of a higher priority; it continues at %.1f s of the recording"
            resumes_at_s = self._ledger.resume_position_s(job.seq)
            log.info(message, resumes_at_s, action="preempted", job_id=job.job_id)

    def _defer(self, job: Job, outcome: _Outcome) -> None:
        spread = random.uniform(1.0 - _DEFER_JITTER, 1.0 + _DEFER_JITTER)  # noqa: S311 - no secret
        delay_s = self._retry_delay_s * _DEFER_FACTOR ** min(job.retries, _MAX_DEFER_GROWTH)
        delay_s = min(delay_s, max(self._retry_delay_s, _MAX_DEFER_S)) * spread
        self._ledger.defer(job.seq, delay_s)
        message = "Job deferred for %.1f s (%s): %s"
        log.warning(message, delay_s, outcome.code, outcome.message, action="deferred", job_id=job.job_id)

    def _report(self, job: Job) -> None:
        """Report and log the end of a job, and remove uploaded audio that no retry needs."""
        ended = self._ledger.get(job.job_id)
        if ended is None or not ended.state.final:
            return
        self._events.finished(ended)
        if ended.audio is not None and ended.audio.kind == "spool" and not ended.may_need_audio:
            self._spool.remove([ended.audio.name])
        took_s = (ended.completed_at or 0.0) - (ended.started_at or 0.0)
        if ended.state is JobState.COMPLETED:
            message = "Job completed in %.2f s (%.1f s of audio)"
            log.info(message, took_s, ended.audio_duration, action="completed", job_id=job.job_id)
        elif ended.state is JobState.CANCELLED:
            log.info("Job cancelled after %.2f s", took_s, action="cancelled", job_id=job.job_id)
        else:
            message = "Job ended as %s (%s) after %.2f s: %s"
            details = (ended.state, ended.error_code, took_s, ended.error_message)
            log.warning(message, *details, action="failed", job_id=job.job_id)


_FORMER_DEFAULTS = {"beam_size": 5}
"""Of version 1, whose jobs hold no option that has its default; later ones always hold these."""


def options_of(job: Job) -> TranscriptionOptions:
    """Return the options of the request, as they were when the job was accepted.

    Cues and speakers need the times of words.
    """
    options = TranscriptionOptions(model_size=job.model_size, **{**_FORMER_DEFAULTS, **job.options})
    needs_words = bool(options.diarize) or not _WITH_CUES.isdisjoint(job.formats)
    return replace(options, word_timestamps=options.word_timestamps or needs_words)


def _replace_surrogates(text: str) -> str:
    """Replace what UTF-8 cannot encode, such as odd bytes in a file name: the status would not be serialisable."""
    return text.encode(errors="replace").decode()


def _result(transcript: Transcript) -> Result:
    return Result(
        text=_replace_surrogates(transcript.text),
        audio_duration=transcript.audio_duration_s,
        detected_language=transcript.language,
        language_probability=transcript.language_probability,
        no_speech=transcript.no_speech,
        warnings=transcript.warnings,
        windows=transcript.windows,
    )


def _labelled_result(job: Job, found: "LabelledWindows") -> Result:
    """Return the result of a job whose text is recorded, with its speakers."""
    return Result(
        text=job.result_text or "",
        audio_duration=job.audio_duration or 0.0,
        detected_language=job.detected_language,
        language_probability=job.language_probability,
        no_speech=bool(job.no_speech),
        warnings=job.warnings,
        windows=found.windows,
        speakers=found.speakers,
        diarization_error=found.problem,
    )
