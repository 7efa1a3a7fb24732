"""The worker: one job at a time, oldest first, each end on disk before anybody is told.

It runs in a thread of its own, the only caller of `run_once`; `stop` may be called from any other.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cesar_mqtt.audio import resolve_audio_path
from cesar_mqtt.errors import ErrorCode, JobFailedError, LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job, JobState, Result
from cesar_mqtt.ledger import Ledger
from cesar_mqtt.logs import event
from cesar_mqtt.messages import Activity, Live
from cesar_mqtt.spool import Spool
from cesar_mqtt.transcriber import Progress, Stopped, Transcript, TranscriptionOptions

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
_PASSING = frozenset({ErrorCode.DOWNLOAD_FAILED, ErrorCode.MODEL_UNAVAILABLE, ErrorCode.INTERNAL})
"""Failures that may be over in a moment: a job that meets one is tried again by itself."""


class Transcribes(Protocol):
    """What the worker needs of a transcriber."""

    def transcribe(
        self,
        path: Path,
        options: TranscriptionOptions,
        *,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ) -> Transcript:
        """Return the transcript of the file. Raises JobFailedError when there can be none, Stopped when asked to."""

    def warm_up(self, model_size: str) -> None:
        """Load a model before it is needed. Raises JobFailedError."""


class Reports(Protocol):
    """Whom the worker tells what it does; every call returns at once."""

    def activity(self, activity: Activity) -> None:
        """Take note of what the worker is doing."""

    def degraded(self, who: str, *, on: bool) -> None:
        """Take note of whether the disk refuses."""

    def progress(self, job: Job, live: Live) -> None:
        """Take note of how far the job is."""

    def finished(self, job: Job) -> None:
        """Take note that the job has ended."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a job ended: with a result, or with a code and a sentence."""

    result: Result | None = None
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
        spool: Spool,
        directories: Sequence[Path],
        reports: Reports,
        warm_up: str | None = None,
        retries: int = 0,
        retry_delay_s: float = 2.0,
    ) -> None:
        """Wire it; nothing starts here.

        Args:
            ledger: where jobs come from and where their ends go.
            transcriber: does the work.
            spool: where audio lies that came with a job.
            directories: where `audio_path` is looked up.
            reports: whom to tell.
            warm_up: the model to load at the start; None: load the first one when it is needed.
            retries: how often a job is tried again after a failure that may pass.
            retry_delay_s: how long the first retry waits; each further one waits four times as long.
        """
        self._ledger = ledger
        self._transcriber = transcriber
        self._spool = spool
        self._directories = directories
        self._reports = reports
        self._warm_up = warm_up
        self._retries = retries
        self._retry_delay_s = retry_delay_s
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
            self._ledger.requeue(seq)
        except IllegalTransitionError:
            return  # it has ended, or was put back, in this very moment
        event(logger, logging.WARNING, "requeued", "The job in work was put back into the queue")

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread to end; whether it has."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        if self._warm_up is not None:
            self._load(self._warm_up)
        self._reports.activity("idle")
        while self._ledger.wait_for_work(self._stop.is_set):
            try:
                self.run_once()
            except LedgerError as exc:
                self._reports.degraded("worker", on=True)
                event(logger, logging.ERROR, "worker_degraded", "%s Next try in %.0f s.", exc, _RETRY_S)
                self._stop.wait(_RETRY_S)

    def _load(self, model_size: str) -> None:
        self._reports.activity("loading")
        try:
            self._transcriber.warm_up(model_size)
        except JobFailedError as exc:
            event(logger, logging.WARNING, "model", "%s Jobs are accepted, but will end as %s.", exc, exc.code)
        except Exception:  # noqa: BLE001 - the job that needs the model will fail, and say so to somebody
            event(logger, logging.ERROR, "model", "Model %s could not be loaded", model_size, exc_info=True)

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
            self._reports.activity("idle")
        return True

    def _work(self, job: Job) -> _Outcome | None:
        """Transcribe; None when a forced stop has taken the job away."""
        event(logger, logging.INFO, "started", "Job started, attempt %d", job.attempt, job_id=job.job_id)
        try:
            path = self._path(job)
            transcript = self._transcriber.transcribe(
                path,
                TranscriptionOptions(model_size=job.model_size, **job.options),
                on_progress=_Meter(job, self._reports).note,
                should_stop=self._abandoned.is_set,
            )
            return _Outcome(_result(transcript))
        except JobFailedError as exc:
            return _Outcome(code=exc.code, message=_sayable(exc.message))
        except Stopped:
            return None
        except Exception:  # noqa: BLE001 - whatever a file or a model does, the next job goes on
            event(logger, logging.ERROR, "failed", "Job failed unexpectedly", job_id=job.job_id, exc_info=True)
            return _UNEXPECTED

    def _path(self, job: Job) -> Path:
        if job.audio is None:
            raise JobFailedError(ErrorCode.INTERNAL, "The job has no audio. Submit it again.")
        if job.audio.kind == "spool":
            return self._spool.path(job.audio.name)
        return resolve_audio_path(job.audio.name, self._directories)

    def _write(self, job: Job, outcome: _Outcome) -> None:
        if outcome.result is not None:
            self._ledger.complete(job.seq, outcome.result)
        elif outcome.code in _PASSING and job.retries < self._retries:
            # The jitter keeps consumers that were hit by one failure from trying again in step.
            delay_s = self._retry_delay_s * 4**job.retries * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
            self._ledger.defer(job.seq, delay_s)
            message = "Job put back for %.1f s (%s): %s"
            event(
                logger, logging.WARNING, "deferred", message, delay_s, outcome.code, outcome.message, job_id=job.job_id
            )
        else:
            self._ledger.fail(job.seq, outcome.code, outcome.message)

    def _record(self, job: Job, outcome: _Outcome) -> None:
        """Write the end of the job, trying until the disk takes it or the job is taken away by a forced stop."""
        while not self._abandoned.is_set():
            try:
                self._write(job, outcome)
            except LedgerError as exc:
                self._reports.degraded("worker", on=True)
                message = "%s Next try in %.0f s."
                event(logger, logging.ERROR, "worker_degraded", message, exc, _RETRY_S, job_id=job.job_id)
                self._abandoned.wait(_RETRY_S)
            except IllegalTransitionError:
                return  # a forced stop has just put the job back
            except ValueError:
                if outcome is _UNEXPECTED:
                    raise
                message = "The result holds what the ledger cannot write"
                event(logger, logging.ERROR, "failed", message, job_id=job.job_id, exc_info=True)
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
        if ended.audio is not None and ended.audio.kind == "spool" and not _may_be_retried(ended):
            self._spool.remove([ended.audio.name])
        took_s = (ended.completed_at or 0.0) - (ended.started_at or 0.0)
        if ended.state is JobState.COMPLETED:
            message = "Job completed in %.2f s (%.1f s of audio)"
            event(logger, logging.INFO, "completed", message, took_s, ended.audio_duration, job_id=job.job_id)
        else:
            message = "Job ended as %s (%s) after %.2f s: %s"
            details = (ended.state, ended.error_code, took_s, ended.error_message)
            event(logger, logging.WARNING, "failed", message, *details, job_id=job.job_id)


class _Meter:
    """Turns what the transcriber has done into what the world is told; progress never goes back."""

    def __init__(self, job: Job, reports: Reports, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._job = job
        self._reports = reports
        self._monotonic = monotonic
        self._started = monotonic()
        self._processed_s = 0.0

    def note(self, progress: Progress) -> None:
        """Take the transcriber's progress (worker thread)."""
        duration_s = progress.audio_duration_s
        self._processed_s = min(max(self._processed_s, progress.processed_s), duration_s)
        elapsed_s = self._monotonic() - self._started
        speed = self._processed_s / elapsed_s if elapsed_s > 0 and self._processed_s > 0 else None
        live = Live(
            # 1 is kept for the end, when the transcript is on disk
            progress=min(round(self._processed_s / duration_s, 3), 0.999) if duration_s > 0 else 0.0,
            processed_duration=round(self._processed_s, 3),
            audio_duration=round(duration_s, 3),
            speed=None if speed is None else round(speed, 2),
            eta=None if speed is None else round((duration_s - self._processed_s) / speed, 1),
            updated_at=time.time(),
        )
        self._reports.progress(self._job, live)


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
    )


def _may_be_retried(job: Job) -> bool:
    return job.error_code is not None and job.error_code.retryable
