"""Prefetch: downloads and opens the audio of the next jobs before the worker claims them.

`Prefetcher` owns the thread "prefetch", which looks at the queue, and one thread for each download. The worker's thread
calls `take`, `identity` and `release`, the main thread `start` and `stop`. The ledger's observer only sets an event.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.audio.paths import resolve_audio_path
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger
from cesar_mqtt.threads import StoppableThread, Task, wait

if TYPE_CHECKING:
    from cesar_mqtt.audio.download import Downloader
    from cesar_mqtt.audio.windows import Recording

log = get_logger(__name__)

_PAUSE_S = 0.05
"""Between two looks at the queue: a burst of a thousand new jobs must not cause a thousand looks."""
_RECENT_S = 60.0
"""How long the failure of a download ahead stands. After that the server may be back, so `take` tries again; before, a
second round of retries would only hold up the other jobs."""
_STOP_S = 1.0
"""How long `stop` waits for threads. A download that is stuck in a name look-up goes on until the process ends."""


class Prefetcher(StoppableThread):
    """Keeps the audio of the next jobs ready: URLs downloaded, the very next recording being decoded.

    The URLs of the next `ahead` jobs are downloaded at once. Only one recording is opened ahead, so memory is bounded
    by one window more than the running job needs, and none while the consumer is paused. No job depends on it: `take`
    does what is not ready or has failed.

    A job keeps what was prefetched while it is among the next jobs, or in `processing`, which it enters when the worker
    claims it, before `take`; a preempted job keeps its download however many jobs come before it. A job that is
    cancelled, deferred or deleted is in none of these, so the next look drops its audio. Looks and `take` exclude each
    other: no look acts on a queue that a `take` has changed.

    Attributes:
        on_downloaded: called at the end of each download, in its thread, with `done`, `stopped` or an error code, and
            the seconds that it took.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        open_recording: "Callable[[Path, Job], Recording]",
        spool: Spool,
        directories: Sequence[Path],
        downloader: "Downloader",
        ahead: int,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            ledger: the queue.
            open_recording: starts to decode a file for a job and returns at once; called by two threads.
            spool: holds uploaded audio and downloads.
            directories: where `audio_path` is looked up, in order.
            downloader: downloads into the spool.
            ahead: how many jobs are looked at, and how many downloads run at once.
        """
        super().__init__("prefetch")
        self._ledger = ledger
        self._open_recording = open_recording
        self._spool = spool
        self._directories = tuple(directories)
        self._downloader = downloader
        self._ahead = ahead
        self.on_downloaded: Callable[[str, float], None] = lambda _outcome, _seconds: None
        self._wakeup = threading.Event()
        self._lock = threading.Lock()
        """Guards the next three; taken before the ledger's lock, never after it."""
        self._entries: dict[int, _Prefetched] = {}
        self._current: _Prefetched | None = None
        self._downloads: list[_Download] = []

    def start(self) -> None:
        self._ledger.observe(self._wakeup.set)
        self._wakeup.set()
        super().start()

    def stop(self, timeout_s: float | None = _STOP_S) -> None:
        """End the thread and all downloads, and remove what was prefetched; may be called twice.

        The recording that the worker holds stays until `release`; a `take` that waits raises Cancelled.
        """
        self.request_stop()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            entries, downloads = list(self._entries.values()), list(self._downloads)
            self._entries.clear()
        for entry in entries:
            entry.drop()
        self.join(timeout_s)
        for download in downloads:
            download.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # -- the running job, in the worker's thread -------------------------------------------------------------------

    def take(self, job: Job, should_stop: Callable[[], bool]) -> "Recording":
        """Return the recording of a claimed job; the worker holds it until `release`.

        Raises:
            JobFailedError: the audio is not available.
            Cancelled: `should_stop` returned True, or `stop` was called. After any exception nothing is held.
        """
        with self._lock:
            entry = self._entries.pop(job.seq, None) or _Prefetched(job)
            entry.job, self._current = job, entry
        try:
            return self._recording(entry, lambda: should_stop() or self._stopping.is_set())
        except BaseException:
            self._let_go(entry, keep=False)
            raise

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        """Identify the audio that the worker holds, for a later attempt, which may find other audio in its place.

        Returns:
            Equal for equal audio; None: the audio came with the job and cannot change, or the file cannot be opened,
            which the recording reports.

        Raises:
            Cancelled: as in `take`; the worker still holds the recording.
        """
        entry = self._current
        if entry is None or entry.recording is None or entry.kind == "spool":
            return None
        if entry.fetched is not None:
            return entry.fetched.digest
        return entry.recording.identity(lambda: should_stop() or self._stopping.is_set())

    def release(self, job: Job, *, final: bool) -> None:
        """End an attempt: close the recording, and remove a download unless a further attempt may follow at once.

        Does nothing for a job that the worker does not hold.
        """
        entry = self._current
        if entry is not None and entry.job.seq == job.seq:
            self._let_go(entry, keep=not final)

    def _let_go(self, entry: "_Prefetched", *, keep: bool) -> None:
        entry.close()
        with self._lock:
            self._current = None
            kept = keep and entry.fetched is not None and not self._stopping.is_set()
            if kept:
                self._entries[entry.job.seq] = entry
        if not kept:
            entry.drop()
        self._wakeup.set()

    def _recording(self, entry: "_Prefetched", should_stop: Callable[[], bool]) -> "Recording":
        if should_stop():
            raise Cancelled
        ahead = entry.recording
        # A retry of a queued job drops its finished windows: a recording opened behind them would skip audio.
        if ahead is not None and ahead.is_current and ahead.from_s == self._ledger.resume_position_s(entry.job.seq):
            return ahead
        entry.close()
        if entry.kind == "url":
            self._fetch(entry, should_stop)
        entry.recording = self._open(entry)
        return entry.recording

    def _fetch(self, entry: "_Prefetched", should_stop: Callable[[], bool]) -> None:
        """Wait for the download; repeat one that failed unexpectedly or some time ago."""
        if entry.download is not None:
            error = entry.download.wait(should_stop)
            if error is None:
                return
            if isinstance(error, JobFailedError) and entry.download.age_s < _RECENT_S:
                raise error
        with self._lock:
            entry.download = self._start_download(entry.job)
        error = entry.download.wait(should_stop)
        if error is not None:
            raise error

    def _open(self, entry: "_Prefetched") -> "Recording":
        audio = entry.job.audio
        if audio is None:
            raise JobFailedError(ErrorCode.INTERNAL, "The job has no audio: submit it again.")
        if audio.kind == "path":
            path = resolve_audio_path(audio.name, self._directories)
        else:
            path = entry.fetched.path if entry.fetched is not None else self._spool.path(audio.name)
            if not path.exists():
                lost = "The recording that came with the job is gone from the spool: submit it again under a new id."
                raise JobFailedError(ErrorCode.AUDIO_NOT_FOUND, lost)
        return self._open_recording(path, entry.job)

    # -- the next jobs, in the thread "prefetch" -------------------------------------------------------------------

    def _wake(self) -> None:
        self._wakeup.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wakeup.wait()
            self._wakeup.clear()
            try:
                self.run_once()
            except Exception:
                log.exception("Looking ahead in the queue failed", action="preparation")
            self._stopping.wait(_PAUSE_S)

    def run_once(self) -> None:
        """Look at the next jobs once: start downloads, open the first job's recording, drop what no job needs."""
        with self._lock:
            if self._stopping.is_set():
                return
            held = None if self._current is None else self._current.job.seq
            # A forced stop requeues the running job before the worker lets go of it.
            jobs = [job for job in self._ledger.upcoming(self._ahead) if job.seq != held]
            # In this order: a job that is claimed between two of the calls is in one of the answers.
            preempted = self._ledger.preempted()
            wanted = {job.seq for job in jobs}.union(preempted, self._ledger.processing())
            unwanted = [self._entries.pop(seq) for seq in self._entries.keys() - wanted]
            self._download_ahead(jobs)
            # A requeued job comes first; the memory of the recording that was opened before it is released.
            later = preempted.union(job.seq for job in jobs).difference(job.seq for job in jobs[:1])
            surplus = [self._entries[seq].detach() for seq in later & self._entries.keys()]
            first = self._next_to_open(jobs[0]) if jobs and not self._ledger.is_paused else None
        for entry in unwanted:
            entry.drop()
        for recording in surplus:
            if recording is not None:
                recording.close()
        if first is not None:
            self._open_ahead(first)

    def _download_ahead(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            entry = self._entries.get(job.seq) or _Prefetched(job)
            if entry.kind != "url":
                continue
            self._entries[job.seq] = entry
            running = sum(not download.future.done() for download in self._downloads)
            if entry.download is None and running < self._ahead:
                entry.download = self._start_download(job)

    def _start_download(self, job: Job) -> "_Download":
        download = _Download(job, self._downloader, self._spool, self.on_downloaded)
        self._downloads = [*(former for former in self._downloads if former.alive), download]
        download.future.add_done_callback(lambda _: self._wakeup.set())
        return download

    def _next_to_open(self, job: Job) -> "_Prefetched | None":
        entry = self._entries.setdefault(job.seq, _Prefetched(job))
        if entry.open_tried or (entry.kind == "url" and entry.fetched is None):
            return None
        entry.job, entry.open_tried = job, True
        return entry

    def _open_ahead(self, entry: "_Prefetched") -> None:
        try:
            recording = self._open(entry)
        except JobFailedError:
            return  # `take` meets it again and reports it
        except Exception:
            log.exception("Opening the audio ahead failed", action="preparation", job_id=entry.job.job_id)
            return
        with self._lock:
            wanted = self._entries.get(entry.job.seq) is entry and entry.open_tried and entry.recording is None
            if wanted:
                entry.recording = recording
        if not wanted:
            recording.close()


class _Download(Task[DownloadedFile]):
    """One URL being downloaded into a file of the spool, in a thread of its own. Any thread may call it."""

    def __init__(
        self, job: Job, downloader: "Downloader", spool: Spool, on_ended: Callable[[str, float], None]
    ) -> None:
        self._job = job
        self._downloader = downloader
        self._spool = spool
        self._on_ended = on_ended
        self._unwanted = threading.Event()
        self._ended_at = 0.0
        super().__init__(f"fetch-{job.job_id}", self._fetch)

    @property
    def fetched(self) -> DownloadedFile | None:
        """The file; None while the download runs, and after a failure."""
        return self.future.result() if self.future.done() and self.future.exception() is None else None

    @property
    def age_s(self) -> float:
        """Seconds since the end of the download."""
        return time.monotonic() - self._ended_at

    def wait(self, should_stop: Callable[[], bool]) -> BaseException | None:
        """Wait for the end of the download; return why it failed. Raises Cancelled when `should_stop` returns True."""
        wait(lambda timeout_s: bool(futures.wait([self.future], timeout_s).done), should_stop)
        return self.future.exception()

    def drop(self) -> None:
        """Stop the download and remove the file: now, or when the thread ends."""
        self._unwanted.set()
        self.future.add_done_callback(self._remove)

    def _fetch(self) -> DownloadedFile:
        url = self._job.audio.name if self._job.audio is not None else ""
        started, outcome = time.monotonic(), ErrorCode.INTERNAL.value
        try:
            fetched = self._downloader.fetch(url, self._unwanted.is_set)
            outcome = "done"
        except JobFailedError as exc:
            outcome = exc.code.value
            raise
        except Cancelled:
            outcome = "stopped"
            raise
        except Exception:
            log.exception("Downloading the audio failed", action="preparation", job_id=self._job.job_id)
            raise
        finally:
            self._ended_at = time.monotonic()
            self._on_ended(outcome, self._ended_at - started)
        return fetched

    def _remove(self, future: "futures.Future[DownloadedFile]") -> None:
        if future.exception() is None:
            self._spool.remove([future.result().path.name])


@dataclass(eq=False, slots=True)
class _Prefetched:
    """What is ready for one job. It belongs to the table of entries or to the worker, which closes it.

    Attributes:
        open_tried: opening was tried. `take` meets a failure again and reports it.
    """

    job: Job
    download: _Download | None = None
    recording: "Recording | None" = None
    open_tried: bool = False

    @property
    def kind(self) -> str | None:
        """`path`, `url` or `spool`; None: the job has no audio."""
        return None if self.job.audio is None else self.job.audio.kind

    @property
    def fetched(self) -> DownloadedFile | None:
        """The downloaded file; None: there is none, or not yet."""
        return None if self.download is None else self.download.fetched

    def detach(self) -> "Recording | None":
        """Return the recording and forget it, so that the caller can close it without a lock."""
        recording, self.recording, self.open_tried = self.recording, None, False
        return recording

    def close(self) -> None:
        """End decoding; a downloaded file stays."""
        recording = self.detach()
        if recording is not None:
            recording.close()

    def drop(self) -> None:
        """End decoding and the download, and remove the file."""
        self.close()
        if self.download is not None:
            self.download.drop()
