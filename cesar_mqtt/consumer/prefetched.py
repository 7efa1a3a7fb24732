"""What is prepared for one job: the download of its URL, and its recording.

A `Download` has a thread of its own, and any thread may call it. An `Entry` belongs to whoever holds it: the table of
what is prepared, or the worker.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.errors import Cancelled, JobFailedError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_GLANCE_S = 0.1
"""How often a wait for a download looks up to see whether it is still wanted."""


class Fetches(Protocol):
    """What preparation needs of a downloader."""

    def fetch(self, url: str, should_stop: Callable[[], bool]) -> DownloadedFile:
        """Fetch into a new file of the spool. Raises JobFailedError, Stopped."""


class Prepared(Protocol):
    """What preparation needs of a recording."""

    @property
    def from_s(self) -> float:
        """The second from which it is decoded."""

    @property
    def is_current(self) -> bool:
        """Whether the file is still the one that was opened."""

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        """Wait until the file is open, and tell it apart from others; None: it could not be. Raises Cancelled."""

    def close(self) -> None:
        """End decoding; may be called twice, from any thread."""


T = TypeVar("T")
R = TypeVar("R", bound=Prepared)


class Download:
    """One URL on its way into a file of the spool, in a thread of its own. Any thread may call it."""

    def __init__(self, job: Job, downloader: Fetches, spool: Spool, on_end: Callable[["Download"], None]) -> None:
        self._job = job
        self._downloader = downloader
        self._spool = spool
        self._on_end = on_end
        self._lock = threading.Lock()
        self._unwanted = threading.Event()
        self._ended = threading.Event()
        self._ended_at = 0.0
        self._outcome: DownloadedFile | Exception = Cancelled()
        self._thread = threading.Thread(target=self._run, name=f"fetch-{job.job_id}", daemon=True)
        self._thread.start()

    @property
    def fetched(self) -> DownloadedFile | None:
        """The file; None while it is not all there, and when it will never be."""
        return self._outcome if self._ended.is_set() and isinstance(self._outcome, DownloadedFile) else None

    @property
    def age_s(self) -> float:
        """Seconds since it ended."""
        return time.monotonic() - self._ended_at

    def wait(self, should_stop: Callable[[], bool]) -> DownloadedFile | Exception:
        """Return how it ended. Raises Cancelled as soon as that is asked for."""
        while not self._ended.wait(_GLANCE_S):
            if should_stop():
                raise Cancelled
        return self._outcome

    def drop(self) -> None:
        """Stop it, and remove the file: now, or when the thread comes to its end."""
        with self._lock:
            self._unwanted.set()
            if self._ended.is_set():
                self._remove()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        url = self._job.audio.name if self._job.audio is not None else ""
        outcome = outcome_of(lambda: self._downloader.fetch(url, self._unwanted.is_set), self._job)
        with self._lock:
            self._outcome, self._ended_at = outcome, time.monotonic()
            self._ended.set()
            if self._unwanted.is_set():
                self._remove()
        self._on_end(self)

    def _remove(self) -> None:
        if isinstance(self._outcome, DownloadedFile):
            self._spool.remove([self._outcome.path.name])


@dataclass(eq=False)
class Entry(Generic[R]):
    """What there is for one job.

    Attributes:
        opened: opening was tried; a failure is left for `take` to meet again, and to tell.
        missing_since: when the job was first seen to be no longer among the next.
        put_off: it was in hand and may come again, after a while in which it is not among the next.
    """

    job: Job
    download: Download | None = None
    recording: R | None = None
    opened: bool = False
    missing_since: float | None = None
    put_off: bool = False

    @property
    def is_remote(self) -> bool:
        """Whether the audio has to be downloaded."""
        return self.job.audio is not None and self.job.audio.kind == "url"

    @property
    def is_spooled(self) -> bool:
        """Whether the audio came with the job."""
        return self.job.audio is not None and self.job.audio.kind == "spool"

    @property
    def fetched(self) -> DownloadedFile | None:
        """The downloaded file, if it is there."""
        return self.download.fetched if self.download is not None else None

    def detach(self) -> R | None:
        """Give the recording away: to be closed where that keeps nobody waiting."""
        recording, self.recording, self.opened = self.recording, None, False
        return recording

    def close(self) -> None:
        """End decoding; the file stays."""
        recording = self.detach()
        if recording is not None:
            recording.close()

    def drop(self) -> None:
        """Leave nothing of it."""
        self.close()
        if self.download is not None:
            self.download.drop()


def outcome_of(work: Callable[[], T], job: Job | None = None) -> T | Exception:
    """Do something ahead of time: whatever goes wrong is a result, for it is nobody's turn yet."""
    try:
        return work()
    except (JobFailedError, Cancelled) as exc:
        return exc
    except Exception as exc:
        job_id = job.job_id if job is not None else None
        log.exception("Audio could not be prepared", action="preparation", job_id=job_id)
        return exc
