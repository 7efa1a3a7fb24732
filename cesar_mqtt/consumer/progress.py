"""The progress of the running job, and the checkpoints of its finished windows. For the worker's thread."""

import time
from collections.abc import Callable

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.payloads import JobProgress
from cesar_mqtt.transcript import Progress, Window

log = get_logger(__name__)

_MOST_PROGRESS = 0.999
"""Only a completed job, whose transcript is on disk, has a progress of 1."""


class WindowCheckpoints:
    """Writes each finished window into the ledger; the transcription never waits for a disk that refuses."""

    def __init__(self, job: Job, ledger: Ledger, identity: str | None = None) -> None:
        """`identity` identifies the audio of the running job; see `Ledger.keep_windows_of`."""
        self._job = job
        self._identity = identity
        self._ledger = ledger
        self._unwritten: list[Window] = []

    @property
    def are_pending(self) -> bool:
        """Whether a finished window is not on disk yet."""
        return bool(self._unwritten)

    def write(self, window: Window) -> None:
        """Write a finished window; one that the disk refuses is written with the next."""
        self._unwritten.append(window)
        try:
            while self._unwritten:
                self._ledger.add_window(self._job.seq, self._unwritten[0], identity=self._identity)
                del self._unwritten[0]
        except LedgerError as exc:
            message = "%s A crash now would repeat more than one window."
            log.warning(message, exc, action="checkpoint_failed", job_id=self._job.job_id)
        except IllegalTransitionError:
            self._unwritten.clear()  # a forced stop has requeued the job; its attempt is about to end


class ProgressMeter:
    """Computes progress, speed and eta from what the transcriber has done; progress never goes back."""

    def __init__(
        self, on_progressed: Callable[[JobProgress], None], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock; each `add` calls `on_progressed` once."""
        self._on_progressed = on_progressed
        self._monotonic = monotonic
        self._started = monotonic()
        self._processed_s = 0.0
        self._earlier_s: float | None = None

    def add(self, progress: Progress) -> None:
        """Take the transcriber's progress. The first call gives what earlier attempts have done."""
        duration_s = progress.audio_duration_s
        self._processed_s = max(self._processed_s, progress.processed_s)
        if duration_s is not None:
            self._processed_s = min(self._processed_s, duration_s)
        if self._earlier_s is None:
            self._earlier_s = self._processed_s
        speed = self._speed(self._processed_s - self._earlier_s)
        self._on_progressed(
            JobProgress(
                progress=_share(self._processed_s, duration_s),
                processed_duration=round(self._processed_s, 3),
                audio_duration=None if duration_s is None else round(duration_s, 3),
                speed=None if speed is None else round(speed, 2),
                eta=None if speed is None or duration_s is None else round((duration_s - self._processed_s) / speed, 1),
                updated_at=time.time(),
            )
        )

    def _speed(self, done_s: float) -> float | None:
        elapsed_s = self._monotonic() - self._started
        return done_s / elapsed_s if elapsed_s > 0 and done_s > 0 else None


class DiarizationMeter:
    """Computes how far the diarization of a transcribed job is."""

    def __init__(
        self,
        audio_duration_s: float | None,
        on_progressed: Callable[[JobProgress], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock; each `add` calls `on_progressed` once."""
        self._duration_s = audio_duration_s or 0.0
        self._on_progressed = on_progressed
        self._monotonic = monotonic
        self._started = monotonic()
        self._done_s = 0.0

    def add(self, done_s: float) -> None:
        """Take the seconds of the recording that are done."""
        self._done_s = max(self._done_s, min(done_s, self._duration_s))
        share = self._done_s / self._duration_s if self._duration_s else 0.0
        elapsed_s = self._monotonic() - self._started
        self._on_progressed(
            JobProgress(
                progress=_MOST_PROGRESS,
                processed_duration=self._duration_s,
                audio_duration=self._duration_s,
                speed=None,
                eta=round(elapsed_s * (1.0 - share) / share, 1) if share else None,
                updated_at=time.time(),
                diarization=round(share, 3),
            )
        )


def _share(processed_s: float, duration_s: float | None) -> float:
    return min(round(processed_s / duration_s, 3), _MOST_PROGRESS) if duration_s else 0.0
