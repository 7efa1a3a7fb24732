"""The ledger: jobs on disk, their order, and what the broker has not acknowledged. It is the only source of truth.

Every method may be called from any thread; one lock serialises them. When a method that changes something returns, the
change is on disk, unless its docstring says otherwise. Knows nothing of MQTT except packet ids as numbers.
"""

import contextlib
import gc
import os
import stat
import threading
import time
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from cesar_mqtt.errors import ErrorCode, LedgerError, LedgerInUseError
from cesar_mqtt.jobs import (
    STATES,
    TRANSITIONS,
    Admission,
    DeletedJob,
    IllegalTransitionError,
    Job,
    JobState,
    NewJob,
    Result,
    Totals,
)
from cesar_mqtt.ledger.documents import (
    COUNTERS,
    GONE,
    JOBS,
    WINDOWS,
    deleted_job,
    document_may_need_audio,
    has_text,
    job_document,
    job_from,
    needs_windows,
    result_fields,
    retry_rejection,
    spool_files,
    tombstone_document,
    window_document,
    window_from,
)
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.index import Index, window_id
from cesar_mqtt.ledger.outbox import Outbox
from cesar_mqtt.ledger.reserve import KEPT_FOR_COMMANDS
from cesar_mqtt.ledger.storage import Change, JournalStorage
from cesar_mqtt.logs import get_logger
from cesar_mqtt.transcript import Window

log = get_logger(__name__)

_CHECKPOINT_BYTES = 8 << 20
"""A journal smaller than this is not worth a checkpoint."""

_MANY_JOBS = 10_000
"""From here on the garbage collector's passes over all documents take noticeable time."""

_CLEARED_BY_REQUEUE = ("started_at",)
_CLEARED_BY_RETRY = (
    "started_at",
    "completed_at",
    "error_code",
    "error_message",
    "cancelling",
    "expires_at",
    "diarization_error",
    "speakers",
)
_CLEARED_BY_COMPLETION = ("cancelling", "was_completed")
_DIED = "The process died while it told the speakers apart; the text is complete. Retry the job to have them labelled."
_NOT_LABELLED = "Telling the speakers apart was cancelled; the text is complete. Retry the job to have them labelled."
_EXPIRED = {
    "error_code": ErrorCode.EXPIRED.value,
    "error_message": "The job did not start within its `expires_in`. Retry it, or submit it with a longer time.",
}


def acquire_lock(path: Path) -> FileLock:
    """Acquire the lock of the ledger at `path`; any thread may call `release`.

    Raises:
        LedgerInUseError: another process has it.
        LedgerError: the folder cannot be written.
    """
    file_lock = FileLock(path.with_name(path.name + ".lock"), timeout=0, thread_local=False, mode=0o600)
    try:
        file_lock.acquire()
    except Timeout as exc:
        raise LedgerInUseError(
            f"The ledger {path} is in use by another consumer.",
            "Stop that one, or give this one its own --data-dir and its own --name: "
            "two consumers with one name disconnect each other.",
        ) from exc
    except OSError as exc:
        raise LedgerError(f"The folder {path.parent} cannot be written: {exc.strerror}.") from exc
    return file_lock


def data_dir_problem(folder: Path) -> tuple[str, str] | None:
    """Return why other users could replace or read the files of a ledger, and what to do; None: they cannot.

    Root may do everything, and a folder that is missing is created for its owner only.
    """
    try:
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"The data directory {folder} belongs to another user, who can replace its files.", "Change its owner."
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others:
        who = "every user" if others & stat.S_IWOTH else "its group"
        return f"The data directory {folder} can be written by {who}.", f"Run chmod 700 {folder}."
    return None


class Ledger:
    """Jobs in the order of their acceptance, their states, and the states that the broker has not acknowledged.

    The order is that of the sequence numbers, which are never used again; no order depends on a clock. The queue is
    ordered by priority first: see `JobQueue`. A change is on disk before it is in the index and in the outbox, so
    readers never see a state that a crash could take back.
    """

    # -- open and close -------------------------------------------------------------------------------------------

    def __init__(
        self,
        path: Path,
        *,
        max_attempts: int = 3,
        max_queued: int = 100_000,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
    ) -> None:
        """Open or create the ledger at `path`, and requeue the jobs that a crash left in `processing`.

        Args:
            path: `ledger.json`, in an existing folder; the journal and the lock are files beside it.
            max_attempts: a job that crashed the process this often ends as `error` `crashed`.
            max_queued: how many jobs may be queued.
            clock: seconds since the epoch, for timestamps and expiry.
            monotonic: for delays.
            disk: the durable writes; for tests.

        Raises:
            LedgerInUseError: another process has it open.
            LedgerError: it cannot be read, or is damaged.
        """
        self.path = path
        self._max_attempts = max_attempts
        self._max_queued = max_queued
        self._clock = clock
        self._monotonic = monotonic
        self._changed = threading.Condition(threading.RLock())
        """The one lock; notified after every change while a thread waits."""
        self._waiting = 0
        self._observers: list[Callable[[], None]] = []
        self._closed = False
        self._file_lock = acquire_lock(path)
        try:
            self._storage = JournalStorage(path, disk)
        except BaseException:
            self._file_lock.release()
            raise
        try:
            with self._changed:
                self._load()
                self._recover()
        except BaseException:
            self._release_files()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self) -> None:
        """Build the memory state from the tables."""
        storage = self._storage
        counters = storage.rows(COUNTERS).get("1", {})
        self._index = Index(self._rows, gone=storage.rows(GONE), windows=storage.rows(WINDOWS), counters=counters)
        self._rejected = self._rejected_on_disk = counters.get("rejected", 0)
        self._released_on_disk: int = counters.get("settled", 0)
        self._paused = bool(counters.get("paused", False))
        self._defaults: Mapping[str, str] = dict(counters.get("defaults", {}))
        self._piggyback: list[Change] = []
        """Changes that do not need a sync of their own: the next transaction writes them."""
        self._announced_revision: int = counters.get("told", 0)
        revisions = ((revision, seq) for revision, seq in self._revisions() if revision > storage.watermark)
        self._outbox = Outbox(revisions, announced_revision=self._announced_revision)
        self._moves = 0
        self._moved: set[int] = set()
        """The jobs whose position has changed since it was published."""
        self._update_positions()  # the positions that were published are not on disk
        if len(self._rows) > _MANY_JOBS:
            # Each pass of the garbage collector over 100,000 documents stops all threads for a tenth of a second.
            # Documents have no cycles, so it may leave them out.
            gc.collect()
            gc.freeze()

    def _recover(self) -> None:
        """Count a crash for each job in `processing`, and requeue or end it.

        Windows without a job are deleted, or a later attempt or job would find them.
        """
        if self._index.orphaned_windows:
            self._commit([Change(WINDOWS, doc_id, None) for doc_id in self._index.orphaned_windows])
            self._index.orphaned_windows.clear()
        for seq in tuple(self._index.processing):
            row = self._rows[str(seq)]
            crashes = row.get("crashes", 0) + 1
            if row.get("cancelling"):
                self._cancel(seq)
            elif has_text(row):
                self._complete_without_speakers(seq, _DIED)
                log.warning(
                    "Job completed without speakers: the process died", action="recovered", job_id=row["job_id"]
                )
            elif crashes < self._max_attempts:
                self._transition(seq, JobState.QUEUED, {"crashes": crashes}, dropped=_CLEARED_BY_REQUEUE)
                log.warning("Job was running when the process died: requeued", action="recovered", job_id=row["job_id"])
            else:
                self._fail(
                    seq,
                    ErrorCode.CRASHED,
                    f"The process died {crashes} times while it ran this job. Check the audio, then retry.",
                    {"crashes": crashes},
                )

    def close(self) -> None:
        """Write a checkpoint, so that `ledger.json` alone is complete, and release the lock; may be called twice.

        Raises:
            LedgerError: the disk failed; the journal is complete.
        """
        with self._storage.checkpointing, self._changed:
            if self._closed:
                return
            try:
                released = self._index.deduplication.released_until
                if self._rejected != self._rejected_on_disk or released != self._released_on_disk or self._piggyback:
                    self._commit([])
                self._storage.watermark = self._outbox.watermark(self._storage.transaction)
                self._storage.close()
            finally:
                self._closed = True
                self._changed.notify_all()
                self._release_files()

    def _release_files(self) -> None:
        self._storage.abandon()
        self._file_lock.release()

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint if the journal has outgrown the last one; other threads continue meanwhile.

        The journal may grow as large as the checkpoint, so that the cost per transaction does not depend on the number
        of jobs. One caller at a time.

        Raises:
            LedgerError: the disk failed; the old files are complete.
        """
        storage = self._storage
        if storage.journal_bytes < max(_CHECKPOINT_BYTES, storage.checkpoint_bytes):
            return
        try:
            with storage.checkpointing:
                with self._changed:
                    if self._closed:  # the lock is released: the files may belong to another process
                        return
                    snapshot = storage.snapshot()
                storage.write_checkpoint(snapshot)
                with self._changed:
                    storage.cut_journal(snapshot)
        except OSError as exc:
            raise LedgerError(f"The checkpoint {self.path} could not be written: {exc.strerror}.") from exc

    def restore_reserve(self) -> None:
        """Take again the room that changes on a full disk have used; does nothing while there is none."""
        with self._changed:
            if not self._closed:
                self._storage.restore_reserve()

    # -- accept requests ------------------------------------------------------------------------------------------

    def append(self, requests: Sequence[NewJob]) -> list[tuple[Admission, str]]:
        """Admit requests, all in one transaction with one fsync.

        Returns:
            For each request, in order, the decision and the id of its job: that of an earlier job for a duplicate.

        Raises:
            LedgerError: the disk failed; no request was accepted.
        """
        with self._changed:
            room = self._max_queued - len(self._index.queue)
            admissions, accepted = self._index.deduplication.admit(requests, room=room)
            if accepted and len(accepted) == len(requests):
                self._insert(accepted, {})
            else:
                seen = self._seen_retained(requests, admissions)
                if accepted or seen:
                    self._insert(accepted, seen)
                for admission, job_id in admissions:
                    seq = self._index.deduplication.seq(job_id)
                    if admission is Admission.DUPLICATE and seq is not None:
                        self._outbox.republish(seq)
            if admissions:
                self._notify()
            return admissions

    def _seen_retained(
        self, requests: Sequence[NewJob], admissions: Sequence[tuple[Admission, str]]
    ) -> dict[tuple[str, int], Change]:
        """Return the changes that record, once for each job, that the broker retains the job's request."""
        changes = {}
        for request, (admission, job_id) in zip(requests, admissions, strict=True):
            if not request.retained or admission is not Admission.DUPLICATE:
                continue
            seq = self._index.deduplication.seq(job_id)
            deleted = self._index.tombstones.with_request(request.request_key)
            if seq is not None and self._rows[str(seq)]["fingerprint"] == request.fingerprint:
                table, known = JOBS, "retained" in self._rows[str(seq)]
            elif deleted is not None:
                table, seq, known = GONE, deleted.seq, deleted.retained
            else:
                continue
            if not known:
                changes[table, seq] = Change(table, seq, {"retained": True})
        return changes

    def _insert(self, accepted: Mapping[str, NewJob], seen: Mapping[tuple[str, int], Change]) -> None:
        now, revision = self._clock(), self._storage.transaction + 1
        first = self._index.last_seq + 1
        numbered = list(enumerate(accepted.values(), start=first))
        changes = [Change(JOBS, seq, job_document(request, now, revision)) for seq, request in numbered]
        failed = sum(request.failure is not None for _, request in numbered)
        if failed:
            total = self._index.ended_total[JobState.ERROR] + failed
            changes.append(Change(COUNTERS, 1, {JobState.ERROR.value: total}))
        tombstones = self._index.tombstones
        replaced = [deleted for deleted in map(tombstones.status_owner, accepted) if deleted is not None]
        changes += [
            Change(
                GONE, deleted.seq, {"status": False} | ({} if tombstones.has_messages(deleted) else {"cleared": True})
            )
            for deleted in replaced
        ]
        self._commit([*changes, *seen.values()])
        for deleted in replaced:
            tombstones.release_status(deleted)
        for table, seq in seen:
            if table == GONE:
                tombstones.mark_retained(seq)
        for seq, request in numbered:
            self._index.add(seq, request, now)
        self._update_positions()
        rows = self._rows
        for seq, _ in numbered:
            self._enqueue_status(seq, rows[str(seq)])

    def count_rejected(self) -> None:
        """Count a rejected message; on disk with the next transaction."""
        with self._changed:
            self._rejected += 1
            self._notify()

    def release_packet_ids(self, job_ids: Collection[str]) -> None:
        """Take no later message for a redelivery of these jobs' requests; on disk with the next transaction.

        The broker may give their packet ids to other messages, even to messages with the same content.
        """
        with self._changed:
            self._index.deduplication.release_packet_ids(job_ids)

    def release_packet_id(self, packet_id: int) -> None:
        """Take no later message for a redelivery of the request that came with this packet id: a new one has it."""
        with self._changed:
            self._index.deduplication.release_packet_id(packet_id)

    def release_all_packet_ids(self, *, keep: Collection[str] = ()) -> None:
        """Release all packet ids but those of the jobs in `keep`; on disk now, or later if the disk fails."""
        with self._changed:
            deduplication = self._index.deduplication
            deduplication.release_packet_ids(
                [job_id for job_id in deduplication.jobs_with_packet_id if job_id not in keep]
            )
            self.persist_released_packet_ids()

    def persist_released_packet_ids(self) -> None:
        """Write to disk which packet ids are released; if the disk fails, the next transaction does it."""
        with self._changed, contextlib.suppress(LedgerError):
            if self._index.deduplication.released_until != self._released_on_disk:
                self._commit([])

    # -- a queue that consumers share ------------------------------------------------------------------------------

    def append_claimed(self, request: NewJob, *, crashes: int) -> Job:
        """Admit a job that the shared queue delivered, and return it.

        Args:
            request: has a claim; no other job has its id.
            crashes: how many of its consumers died; `max_attempts` of them, and the job ends as `crashed`.

        Raises:
            LedgerError: the disk failed.
        """
        with self._changed:
            self._insert({request.job_id: request}, {})
            seq = self._index.last_seq
            if crashes >= self._max_attempts:
                self._transition(seq, JobState.PROCESSING, {"crashes": crashes})
                self._fail(
                    seq,
                    ErrorCode.CRASHED,
                    f"{crashes} consumers died or lost their connection while they ran this job. Check the audio, then "
                    "retry.",
                    {},
                )
            self._notify()
            return self._job(seq)

    def append_cancelled(self, request: NewJob) -> Job:
        """Admit a job of the shared queue that was cancelled there, and return it. Raises LedgerError."""
        with self._changed:
            self._insert({request.job_id: request}, {})
            seq = self._index.last_seq
            self._cancel(seq)
            return self._job(seq)

    def check_retry(self, job_id: str) -> None:
        """Raise IllegalTransitionError, with a sentence for the user, if a job of the ledger cannot be retried."""
        with self._changed:
            seq = self._index.deduplication.seq(job_id)
            rejection = None if seq is None else retry_rejection(self._rows[str(seq)])
            if rejection is not None:
                raise IllegalTransitionError(rejection)

    def claimed(self) -> list[Job]:
        """Return the jobs of a shared queue that have not ended, or whose status the broker has not acknowledged."""
        with self._changed:
            rows = ((int(key), row) for key, row in self._rows.items() if "claim" in row)
            return [
                self._job(seq) for seq, row in rows if not STATES[row["state"]].final or self._outbox.is_pending(seq)
            ]

    def is_unpublished(self, seq: int) -> bool:
        """Whether the broker has not acknowledged the newest status of a job."""
        with self._changed:
            return self._outbox.is_pending(seq)

    def forget(self, seq: int) -> list[str]:
        """Remove a job that another consumer has now; its retained messages stay, which are that consumer's.

        Returns:
            Its files in the spool folder, for the caller to delete; none if there is no such job.

        Raises:
            LedgerError: the disk failed; the job stays.
        """
        with self._changed:
            row = self._rows.get(str(seq))
            if row is None:
                return []
            changes = [Change(JOBS, seq, None), *self._without_windows(seq)]
            changes.append(Change(COUNTERS, 1, {"last_seq": self._index.last_seq}))
            self._commit(changes, keep_reserve=0)
            self._index.forget(seq, row)
            self._outbox.drop([seq])
            self._update_positions()
            self._notify()
            return list(spool_files(row))

    # -- run jobs -------------------------------------------------------------------------------------------------

    def claim(self) -> Job | None:
        """Move the first ready job to `processing` and count its attempt; None if there is none.

        Raises:
            LedgerError: the disk failed; the job stays queued.
        """
        with self._changed:
            seq = self._next_ready()
            if seq is None:
                return None
            attempt = self._rows[str(seq)].get("attempt", 0) + 1
            self._transition(seq, JobState.PROCESSING, {"attempt": attempt, "started_at": self._clock()})
            return self._job(seq)

    def _next_ready(self) -> int | None:
        return None if self._paused else next(self._all_ready(), None)

    def _all_ready(self) -> Iterator[int]:
        return self._index.queue.all_ready(self._monotonic(), self._clock())

    def is_outranked(self, seq: int) -> bool:
        """Whether a job that could be started now has a higher priority than this running one."""
        with self._changed:
            first = self._next_ready()
            return first is not None and self._priority(first) > self._priority(seq)

    def _priority(self, seq: int) -> int:
        return int(self._rows.get(str(seq), {}).get("priority", 0))

    def wait_for_work(self, stopped: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Block until a job is ready (True), or until `stopped()` is true or the time is over (False).

        `wake` makes it call `stopped` again.
        """
        deadline = None if timeout_s is None else self._monotonic() + timeout_s
        with self._changed:
            while not stopped() and self._next_ready() is None:
                now = self._monotonic()
                if deadline is not None and now >= deadline:
                    return False
                until_ready = None if self._paused else self._index.queue.next_ready_in(now, self._clock())
                waits = [until_ready, None if deadline is None else deadline - now]
                self._waiting += 1
                self._changed.wait(min((wait for wait in waits if wait is not None), default=None))
                self._waiting -= 1
            return not stopped()

    def wake(self) -> None:
        """Make every thread in `wait_for_work` check its conditions again."""
        with self._changed:
            self._changed.notify_all()

    def add_window(self, seq: int, window: Window, *, identity: str | None = None) -> None:
        """Store a finished window of a job in `processing`; a later attempt continues at its end.

        Args:
            seq: the job.
            window: the next one of this job.
            identity: of the audio, if that may change between attempts; see `keep_windows_of`.

        Raises:
            LedgerError: the disk failed; the job may go on, and a later call may pass this window again.
            IllegalTransitionError: the job is not processing, or this is not its next window.
        """
        document = window_document(window) | ({} if identity is None else {"identity": identity})
        with self._changed:
            count = self._index.windows.get(seq, 0)
            if seq not in self._index.processing or window.number != count:
                raise IllegalTransitionError(
                    f"Job number {seq} is not processing, or window {window.number} is not its next one."
                )
            self._commit([Change(WINDOWS, window_id(seq, count), document)])
            self._index.set_window_count(seq, count + 1)

    def keep_windows_of(self, seq: int, identity: str) -> bool:
        """Delete a job's windows unless they are of the audio with this identity; return whether they were kept.

        Raises:
            LedgerError: the disk failed; the windows are still there.
        """
        with self._changed:
            first = self._storage.rows(WINDOWS).get(str(window_id(seq, 0)))
            if first is None or first.get("identity") == identity:
                return True
            self._commit(self._without_windows(seq))
            self._index.set_window_count(seq, 0)
            return False

    def _without_windows(self, seq: int, *, start: int = 0) -> list[Change]:
        return [Change(WINDOWS, doc_id, None) for doc_id in self._index.window_ids(seq, start=start)]

    def complete(self, seq: int, result: Result) -> None:
        """Record the transcript of a job in `processing`.

        Raises:
            LedgerError: the disk failed; the job is still processing.
            IllegalTransitionError: the job is not processing.
        """
        with self._changed:
            if seq not in self._index.processing:
                raise IllegalTransitionError(f"Job number {seq} is not processing and cannot be completed.")
            # Windows with speakers replace those without.
            stored = 0 if result.speakers is not None else self._index.windows.get(seq, 0)
            kept = result.windows if needs_windows(self._rows.get(str(seq), {})) else ()
            missing = list(enumerate(kept))[stored:]
            also = [Change(WINDOWS, window_id(seq, number), window_document(window)) for number, window in missing]
            also += self._without_windows(seq, start=len(kept))
            early = self._rows.get(str(seq), {}).get("warnings", ())
            warnings = tuple(dict.fromkeys((*early, *result.warnings)))
            fields = {"completed_at": self._clock(), **result_fields(replace(result, warnings=warnings))}
            self._transition(seq, JobState.COMPLETED, fields, dropped=_CLEARED_BY_COMPLETION, also=also)
            self._index.set_window_count(seq, len(kept))

    def record_text(self, seq: int, result: Result, *, identity: str | None = None) -> Job:
        """Record the transcript of a job in `processing` whose speakers are still to be told apart, and return the job.

        From here on the job is never transcribed again: it ends `completed` even if the process dies.

        Args:
            seq: the job.
            result: the transcript, with all windows.
            identity: of the audio, as in `add_window`.

        Raises:
            LedgerError: the disk failed; nothing is recorded.
            IllegalTransitionError: the job is not processing.
        """
        with self._changed:
            if seq not in self._index.processing:
                raise IllegalTransitionError(f"Job number {seq} is not processing and has no use for a transcript.")
            known = {} if identity is None else {"identity": identity}
            missing = list(enumerate(result.windows))[self._index.windows.get(seq, 0) :]
            changes = [Change(WINDOWS, window_id(seq, number), window_document(one) | known) for number, one in missing]
            early = self._rows[str(seq)].get("warnings", ())
            fields = result_fields(replace(result, warnings=tuple(dict.fromkeys((*early, *result.warnings)))))
            self._commit([*changes, Change(JOBS, seq, fields)])
            self._index.set_window_count(seq, len(result.windows))
            return self._job(seq)

    def is_of_audio(self, seq: int, identity: str | None) -> bool:
        """Whether a job's windows are of the audio with this identity, as far as that was recorded."""
        with self._changed:
            first = self._storage.rows(WINDOWS).get(str(window_id(seq, 0)), {})
            return first.get("identity", identity) == identity

    def complete_without_speakers(self, seq: int, error: str) -> None:
        """Record that the speakers of a job in `processing`, whose text is recorded, were not told apart, and why.

        Raises as `complete`.
        """
        with self._changed:
            if seq not in self._index.processing:
                raise IllegalTransitionError(f"Job number {seq} is not processing.")
            self._complete_without_speakers(seq, error)

    def _complete_without_speakers(self, seq: int, error: str, *, keep_reserve: int = KEPT_FOR_COMMANDS) -> None:
        fields = {"completed_at": self._clock(), "diarization_error": error}
        self._transition(seq, JobState.COMPLETED, fields, dropped=_CLEARED_BY_COMPLETION, keep_reserve=keep_reserve)

    def fail(self, seq: int, code: ErrorCode, message: str) -> None:
        """Record that a job in `processing` ended without a transcript. Raises as `complete`."""
        with self._changed:
            self._fail(seq, code, message, {})

    def _fail(self, seq: int, code: ErrorCode, message: str, fields: Mapping[str, Any]) -> None:
        failure = {"completed_at": self._clock(), "error_code": code.value, "error_message": message}
        also = [] if code.retryable else self._without_windows(seq)
        self._transition(seq, JobState.ERROR, {**failure, **fields}, dropped=("cancelling",), also=also)
        if not code.retryable:
            self._index.set_window_count(seq, 0)

    def requeue(self, seq: int) -> Job:
        """Move a job in `processing` back to its place in the queue, as a forced stop does, and return it.

        A job that is being cancelled ends as `cancelled` instead. Raises as `complete`.
        """
        with self._changed:
            self._requeue(seq, {})
            return self._job(seq)

    def preempt(self, seq: int) -> Job:
        """Requeue a job in `processing` as the first of its priority, and return it; it does not expire any more.

        A job that is being cancelled ends as `cancelled` instead. Raises as `complete`.
        """
        with self._changed:
            self._requeue(seq, {"preempted": True})
            return self._job(seq)

    def defer(self, seq: int, delay_s: float) -> None:
        """Requeue a job in `processing`, not to be claimed for `delay_s`; the jobs behind it go first.

        The delay is in memory only: after a restart the job is ready at once. A job that is being cancelled ends as
        `cancelled` instead. Raises as `complete`.
        """
        with self._changed:
            retries = self._rows.get(str(seq), {}).get("retries", 0) + 1
            if self._requeue(seq, {"retries": retries}):
                self._index.queue.delay(seq, self._monotonic() + delay_s)

    def _requeue(self, seq: int, fields: Mapping[str, Any]) -> bool:
        if seq not in self._index.processing:  # `TRANSITIONS` allows it from `error`, too, but that is a retry
            raise IllegalTransitionError(f"Job number {seq} is not processing and cannot be requeued.")
        if self.is_cancelling(seq):
            self._cancel(seq)
            return False
        dropped = (*_CLEARED_BY_REQUEUE, "expires_at") if "preempted" in fields else _CLEARED_BY_REQUEUE
        self._transition(seq, JobState.QUEUED, fields, dropped=dropped)
        return True

    def finish_cancelling(self, seq: int) -> None:
        """Record that the worker stopped a job in `processing` because of a `cancel` command. Raises as `complete`."""
        with self._changed:
            self._cancel(seq)

    def _cancel(self, seq: int) -> None:
        if "was_completed" in self._rows.get(str(seq), {}):
            self._complete_without_speakers(seq, _NOT_LABELLED, keep_reserve=0)
            return
        fields = {"completed_at": self._clock()}
        self._transition(seq, JobState.CANCELLED, fields, dropped=("cancelling",), keep_reserve=0)

    # -- commands -------------------------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Job | None:
        """Cancel a queued job, or let the worker stop a running one: see `is_cancelling`.

        Returns:
            The job: `cancelled`, or still `processing`; None: there is no such job.

        Raises:
            IllegalTransitionError: it has ended.
            LedgerError: the disk failed; the job continues.
        """
        with self._changed:
            seq = self._index.deduplication.seq(job_id)
            if seq is None:
                return None
            state = STATES[self._rows[str(seq)]["state"]]
            if state.final:
                raise IllegalTransitionError(f"Job {job_id} has already ended as {state} and cannot be cancelled.")
            if state is JobState.QUEUED:
                self._cancel(seq)
            elif not self.is_cancelling(seq):
                self._commit([Change(JOBS, seq, {"cancelling": True})], keep_reserve=0)
                self._notify()
            return self._job(seq)

    def retry(self, job_id: str) -> Job | None:
        """Queue a job that ended as `error` or `cancelled` again, with the same options; or to tell its speakers apart.

        Its position in the queue follows from its priority and its sequence number. With uploaded audio the finished
        windows are kept; a file or URL may have changed since.

        Returns:
            The job; None: there is no such job.

        Raises:
            IllegalTransitionError: it did not end that way, or its audio was not kept; a sentence for the user.
            LedgerError: the disk failed; the job stays as it is.
        """
        with self._changed:
            seq = self._index.deduplication.seq(job_id)
            if seq is None:
                return None
            row = self._rows[str(seq)]
            if rejection := retry_rejection(row):
                raise IllegalTransitionError(rejection)
            keeps_windows = row["audio"][0] == "spool" or has_text(row)
            also = [] if keeps_windows else self._without_windows(seq)
            fields = {"crashes": 0, "retries": 0}
            if row["state"] == JobState.COMPLETED:
                fields["was_completed"] = True
            self._transition(seq, JobState.QUEUED, fields, dropped=_CLEARED_BY_RETRY, also=also)
            if not keeps_windows:
                self._index.set_window_count(seq, 0)
            return self._job(seq)

    def delete(self, job_id: str) -> tuple[Job, list[str]] | None:
        """Delete a job that is queued or has ended; the publisher then clears its retained messages.

        Returns:
            The job as it was, and its files in the spool folder, for the caller to delete; None: there is no such job.

        Raises:
            IllegalTransitionError: it is processing.
            LedgerError: the disk failed; the job stays.
        """
        with self._changed:
            seq = self._index.deduplication.seq(job_id)
            if seq is None:
                return None
            if seq in self._index.processing:
                raise IllegalTransitionError(f"Job {job_id} is processing: cancel it first.")
            job = self._job(seq)
            return job, self._delete([seq])

    def pause(self, *, on: bool) -> None:
        """Stop starting jobs, or start them again; persisted over restarts. Raises LedgerError."""
        with self._changed:
            if on != self._paused:
                self._commit([Change(COUNTERS, 1, {"paused": on})], keep_reserve=0)
                self._paused = on
                self._notify()

    def cancel_queued(self, limit: int) -> list[Job]:
        """Cancel queued jobs, at most `limit`, in one transaction, and return them.

        Raises:
            LedgerError: the disk failed; all jobs continue.
        """
        with self._changed:
            seqs = list(islice(self._index.queue, limit))
            if not seqs:
                return []
            completed = [seq for seq in seqs if "was_completed" in self._rows[str(seq)]]
            for seq in completed:
                self._cancel(seq)
            if completed:
                return [self._job(seq) for seq in completed]
            now, state = self._clock(), JobState.CANCELLED
            fields = {"state": state.value, "updated_at": now, "completed_at": now}
            fields["revision"] = self._storage.transaction + 1
            dropped = [("preempted",) if "preempted" in self._rows[str(seq)] else () for seq in seqs]
            changes = [Change(JOBS, seq, fields, names) for seq, names in zip(seqs, dropped, strict=True)]
            changes.append(Change(COUNTERS, 1, {state.value: self._index.ended_total[state] + len(seqs)}))
            self._commit(changes)
            for seq in seqs:
                document = self._rows[str(seq)]
                self._index.move(seq, JobState.QUEUED, state, document)
                self._enqueue_status(seq, document)
            self._update_positions()
            self._notify()
            return [self._job(seq) for seq in seqs]

    def last_retryable(self) -> str | None:
        """Return the id of the job that ended last of those that can be retried; None: there is none."""
        with self._changed:
            seq = next(reversed(self._index.retryable), None)
            return None if seq is None else str(self._rows[str(seq)]["job_id"])

    @property
    def defaults(self) -> Mapping[str, str]:
        """What was set for jobs that name no model or no language, by name; persisted over restarts."""
        with self._changed:
            return self._defaults

    def set_defaults(self, defaults: Mapping[str, str]) -> None:
        """Replace what was set. Raises LedgerError."""
        with self._changed:
            if defaults != self._defaults:
                self._commit([Change(COUNTERS, 1, {"defaults": dict(defaults)})])
                self._defaults = dict(defaults)

    # -- retention ------------------------------------------------------------------------------------------------

    def expire(self, limit: int = 200) -> list[Job]:
        """End queued jobs that have expired as `cancelled`, at most `limit`, and return them.

        Raises:
            LedgerError: the disk failed; a later call ends and returns the remaining jobs.
        """
        ended: list[Job] = []
        for _ in range(limit):
            with self._changed:  # released after each job, so that no other thread waits for more than one sync
                seq = next(iter(self._index.queue.expired(self._clock(), 1)), None)
                if seq is None:
                    break
                self._transition(seq, JobState.CANCELLED, {"completed_at": self._clock(), **_EXPIRED})
                ended.append(self._job(seq))
        return ended

    def delete_finished(
        self, *, before: float, keep: int, keep_rejected: int | None = None, limit: int = 200
    ) -> tuple[int, list[str]]:
        """Delete jobs that ended by `before` (seconds since the epoch), and all but the newest of the others.

        Oldest first, at most `limit` in one transaction, so that other threads do not wait long. The publisher then
        clears their retained messages.

        Args:
            before: seconds since the epoch.
            keep: how many finished jobs are kept at most.
            keep_rejected: how many recorded rejections are kept at most; they do not count as finished jobs. None: all.
            limit: how many jobs are deleted at most.

        Returns:
            How many jobs were deleted, and their files in the spool folder, for the caller to delete.

        Raises:
            LedgerError: the disk failed; no job was deleted.
        """
        with self._changed:
            finished, rejected = self._index.finished, self._index.rejected
            seqs: list[int] = []
            for ended, kept in (
                (finished, keep),
                (rejected, len(rejected) if keep_rejected is None else keep_rejected),
            ):
                seqs += islice(ended, min(limit, max(0, len(ended) - kept)))
                seqs += ended.due(before, limit)
            seqs = list(dict.fromkeys(seqs))[:limit]
            return len(seqs), self._delete(seqs)

    def _delete(self, seqs: Sequence[int]) -> list[str]:
        if not seqs:
            return []
        rows = [self._rows[str(seq)] for seq in seqs]
        deleted = [deleted_job(seq, row) for seq, row in zip(seqs, rows, strict=True)]
        changes = [Change(JOBS, seq, None) for seq in seqs]
        changes += [change for seq in seqs for change in self._without_windows(seq)]
        changes += [Change(GONE, job.seq, tombstone_document(job)) for job in deleted]
        # Sequence numbers are never used again, so the last one is kept apart from its job.
        counters = {"last_seq": self._index.last_seq, "deleted": self._index.deleted_total + len(seqs)}
        changes.append(Change(COUNTERS, 1, counters))
        self._commit(changes, keep_reserve=0)
        for job, row in zip(deleted, rows, strict=True):
            self._index.delete(job, row)
        self._outbox.drop(seqs)
        self._update_positions()
        self._notify()
        return [name for row in rows for name in spool_files(row)]

    # -- publish: what the broker has not acknowledged ------------------------------------------------------------

    @property
    def has_unpublished(self) -> bool:
        """Whether the broker has not acknowledged all statuses and all clears."""
        with self._changed:
            return bool(self._outbox) or bool(self._index.tombstones.pending)

    def has_unpublished_besides(self, statuses: Collection[int], clears: Collection[int]) -> bool:
        """Whether that is so for jobs other than these; sequence numbers."""
        with self._changed:
            pending = self._index.tombstones.pending
            return self._outbox.has_pending(statuses) or any(seq not in clears for seq in pending)

    def unpublished(self, limit: int, *, exclude: Collection[int] = ()) -> list[tuple[int, Job]]:
        """Return the states to publish next, oldest change first.

        Each change of state is returned once, in order, so that a subscriber sees every state of a job. Later calls
        return a job again, in its newest state only, until `mark_published`.

        Args:
            limit: how many at most.
            exclude: sequence numbers of jobs whose newest state is in flight; newer changes are returned nevertheless.

        Returns:
            The number to pass to `mark_published`, and the job as it was at that change.
        """
        with self._changed:
            return self._outbox.take(limit, exclude, self._job)

    def coalesce(self, lost: Iterable[tuple[int, int]] = ()) -> None:
        """Drop the states that jobs passed through: after a connection was lost only the newest ones are published.

        Args:
            lost: what was in flight then: the sequence number of each job, and the number that `unpublished` returned.
        """
        with self._changed:
            self._outbox.coalesce(lost)

    @property
    def events_dropped(self) -> int:
        """How many changes of jobs have had no event since the start, because the job changed again too soon."""
        return self._outbox.dropped

    @property
    def moves(self) -> int:
        """How often the positions of the first jobs in the queue have changed since the start."""
        return self._moves

    def republish_moved(self) -> None:
        """Publish the statuses of the jobs whose position has changed since the last call, if they are still queued."""
        with self._changed:
            for seq in sorted(self._moved):
                if self._index.queue.position(seq)[0] is not None:
                    self._outbox.republish(seq)
            self._moved.clear()

    def mark_published(self, acknowledged: Iterable[tuple[int, int]]) -> None:
        """Record that the broker acknowledged statuses; on disk with the next transaction.

        After a crash before that they are published again, which changes nothing for a reader of retained messages.

        Args:
            acknowledged: the sequence number of each job, and the number that `unpublished` returned with it.
        """
        with self._changed:
            for seq, number in acknowledged:
                self._outbox.acknowledge(seq, number)

    def republish_all(self, *, restored: bool = False) -> None:
        """Publish every status again: the broker lost its retained messages.

        The watermark goes back, on disk, so that a crash in the middle does not end it; `announced_revision` records
        where it was, since no change up to there is new. If the disk fails, the next transaction writes both.

        Args:
            restored: the broker restored an older state of them, so the messages of deleted jobs are cleared again.
        """
        with self._changed:
            self._announced_revision = max(self._announced_revision, self._outbox.watermark(self._storage.transaction))
            self._piggyback.append(Change(COUNTERS, 1, {"told": self._announced_revision}))
            self._outbox.enqueue_all(self._revisions())
            if restored:
                self._piggyback += [
                    Change(GONE, seq, {"cleared": False}) for seq in self._index.tombstones.clear_again()
                ]
            with contextlib.suppress(LedgerError):
                self._commit([])
            self._notify()

    def republish(self, seqs: Collection[int]) -> None:
        """Publish the statuses of these jobs again, and clear those that were deleted: the broker may have lost that.

        In memory only, as the broker has acknowledged it.
        """
        with self._changed:
            for seq in seqs:
                if str(seq) in self._rows:
                    self._outbox.republish(seq)
            again = self._index.tombstones.clear_again(seqs)
            self._piggyback += [Change(GONE, seq, {"cleared": False}) for seq in again]
            self._notify()

    def pending_clears(self, limit: int, *, exclude: Collection[int] = ()) -> list[DeletedJob]:
        """Return deleted jobs whose retained messages have to be cleared, until `mark_cleared`."""
        with self._changed:
            pending = self._index.tombstones.pending
            return list(islice((deleted for seq, deleted in pending.items() if seq not in exclude), limit))

    def mark_cleared(self, seq: int) -> None:
        """Record that the broker has cleared a deleted job's messages; on disk with the next transaction."""
        with self._changed:
            evicted = self._index.tombstones.mark_cleared(seq)
            if evicted is not None:
                self._piggyback.append(Change(GONE, seq, {"cleared": True}))
                self._piggyback += [Change(GONE, other, None) for other in evicted]
                self._notify()

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` after every change, under the ledger's lock: it must only set a flag."""
        self._observers.append(observer)

    # -- queries --------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """Return the job as it is now; None: there is no such job."""
        with self._changed:
            seq = self._index.deduplication.seq(job_id)
            return None if seq is None else self._job(seq)

    def jobs(self, *, states: Collection[JobState] = (), after: int = 0, limit: int = 100) -> list[Job]:
        """Return jobs, oldest first, from the one after number `after` on; no states: in all states."""
        with self._changed:
            return [self._job(seq) for seq in islice(self._in_states(states, after), limit)]

    def count(self, states: Collection[JobState] = ()) -> int:
        """Return how many jobs are in these states; no states: how many jobs there are."""
        with self._changed:
            return sum(1 for _ in self._in_states(states, 0))

    def _in_states(self, states: Collection[JobState], after: int) -> Iterator[int]:
        wanted = frozenset(states or JobState)
        seqs = self._index.in_states(wanted)
        return (seq for seq in seqs[bisect(seqs, after) :] if self._rows[str(seq)]["state"] in wanted)

    def upcoming(self, limit: int) -> list[Job]:
        """Return the jobs that will be claimed next, in order, without deferred ones; also while paused."""
        with self._changed:
            return [self._job(seq) for seq in islice(self._all_ready(), limit)]

    @property
    def is_paused(self) -> bool:
        """Whether no job is claimed until `pause` is called again. Takes no lock."""
        return self._paused

    def preempted(self) -> frozenset[int]:
        """Return the sequence numbers of the queued jobs that were preempted."""
        with self._changed:
            return frozenset(self._index.queue.preempted)

    def processing(self) -> tuple[int, ...]:
        """Return the sequence number of the job in `processing`, if there is one."""
        with self._changed:
            return tuple(self._index.processing)

    def is_cancelling(self, seq: int) -> bool:
        """Whether a running job is to be cancelled, or was forgotten.

        Takes no lock, since it is called many times a second.
        """
        row = self._rows.get(str(seq))
        return row is None or "cancelling" in row

    def last_finished(self, state: JobState) -> Job | None:
        """Return the job that ended last in this state, rejections aside; None: no such job is left."""
        with self._changed:
            newest_first = reversed(self._index.finished)
            newest = next((seq for seq in newest_first if self._rows[str(seq)]["state"] == state), None)
            return None if newest is None else self._job(newest)

    def windows(self, seq: int) -> tuple[Window, ...]:
        """Return a job's stored windows: until it has ended for good, and afterwards if its formats need them."""
        with self._changed:
            rows = self._storage.rows(WINDOWS)
            documents = [rows[str(doc_id)] for doc_id in self._index.window_ids(seq)]
        # Documents never change, so the lock is not held while hours of speech are parsed.
        return tuple(window_from(number, document) for number, document in enumerate(documents))

    def resume_position_s(self, seq: int) -> float:
        """Return the second of the recording at which the job's next attempt continues; 0.0: from the start."""
        with self._changed:
            count = self._index.windows.get(seq, 0)
            return float(self._storage.rows(WINDOWS)[str(window_id(seq, count - 1))]["until_s"]) if count else 0.0

    def needed_spool_files(self) -> set[str]:
        """Return the names in the spool folder that jobs need, or may need for a retry."""
        with self._changed:
            return {name for row in self._rows.values() if document_may_need_audio(row) for name in spool_files(row)}

    def retryable_uploads(self) -> list[tuple[str, str]]:
        """Return id and spool file of each job that has ended and may be retried with its upload, oldest end first."""
        with self._changed:
            rows = (self._rows[str(seq)] for seq in self._index.finished)
            return [(row["job_id"], name) for row in rows if document_may_need_audio(row) for name in spool_files(row)]

    def totals(self) -> Totals:
        """Return the counts for the consumer's own topics; the cost does not depend on the number of jobs."""
        with self._changed:
            index = self._index
            oldest = index.queue.oldest()
            processing = index.processing[0] if index.processing else None
            return Totals(
                queued=len(index.queue),
                completed_total=index.ended_total[JobState.COMPLETED],
                error_total=index.ended_total[JobState.ERROR],
                cancelled_total=index.ended_total[JobState.CANCELLED],
                rejected_total=self._rejected,
                oldest_queued_at=None if oldest is None else self._rows[str(oldest)]["created_at"],
                processing=None if processing is None else self._rows[str(processing)]["job_id"],
                paused=self._paused,
                deleted_total=index.deleted_total,
                revision=self._storage.transaction,
                retryable=len(index.retryable),
            )

    # -- transactions; the caller holds the lock ------------------------------------------------------------------

    @property
    def _rows(self) -> Mapping[str, Mapping[str, Any]]:
        return self._storage.rows(JOBS)

    def _job(self, seq: int) -> Job:
        return job_from(seq, self._rows[str(seq)], *self._index.queue.position(seq))

    def _revisions(self) -> Iterator[tuple[int, int]]:
        """Yield the revision and the sequence number of every job."""
        return ((document["revision"], int(key)) for key, document in self._rows.items())

    def _commit(self, changes: list[Change], *, keep_reserve: int | None = None) -> None:
        """Write a transaction: these changes, the waiting ones, and the outbox's watermark.

        `keep_reserve` is for a full disk, see `JournalStorage.commit`: nothing new is accepted then, but jobs end, and
        commands that free room are executed.
        """
        if self._closed:
            raise LedgerError(f"The ledger {self.path} is closed.")
        if self._rejected != self._rejected_on_disk:
            changes.append(Change(COUNTERS, 1, {"rejected": self._rejected}))
        released = self._index.deduplication.released_until
        if released != self._released_on_disk:
            changes.append(Change(COUNTERS, 1, {"settled": released}))
        if self._piggyback:
            changes[:0] = self._piggyback
        storage = self._storage
        storage.commit(changes, watermark=self._outbox.watermark(storage.transaction), keep_reserve=keep_reserve)
        self._rejected_on_disk, self._released_on_disk = self._rejected, released
        self._piggyback.clear()

    def _transition(
        self,
        seq: int,
        state: JobState,
        fields: Mapping[str, Any],
        *,
        dropped: tuple[str, ...] = (),
        also: Iterable[Change] = (),
        keep_reserve: int = KEPT_FOR_COMMANDS,
    ) -> None:
        """Move a job to `state`, with other changes in the same transaction."""
        rows, key = self._rows, str(seq)
        row = rows.get(key)
        if row is None:
            raise IllegalTransitionError(f"Job number {seq} does not exist and cannot become {state}.")
        before = STATES[row["state"]]
        if state not in TRANSITIONS[before]:
            raise IllegalTransitionError(f"Job {row['job_id']} is {before} and cannot become {state}.")
        document = {
            "state": state.value,
            "revision": self._storage.transaction + 1,
            "updated_at": self._clock(),
            **fields,
        }
        if "preempted" in row:  # a job is first of its priority only until it leaves the queue
            dropped = (*dropped, "preempted")
        if dropped:
            dropped = tuple([name for name in dropped if name in row])
        changes = [Change(JOBS, seq, document, dropped), *also]
        if state.final:
            changes.append(Change(COUNTERS, 1, {state.value: self._index.ended_total[state] + 1}))
        self._commit(changes, keep_reserve=keep_reserve)
        self._index.move(seq, before, state, rows[key])
        if before is JobState.QUEUED or state is JobState.QUEUED:
            self._update_positions()
        self._enqueue_status(seq, rows[key])
        self._notify()

    def _enqueue_status(self, seq: int, document: Mapping[str, Any]) -> None:
        self._outbox.enqueue(seq, document["revision"], (seq, document, *self._index.queue.position(seq)))

    def _update_positions(self) -> None:
        """Update the positions of the first jobs in the queue."""
        moved = self._index.queue.update_positions(self._clock())
        if moved:
            self._moved.update(moved)
            self._moves += 1

    def _notify(self) -> None:
        if self._waiting:
            self._changed.notify_all()
        for observer in self._observers:
            observer()
