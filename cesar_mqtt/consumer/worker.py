"""The worker: one job at a time, oldest first, each end on disk before anybody is told.

It runs in a thread of its own, the only caller of `run_once`; `stop` may be called from any other.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cesar_mqtt.consumer.progress import ProgressMeter, WindowCheckpoints
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError, LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState, Result, may_need_audio
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.consumer_payloads import Activity
from cesar_mqtt.protocol.payloads import JobProgress
from cesar_mqtt.transcript import Progress, Segment, Transcript, TranscriptionOptions, Window

if TYPE_CHECKING:
    from cesar_mqtt.audio.windows import Recording

log = get_logger(__name__)

_RETRY_S = 5.0
_PASSING = frozenset({ErrorCode.MODEL_UNAVAILABLE, ErrorCode.INTERNAL})
"""Failures that may be over in a moment: a job that meets one is tried again by itself. Downloads are not among them:
they have retries of their own, while other jobs are in work."""


class Transcribes(Protocol):
    """What the worker needs of a transcriber."""

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
    ) -> Transcript:
        """Return the transcript, with what an earlier attempt has `done` in it.

        Raises JobFailedError when there can be none, Stopped when asked to.
        """

    def warm_up(self, model_size: str) -> None:
        """Load a model before it is needed. Raises JobFailedError."""


class Prepares(Protocol):
    """Whoever has the audio of a job ready when its turn comes."""

    def take(self, job: Job, should_stop: Callable[[], bool]) -> "Recording":
        """Return the job's recording, from where its work goes on. Raises JobFailedError, Stopped."""

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        """Return what the audio of the recording in hand is; None: it cannot become another one. Raises Cancelled."""

    def release(self, job: Job, *, final: bool) -> None:
        """Take note that an attempt is over, and whether there will be no other."""


class Reports(Protocol):
    """Whom the worker tells what it does; every call returns at once."""

    def activity(self, activity: Activity) -> None:
        """Take note of what the worker is doing."""

    def degraded(self, who: str, *, on: bool) -> None:
        """Take note of whether the disk refuses."""

    def progress(self, job: Job, live: JobProgress) -> None:
        """Take note of how far the job is."""

    def segment(self, job: Job, segment: Segment) -> None:
        """Take note of a segment as soon as it is known."""

    def finished(self, job: Job) -> None:
        """Take note that the job has ended."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a job ended: with a result, because somebody asked for its end, or with a code and a sentence."""

    result: Result | None = None
    cancelled: bool = False
    code: ErrorCode = ErrorCode.INTERNAL
    message: str = ""


_UNEXPECTED = _Outcome(message="The transcription failed; the consumer's log says why. Retry, or report it.")


class Worker:
    """Works through the ledger's queue.

    Order of events, which is a promise: the claim with its attempt on disk, then the work, then the end on disk, then
    the publisher is told. A failure of any kind ends the job, never the worker.
    """

    def __init__(
        self,
        ledger: Ledger,
        transcriber: Transcribes,
        *,
        preparer: Prepares,
        spool: Spool,
        reports: Reports,
        warm_up: str | None = None,
        retries: int = 0,
        retry_delay_s: float = 2.0,
        timeout_s: float | None = None,
        idle_s: float | None = None,
        on_idle: Callable[[], object] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wire it; nothing starts here.

        Args:
            ledger: where jobs come from and where their ends go.
            transcriber: does the work.
            preparer: hands out the recordings.
            spool: where audio lies that came with a job, until nobody needs it any more.
            reports: whom to tell.
            warm_up: the model to load at the start; None: load the first one when it is needed.
            retries: how often a job is tried again after a failure that may pass.
            retry_delay_s: how long the first retry waits; each further one waits four times as long.
            timeout_s: how long one attempt may take; None: as long as it takes.
            idle_s: how long there has to be nothing to do for `on_idle` to be called, in the worker's thread.
            on_idle: gives back what is held only for the next job.
            monotonic: seconds since whenever.
        """
        self._ledger = ledger
        self._transcriber = transcriber
        self._preparer = preparer
        self._spool = spool
        self._reports = reports
        self._warm_up = warm_up
        self._retries = retries
        self._retry_delay_s = retry_delay_s
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._on_idle = on_idle
        self._monotonic = monotonic
        self._stop = threading.Event()
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let no further job be started; returns at once, the current job goes on."""
        self._stop.set()
        self._ledger.wake()

    def abandon(self) -> None:
        """Put the current job back into the queue at once; what its work still yields is thrown away.

        Raises:
            LedgerError: the disk refused; the next start finds the job in `processing` and does the same.
        """
        self._abandoned.set()
        self.stop()
        for seq in self._ledger.processing():
            self._put_back(seq)

    def _put_back(self, seq: int) -> None:
        try:
            job = self._ledger.requeue(seq)
        except IllegalTransitionError:
            return  # it has ended, or was put back, in this very moment
        log.warning("The job in work was put back (%s)", job.state, action="requeued", job_id=job.job_id)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread to end; whether it has."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if self._warm_up is not None:
            self._load(self._warm_up)
        self._reports.activity("idle")
        while not self._stop.is_set():
            if self._ledger.wait_for_work(self._stop.is_set, self._idle_s):
                self._step()
            elif not self._stop.is_set():
                self._on_idle()

    def _step(self) -> None:
        try:
            self.run_once()
        except LedgerError as exc:
            self._reports.degraded("worker", on=True)
            log.error("%s Next try in %.0f s.", exc, _RETRY_S, action="worker_degraded")
            self._stop.wait(_RETRY_S)

    def _load(self, model_size: str) -> None:
        self._reports.activity("loading")
        try:
            self._transcriber.warm_up(model_size)
        except JobFailedError as exc:
            log.warning("%s Jobs are accepted, but will end as %s.", exc, exc.code, action="model")
        except Exception:
            log.exception("Model %s could not be loaded", model_size, action="model")

    def run_once(self) -> bool:
        """Claim the oldest job and work it to its end; False when none waits.

        Raises:
            LedgerError: the disk refused the claim (the job still waits).
        """
        job = self._ledger.claim()
        if job is None:
            return False
        self._reports.degraded("worker", on=False)
        if self._abandoned.is_set():  # by a forced stop that looked for a job in work just before there was one
            self._put_back(job.seq)
            return True
        self._reports.activity("processing")
        try:
            outcome = self._work(job)
            if outcome is not None:
                self._record(job, outcome)
        finally:
            ended = self._ledger.get(job.job_id)
            self._preparer.release(job, final=ended is None or ended.state.final)
            self._reports.activity("idle")
        return True

    def _work(self, job: Job) -> _Outcome | None:
        """Transcribe; None when a forced stop has taken the job away."""
        log.info("Job started, attempt %d", job.attempt, action="started", job_id=job.job_id)
        deadline = math.inf if self._timeout_s is None else self._monotonic() + self._timeout_s
        try:
            return _Outcome(_result(self._transcribed(job, deadline)))
        except JobFailedError as exc:
            return _Outcome(code=exc.code, message=_sayable(exc.message))
        except Cancelled:
            return self._stopped(job)
        except Exception:
            log.exception("Job failed unexpectedly", action="failed", job_id=job.job_id)
            return _UNEXPECTED

    def _transcribed(self, job: Job, deadline: float) -> Transcript:
        def should_stop() -> bool:
            given_up = self._abandoned.is_set() or self._monotonic() >= deadline
            return given_up or self._ledger.is_cancelling(job.seq)

        recording, identity = self._opened(job, should_stop)
        if identity is not None and not self._keeps_windows(job, identity, should_stop):
            message = "The audio is not known to be what an earlier attempt worked on: the work begins from the start"
            log.warning(message, action="audio_changed", job_id=job.job_id)
            self._preparer.release(job, final=False)
            recording, identity = self._opened(job, should_stop)
        checkpoints = WindowCheckpoints(job, self._ledger, identity)
        return self._transcriber.transcribe(
            recording,
            options_of(job),
            done=self._ledger.windows(job.seq),
            on_progress=ProgressMeter(lambda live: self._reports.progress(job, live), self._monotonic).note,
            on_segment=lambda segment: self._reports.segment(job, segment) if job.stream else None,
            on_window=checkpoints.write,
            should_stop=should_stop,
        )

    def _opened(self, job: Job, should_stop: Callable[[], bool]) -> tuple["Recording", str | None]:
        recording = self._preparer.take(job, should_stop)
        return recording, self._preparer.identity(should_stop)

    def _keeps_windows(self, job: Job, identity: str, should_stop: Callable[[], bool]) -> bool:
        """Drop windows of another audio, trying until the disk takes it: new ones would be mixed with them."""
        while not should_stop():
            try:
                kept = self._ledger.keep_windows_of(job.seq, identity)
            except LedgerError as exc:
                self._refused(job, exc)
            else:
                self._reports.degraded("worker", on=False)
                return kept
        raise Cancelled

    def _refused(self, job: Job, error: LedgerError) -> None:
        """Say that the disk refuses, and wait before the next try; a forced stop ends the wait."""
        self._reports.degraded("worker", on=True)
        log.error("%s Next try in %.0f s.", error, _RETRY_S, action="worker_degraded", job_id=job.job_id)
        self._abandoned.wait(_RETRY_S)

    def _stopped(self, job: Job) -> _Outcome | None:
        """Say why the work was ended before its time."""
        if self._abandoned.is_set():
            return None
        if self._ledger.is_cancelling(job.seq):
            return _Outcome(cancelled=True)
        message = "The job took longer than worker.job_timeout, {} s: raise that, or choose a smaller model, and retry."
        return _Outcome(code=ErrorCode.TIMEOUT, message=message.format(self._timeout_s))

    def _write(self, job: Job, outcome: _Outcome) -> None:
        if outcome.result is not None:
            self._ledger.complete(job.seq, outcome.result)
        elif outcome.cancelled:
            self._ledger.finish_cancelling(job.seq)
        elif outcome.code in _PASSING and job.retries < self._retries:
            # The jitter keeps consumers that were hit by one failure from trying again in step.
            delay_s = self._retry_delay_s * 4**job.retries * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            self._ledger.defer(job.seq, delay_s)
            message = "Job put back for %.1f s (%s): %s"
            log.warning(message, delay_s, outcome.code, outcome.message, action="deferred", job_id=job.job_id)
        else:
            self._ledger.fail(job.seq, outcome.code, outcome.message)

    def _record(self, job: Job, outcome: _Outcome) -> None:
        """Write the end of the job, trying until the disk takes it or the job is taken away by a forced stop."""
        while not self._abandoned.is_set():
            try:
                self._write(job, outcome)
            except LedgerError as exc:
                self._refused(job, exc)
            except IllegalTransitionError:
                return  # a forced stop has just put the job back
            except ValueError:
                if outcome is _UNEXPECTED:
                    raise
                message = "The result holds what the ledger cannot write"
                log.exception(message, action="failed", job_id=job.job_id)
                outcome = _UNEXPECTED
            else:
                self._reports.degraded("worker", on=False)
                self._finished(job)
                return

    def _finished(self, job: Job) -> None:
        ended = self._ledger.get(job.job_id)
        if ended is None or not ended.state.final:
            return
        self._reports.finished(ended)
        if (
            ended.audio is not None
            and ended.audio.kind == "spool"
            and not may_need_audio(ended.state, ended.error_code)
        ):
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


def options_of(job: Job) -> TranscriptionOptions:
    """Return what the producer of a job chose, as it was when the job was accepted."""
    return TranscriptionOptions(model_size=job.model_size, **job.options)


def _sayable(text: str) -> str:
    """Replace what UTF-8 cannot say, such as bytes in the name of a file: no status could be made of it."""
    return text.encode(errors="replace").decode()


def _result(transcript: Transcript) -> Result:
    return Result(
        text=_sayable(transcript.text),
        audio_duration=transcript.audio_duration_s,
        detected_language=transcript.language,
        language_probability=transcript.language_probability,
        no_speech=transcript.no_speech,
        warnings=transcript.warnings,
        windows=transcript.windows,
    )
