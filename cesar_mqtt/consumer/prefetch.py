"""Preparation: the audio of the next jobs, fetched and being decoded before their turn comes.

`Prefetcher` has a thread of its own that looks ahead, and one for each download; the worker's thread calls `take` and
`release`, the main thread `start` and `stop`. The ledger's observer only sets a flag.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Generic, Protocol

from cesar_mqtt.audio.download import DownloadedFile
from cesar_mqtt.audio.paths import resolve_audio_path
from cesar_mqtt.consumer.prefetched import Download, Entry, Fetches, R, outcome_of
from cesar_mqtt.errors import Cancelled, ErrorCode, JobFailedError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.spool import Spool

_PAUSE_S = 0.05
"""Between two looks ahead: a burst of a thousand new jobs is not worth a thousand of them."""
_GRACE_S = 5.0
"""How long a job that has just left the queue may be on its way to `take`, while none is in hand."""
_KEEP_S = 60.0
"""How long the download of a job that was put off is kept: about as long as its first retries may take."""
_RECENT_S = 60.0
"""How long the failure of a download that was done ahead is believed."""
_STOP_S = 1.0


class Upcoming(Protocol):
    """The queue, as far as preparation looks at it."""

    def upcoming(self, limit: int) -> list[Job]:
        """Return the next jobs in the order of their turn."""

    def resume_position_s(self, seq: int) -> float:
        """Return the second of a job's recording from which the work goes on."""

    def observe(self, observer: Callable[[], None]) -> None:
        """Have a function called after each change; it must be quick and never raise."""


class Prefetcher(Generic[R]):
    """Has the audio of the next jobs ready before their turn: URLs fetched, the very next recording being decoded.

    The URLs of the next `ahead` jobs are fetched at once; only one recording is opened ahead, so memory is bounded by
    one window more than the job in hand needs. Nothing of it is needed for a job to succeed: what is not ready, or went
    wrong unexpectedly, is done when the job is taken.

    A job leaves the queue when it is cancelled, and when the worker claims it, a moment before it takes it. While a job
    is in hand no other can have been claimed, so what has left the queue is dropped at once; else after some seconds.
    """

    def __init__(
        self,
        upcoming: Upcoming,
        *,
        open_recording: Callable[[Path, Job], R],
        spool: Spool,
        directories: Sequence[Path],
        downloader: Fetches,
        ahead: int,
    ) -> None:
        """Wire it up; nothing runs before `start`.

        Args:
            upcoming: the queue.
            open_recording: begins to decode a file for a job, and returns at once; called by several threads.
            spool: where audio lies that came with jobs, and where downloads go.
            directories: where `audio_path` is looked up, in order.
            downloader: fetches into the spool.
            ahead: how many jobs are looked at, and how many downloads run at once.
        """
        self._upcoming = upcoming
        self._open_recording = open_recording
        self._spool = spool
        self._directories = tuple(directories)
        self._downloader = downloader
        self._ahead = ahead
        self._lock = threading.Lock()
        self._entries: dict[int, Entry[R]] = {}
        self._downloads: set[Download] = set()
        self._taken: Entry[R] | None = None
        self._turn = 0
        """Counts takes and releases: what was seen of the queue before one of them says nothing after it."""
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prepare", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it is looking ahead."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to look ahead."""
        self._upcoming.observe(self._wake.set)
        self._wake.set()
        self._thread.start()

    def stop(self) -> None:
        """End everything that goes on and leave nothing of what was prepared; may be called twice.

        What is in hand stays with the worker until it is released; a `take` that waits raises Stopped.
        """
        self._stop.set()
        self._wake.set()
        end = time.monotonic() + _STOP_S
        with self._lock:
            entries, downloads = list(self._entries.values()), list(self._downloads)
            self._entries.clear()
        for entry in entries:
            entry.drop()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        for download in downloads:
            download.join(max(0.0, end - time.monotonic()))

    def take(self, job: Job, should_stop: Callable[[], bool]) -> R:
        """Hand over the recording of a claimed job; it is the worker's until `release` (worker thread).

        Raises:
            JobFailedError: the audio cannot be had.
            Cancelled: `should_stop` said so, or `stop` was called. After either exception nothing is in hand.
        """
        with self._lock:
            entry = self._entries.pop(job.seq, None) or Entry(job)
            entry.job, self._taken = job, entry
            self._turn += 1
            # One job at a time: whatever else had left the queue was not claimed.
            others = [other for other in self._entries.values() if other.missing_since and not other.put_off]
            self._entries = {seq: other for seq, other in self._entries.items() if other not in others}
        for other in others:
            other.drop()
        with ExitStack() as undo:
            undo.callback(self._let_go, entry, keep=False)
            recording = self._recording(entry, lambda: should_stop() or self._stop.is_set())
            undo.pop_all()
        return recording

    def identity(self, should_stop: Callable[[], bool]) -> str | None:
        """Tell what the audio in hand is, for a later attempt, which may find another one there (worker thread).

        Returns:
            The same for the same audio; None: it came with the job and cannot become another one, or it cannot be
            opened, as the recording will say.

        Raises:
            Cancelled: as `take`; the recording stays in hand.
        """
        entry = self._taken
        if entry is None or entry.recording is None or entry.is_spooled:
            return None
        if entry.fetched is not None:
            return entry.fetched.digest
        return entry.recording.identity(lambda: should_stop() or self._stop.is_set())

    def release(self, job: Job, *, final: bool) -> None:
        """End the attempt at a job: its recording is closed, and a download removed, unless the job may come again.

        A job that is not in hand is none of its business (worker thread).
        """
        entry = self._taken
        if entry is not None and entry.job.seq == job.seq:
            self._let_go(entry, keep=not final)

    def _let_go(self, entry: Entry[R], *, keep: bool) -> None:
        entry.close()
        with self._lock:
            self._taken, entry.put_off = None, keep
            self._turn += 1
            kept = keep and not self._stop.is_set() and entry.fetched is not None
            kept = kept and self._entries.setdefault(entry.job.seq, entry) is entry
        if not kept:
            entry.drop()
        self._wake.set()

    def _recording(self, entry: Entry[R], should_stop: Callable[[], bool]) -> R:
        if should_stop():
            raise Cancelled
        ahead = entry.recording
        # What is finished of a job may be dropped after it was opened: by a retry while it waits.
        if ahead is not None and ahead.is_current and ahead.from_s == self._upcoming.resume_position_s(entry.job.seq):
            return ahead
        entry.close()
        if entry.is_remote:
            self._fetch(entry, should_stop)
        entry.recording = self._open(entry)
        return entry.recording

    def _fetch(self, entry: Entry[R], should_stop: Callable[[], bool]) -> None:
        """Have the file there; what failed unexpectedly or some time ago is tried anew."""
        if entry.download is not None:
            outcome = entry.download.wait(should_stop)
            if isinstance(outcome, DownloadedFile):
                return
            if isinstance(outcome, JobFailedError) and entry.download.age_s < _RECENT_S:
                raise outcome
        with self._lock:
            entry.download = self._download(entry.job)
        outcome = entry.download.wait(should_stop)
        if isinstance(outcome, Exception):
            raise outcome

    def _open(self, entry: Entry[R]) -> R:
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

    def _run(self) -> None:
        due = False
        while not self._stop.is_set():
            self._wake.wait(_GRACE_S if due else None)
            self._wake.clear()
            due = outcome_of(self.run_once) is True
            self._stop.wait(_PAUSE_S)

    def run_once(self) -> bool:
        """Look at the next jobs once and begin what can be begun; True: look again soon, even if nothing changes."""
        with self._lock:
            turn, in_hand = self._turn, self._taken is not None
        jobs = self._upcoming.upcoming(self._ahead)
        with self._lock:
            if self._stop.is_set():
                return False
            if turn != self._turn:
                self._wake.set()
                return False
            unwanted = self._unwanted({job.seq for job in jobs}, in_hand=in_hand)
            for job in jobs:
                self._begin(job)
            head = self._head(jobs[0]) if jobs else None
            # Jobs may come in before one that was the next.
            later = [self._entries[job.seq].detach() for job in jobs[1:] if job.seq in self._entries]
            due = any(entry.missing_since is not None for entry in self._entries.values())
        for entry in unwanted:
            entry.drop()
        for recording in later:
            if recording is not None:
                recording.close()
        if head is not None:
            self._open_ahead(head)
        return due

    def _unwanted(self, wanted: set[int], *, in_hand: bool) -> list[Entry[R]]:
        now = time.monotonic()
        for seq, entry in self._entries.items():
            entry.missing_since = None if seq in wanted else entry.missing_since or now
            entry.put_off = entry.put_off and seq not in wanted

        def is_gone(entry: Entry[R]) -> bool:
            grace_s = _KEEP_S if entry.put_off else 0.0 if in_hand else _GRACE_S
            return entry.missing_since is not None and now - entry.missing_since >= grace_s

        gone = [seq for seq, entry in self._entries.items() if is_gone(entry)]
        return [self._entries.pop(seq) for seq in gone]

    def _begin(self, job: Job) -> None:
        entry = self._entries.get(job.seq) or Entry(job)
        if not entry.is_remote:
            return
        self._entries[job.seq] = entry
        if entry.download is None and len(self._downloads) < self._ahead:
            entry.download = self._download(job)

    def _download(self, job: Job) -> Download:
        download = Download(job, self._downloader, self._spool, self._downloaded)
        self._downloads.add(download)
        return download

    def _downloaded(self, download: Download) -> None:
        with self._lock:
            self._downloads.discard(download)
        self._wake.set()

    def _head(self, job: Job) -> Entry[R] | None:
        entry = self._entries.setdefault(job.seq, Entry(job))
        if entry.opened or (entry.is_remote and entry.fetched is None):
            return None
        entry.job, entry.opened = job, True
        return entry

    def _open_ahead(self, entry: Entry[R]) -> None:
        outcome = outcome_of(lambda: self._open(entry), entry.job)
        if isinstance(outcome, Exception):
            return
        with self._lock:
            wanted = self._entries.get(entry.job.seq) is entry and entry.opened and entry.recording is None
            if wanted:
                entry.recording = outcome
        if not wanted:
            outcome.close()
