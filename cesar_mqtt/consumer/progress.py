"""What is noted of a job while it is in work: how far it is, which windows are finished; for the worker's thread."""

import time
from collections.abc import Callable

from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import IllegalTransitionError, Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.logs import get_logger
from cesar_mqtt.protocol.payloads import JobProgress
from cesar_mqtt.transcript import Progress, Window

log = get_logger(__name__)


class WindowCheckpoints:
    """Writes the windows of a recording down as they are finished; the work never waits for a disk that refuses."""

    def __init__(self, job: Job, ledger: Ledger, identity: str | None = None) -> None:
        """Take the job, which is in work, and what its audio is; see `Ledger.keep_windows_of`."""
        self._job = job
        self._identity = identity
        self._ledger = ledger
        self._unwritten: list[Window] = []

    def write(self, window: Window) -> None:
        """Take a finished window (worker thread). What the disk refuses now goes with the next one."""
        self._unwritten.append(window)
        try:
            while self._unwritten:
                self._ledger.add_window(self._job.seq, self._unwritten[0], identity=self._identity)
                del self._unwritten[0]
        except LedgerError as exc:
            message = "%s A crash now would cost more than one window."
            log.warning(message, exc, action="checkpoint_failed", job_id=self._job.job_id)
        except IllegalTransitionError:
            self._unwritten.clear()  # the job was taken away, and its work is about to be stopped


class ProgressMeter:
    """Turns what the transcriber has done into what the world is told; progress never goes back."""

    def __init__(self, tell: Callable[[JobProgress], None], monotonic: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; `tell` is called with each progress."""
        self._tell = tell
        self._monotonic = monotonic
        self._started = monotonic()
        self._processed_s = 0.0
        self._earlier_s: float | None = None

    def note(self, progress: Progress) -> None:
        """Take the transcriber's progress (worker thread). What the first call tells was done by an earlier attempt."""
        duration_s = progress.audio_duration_s
        self._processed_s = max(self._processed_s, progress.processed_s)
        if duration_s is not None:
            self._processed_s = min(self._processed_s, duration_s)
        if self._earlier_s is None:
            self._earlier_s = self._processed_s
        speed = self._speed(self._processed_s - self._earlier_s)
        live = JobProgress(
            progress=_share(self._processed_s, duration_s),
            processed_duration=round(self._processed_s, 3),
            audio_duration=None if duration_s is None else round(duration_s, 3),
            speed=None if speed is None else round(speed, 2),
            eta=None if speed is None or duration_s is None else round((duration_s - self._processed_s) / speed, 1),
            updated_at=time.time(),
        )
        self._tell(live)

    def _speed(self, done_s: float) -> float | None:
        elapsed_s = self._monotonic() - self._started
        return done_s / elapsed_s if elapsed_s > 0 and done_s > 0 else None


def _share(processed_s: float, duration_s: float | None) -> float:
    """Return how much is done; 1 is kept for the end, when the transcript is on disk."""
    return min(round(processed_s / duration_s, 3), 0.999) if duration_s else 0.0
