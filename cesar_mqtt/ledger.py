"""The ledger: the only truth about jobs, durable before anybody is told.

Every method may be called from any thread; one lock serialises them. What a method says is done is on disk when it
returns.
"""

import contextlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from cesar_mqtt.disk import Disk
from cesar_mqtt.errors import ErrorCode, LedgerError, LedgerInUseError
from cesar_mqtt.jobs import (
    TRANSITIONS,
    Gone,
    IllegalTransitionError,
    Job,
    JobState,
    NewJob,
    Result,
    Totals,
    Verdict,
)
from cesar_mqtt.line import Line
from cesar_mqtt.outbox import Outbox
from cesar_mqtt.records import document_of, job_of, needs_audio, result_of
from cesar_mqtt.register import Register
from cesar_mqtt.storage import Change, JournalStorage
from cesar_mqtt.tables import JournalDB

logger = logging.getLogger(__name__)

TABLE = "jobs"
COUNTERS = "counters"
GONE = "gone"
"""Deleted jobs whose status the broker may still retain."""

_CHECKPOINT_BYTES = 8 << 20


def lock(path: Path) -> FileLock:
    """Take the lock of the ledger at `path`; whichever thread is done with it calls `release`.

    Raises:
        LedgerInUseError: another process has it.
        LedgerError: the folder cannot be written.
    """
    file_lock = FileLock(path.with_name(path.name + ".lock"), timeout=0, thread_local=False)
    try:
        file_lock.acquire()
    except Timeout as exc:
        raise LedgerInUseError(
            f"The ledger {path} is in use by another consumer. Stop that one, or give this one its own --data-dir."
        ) from exc
    except OSError as exc:
        raise LedgerError(f"The folder {path.parent} cannot be written: {exc.strerror}.") from exc
    return file_lock


class Ledger:
    """Jobs in the order of their acceptance, their states, and which of them the broker has not been told of.

    The order is by an own sequence number that is never used again; clocks only decorate.
    """

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
        """Open or create the ledger at `path`, and put back into the queue what a crash left in `processing`.

        Args:
            path: `ledger.json`; its folder must exist. The journal and the lock stand beside it.
            max_attempts: after so many crashes in mid-work a job becomes `error` `crashed`.
            max_queued: how many jobs may wait.
            clock: seconds since the epoch, for what is told.
            monotonic: seconds since whenever, for delays.
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
        self._observers: list[Callable[[], None]] = []
        self._closed = False
        self._file_lock = lock(path)
        try:
            self._db = JournalDB(path, disk, storage=JournalStorage)
            self._journal = self._db.journal
        except BaseException:
            self._file_lock.release()
            raise
        try:
            with self._changed:
                self._index()
                self._recover()
        except BaseException:
            self._journal.abandon()
            self._file_lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the index in memory --------------------------------------------------------------------------------------

    def _index(self) -> None:
        """Build from the tables what the way of a job needs without a search."""
        rows = self._rows
        order = sorted((int(key), document) for key, document in rows.items())
        self._register = Register(order)
        self._queue = Line(seq for seq, d in order if d["state"] == JobState.QUEUED)
        self._processing = [seq for seq, d in order if d["state"] == JobState.PROCESSING]
        counters = self._journal.rows(COUNTERS).get("1", {})
        self._last_seq = max(counters.get("last_seq", 0), order[-1][0] if order else 0)
        self._rejected = self._rejected_on_disk = counters.get("rejected", 0)
        self._ended = {state: counters.get(state.value, 0) for state in JobState if state.final}
        finished = sorted((d["revision"], seq) for seq, d in order if JobState(d["state"]).final)
        self._finished = OrderedDict((seq, None) for _, seq in finished)
        self._gone = {
            int(key): Gone(int(key), document["job_id"]) for key, document in self._journal.rows(GONE).items()
        }
        self._gone_ids = {gone.job_id: seq for seq, gone in self._gone.items()}
        self._buried: list[int] = []
        mark = self._journal.mark
        self._outbox = Outbox((revision, seq) for revision, seq in self._revisions() if revision > mark)
        self._number_the_head()  # what the broker knows of their positions is not on disk

    def _revisions(self) -> Iterator[tuple[int, int]]:
        """Yield the last transaction and the number of every job."""
        return ((document["revision"], int(key)) for key, document in self._rows.items())

    @property
    def _rows(self) -> Mapping[str, Mapping[str, Any]]:
        return self._journal.rows(TABLE)

    def _recover(self) -> None:
        """Count a crash against each job that was in `processing`, and let it wait for its turn again or end."""
        for seq in tuple(self._processing):
            crashes = self._rows[str(seq)].get("crashes", 0) + 1
            if crashes < self._max_attempts:
                self._move(seq, JobState.QUEUED, {"crashes": crashes}, ("started_at",))
                logger.warning("Job %s was in work at the last crash: queued again", self._rows[str(seq)]["job_id"])
            else:
                self._fail(
                    seq,
                    ErrorCode.CRASHED,
                    f"The process died {crashes} times while working on this job. Check the audio, then retry.",
                    {"crashes": crashes},
                )

    # -- one funnel for every change ------------------------------------------------------------------------------

    def _commit(self, changes: list[Change], touched: Sequence[int]) -> None:
        """Write the changes with the outbox's watermark, then note that the broker has to be told of `touched`."""
        if self._closed:
            raise LedgerError(f"The ledger {self.path} is closed.")
        if self._rejected != self._rejected_on_disk:
            changes.append(Change(COUNTERS, 1, {"rejected": self._rejected}))
        if self._buried:
            changes.extend(Change(GONE, seq, None) for seq in self._buried)
        transaction = self._journal.transaction
        revision = self._db.commit(changes, mark=self._outbox.watermark(transaction))
        self._rejected_on_disk = self._rejected
        self._buried.clear()
        for seq in touched:
            self._outbox.owe(seq, revision)

    def _move(self, seq: int, state: JobState, fields: Mapping[str, Any], dropped: tuple[str, ...] = ()) -> Job:
        """Take one job from its state to `state`, durably, and return it as it is then."""
        row = self._rows.get(str(seq))
        if row is None:
            raise IllegalTransitionError(f"There is no job number {seq} to become {state}.")
        before = JobState(row["state"])
        if state not in TRANSITIONS[before]:
            raise IllegalTransitionError(f"Job number {seq} cannot go from {before} to {state}.")
        document = {
            "state": state.value,
            "revision": self._journal.transaction + 1,
            "updated_at": self._clock(),
            **fields,
        }
        changes = [Change(TABLE, seq, document, dropped)]
        if state.final:
            changes.append(self._counters({state: self._ended[state] + 1}))
        self._commit(changes, (seq,))
        self._note(seq, before, state)
        job = self._job(seq)
        self._outbox.passed(job)
        self._notify()
        return job

    def _note(self, seq: int, before: JobState, after: JobState) -> None:
        """Bring the index up to date with a change that is on disk."""
        if after.final:
            self._ended[after] += 1
            self._finished[seq] = None
        if before is JobState.PROCESSING:
            self._processing.remove(seq)
        if before is JobState.QUEUED:
            self._queue.remove(seq)
        if after is JobState.PROCESSING:
            self._processing.append(seq)
        if after is JobState.QUEUED:
            self._queue.put_back(seq)
        if JobState.QUEUED in (before, after):
            self._number_the_head()

    def _number_the_head(self) -> None:
        """Give the first jobs their new positions, and let the broker be told of those that changed."""
        for seq in self._queue.number_head(self._clock()):
            self._outbox.tell(seq, self._journal.transaction)

    def _counters(self, changed: Mapping[JobState, int]) -> Change:
        return Change(COUNTERS, 1, {state.value: total for state, total in changed.items()})

    # -- accepting ------------------------------------------------------------------------------------------------

    def append(self, requests: Sequence[NewJob]) -> list[tuple[Verdict, Job | None]]:
        """Accept what can be accepted, all in one transaction with one fsync.

        Returns:
            For each request, in order, the verdict and the job that now bears its id (None for `full`).

        Raises:
            LedgerError: the disk refused; nothing of all this has happened.
        """
        with self._changed:
            verdicts, new = self._register.judge(requests, room=self._max_queued - len(self._queue))
            made = self._insert(new) if new else {}
            known: list[tuple[Verdict, Job | None]] = []
            for verdict, job_id in verdicts:
                seq = self._register.seq(job_id)
                if verdict is Verdict.SAME and seq is not None:
                    self._outbox.tell(seq, self._journal.transaction)
                known.append((verdict, None if seq is None else made.get(job_id) or self._job(seq)))
            if verdicts:
                self._notify()
            return known

    def _insert(self, new: Mapping[str, NewJob]) -> dict[str, Job]:
        now, revision = self._clock(), self._journal.transaction + 1
        changes = []
        failed = 0
        for seq, request in enumerate(new.values(), start=self._last_seq + 1):
            changes.append(Change(TABLE, seq, document_of(request, now, revision)))
            failed += request.failure is not None
        if failed:
            changes.append(self._counters({JobState.ERROR: self._ended[JobState.ERROR] + failed}))
        revived = [self._gone_ids[job_id] for job_id in new if job_id in self._gone_ids]
        changes.extend(Change(GONE, seq, None) for seq in revived)
        first = self._last_seq + 1
        self._commit(changes, range(first, first + len(new)))
        for seq in revived:  # the new job's status takes the place of the old one's at the broker
            del self._gone_ids[self._gone.pop(seq).job_id]
        self._last_seq += len(new)
        self._ended[JobState.ERROR] += failed
        for seq, request in enumerate(new.values(), start=first):
            self._register.add(seq, request)
            if request.failure is None:
                self._queue.add(seq)
            else:
                self._finished[seq] = None
        made = {job_id: self._job(seq) for seq, job_id in enumerate(new, start=first)}
        for job in made.values():
            self._outbox.passed(job)
        return made

    def forget_deliveries(self) -> None:
        """Take no further message for a redelivery of one that is known, for the broker has begun a new session.

        Packet ids belong to a session; in a new one they are given out again, to other messages.
        """
        with self._changed:
            self._register.forget_packet_ids()

    # -- working --------------------------------------------------------------------------------------------------

    def claim(self) -> Job | None:
        """Take the oldest job that is ready into `processing`, with its attempt counted; None when none is.

        Raises:
            LedgerError: the disk refused; the job still waits.
        """
        with self._changed:
            seq = self._queue.ready(self._monotonic())
            if seq is None:
                return None
            attempt = self._rows[str(seq)].get("attempt", 0) + 1
            return self._move(seq, JobState.PROCESSING, {"attempt": attempt, "started_at": self._clock()})

    def complete(self, seq: int, result: Result) -> None:
        """Record the transcript of a job in `processing`. Raises LedgerError, IllegalTransitionError."""
        with self._changed:
            self._move(seq, JobState.COMPLETED, result_of(result, self._clock()))

    def fail(self, seq: int, code: ErrorCode, message: str) -> None:
        """Record that a job in `processing` ended without a transcript. Raises as `complete`."""
        with self._changed:
            self._fail(seq, code, message, {})

    def _fail(self, seq: int, code: ErrorCode, message: str, fields: Mapping[str, Any]) -> None:
        failure = {"completed_at": self._clock(), "error_code": code.value, "error_message": message}
        self._move(seq, JobState.ERROR, {**failure, **fields})

    def requeue(self, seq: int) -> None:
        """Put a job in `processing` back to the front of the queue, as a forced stop does. Raises as `complete`."""
        with self._changed:
            self._put_back(seq, {})

    def _put_back(self, seq: int, fields: Mapping[str, Any]) -> None:
        if seq not in self._processing:  # an error may become queued, too, but that is a retry
            raise IllegalTransitionError(f"Job number {seq} is not in work, so it cannot be put back.")
        self._move(seq, JobState.QUEUED, fields, ("started_at",))

    def defer(self, seq: int, delay_s: float) -> None:
        """Put a job in `processing` back, not to be claimed for `delay_s`; those behind it go first.

        The delay is by the monotonic clock and not on disk: after a restart the job is ready at once. Raises as
        `complete`.
        """
        with self._changed:
            retries = self._rows.get(str(seq), {}).get("retries", 0) + 1
            self._put_back(seq, {"retries": retries})
            self._queue.delay(seq, self._monotonic() + delay_s)

    def wait_for_work(self, stopped: Callable[[], bool]) -> bool:
        """Sleep until a job is ready (True) or `stopped` is true (False); `wake` makes it look again."""
        with self._changed:
            while not stopped() and self._queue.ready(self._monotonic()) is None:
                self._changed.wait(self._queue.next_ready_in(self._monotonic()))
            return not stopped()

    def wake(self) -> None:
        """Let everybody who waits here look again at what it waits for."""
        with self._changed:
            self._changed.notify_all()

    # -- looking --------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        """Return the job as it is now, or None."""
        with self._changed:
            seq = self._register.seq(job_id)
            return None if seq is None else self._job(seq)

    def totals(self) -> Totals:
        """Return the counts for the consumer's own topics; costs the same however many jobs there are."""
        with self._changed:
            oldest = next(iter(self._queue), None)
            working = self._processing[0] if self._processing else None
            return Totals(
                queued=len(self._queue),
                completed_total=self._ended[JobState.COMPLETED],
                error_total=self._ended[JobState.ERROR],
                cancelled_total=self._ended[JobState.CANCELLED],
                rejected_total=self._rejected,
                oldest_queued_at=None if oldest is None else self._rows[str(oldest)]["created_at"],
                processing=None if working is None else self._rows[str(working)]["job_id"],
            )

    def last_finished(self) -> Job | None:
        """Return the job that ended last, or None."""
        with self._changed:
            newest = next(reversed(self._finished), None)
            return None if newest is None else self._job(newest)

    def spooled(self) -> set[str]:
        """Return the names in the spool folder that jobs still need, or may need for a retry."""
        with self._changed:
            return {
                d["audio"][1]
                for d in self._rows.values()
                if "audio" in d and d["audio"][0] == "spool" and needs_audio(d)
            }

    def _job(self, seq: int) -> Job:
        document = self._rows[str(seq)]
        rank, since = self._queue.place(seq)
        return job_of(seq, document, rank, since)

    # -- the outbox -----------------------------------------------------------------------------------------------

    def unpublished(self, limit: int, *, but: Collection[int] = ()) -> list[tuple[int, Job]]:
        """Take what the broker is to be told next, oldest change first.

        Each change of state is handed out once, in order, so that a reader sees every state of a job. What was
        handed out and not marked as published is handed out again, then only as the newest state.

        Args:
            limit: how many at most.
            but: sequence numbers of what is on its way, not to be handed out again (newer changes are).

        Returns:
            The number to hand to `mark_published`, and the job as it was at that change.
        """
        with self._changed:
            return self._outbox.take(limit, but, self._job)

    def gone(self, limit: int, *, but: Collection[int] = ()) -> list[Gone]:
        """Return deleted jobs whose status the broker may still retain, until `mark_cleared`."""
        with self._changed:
            return list(islice((gone for seq, gone in self._gone.items() if seq not in but), limit))

    @property
    def has_unpublished(self) -> bool:
        """Whether there is a status that the broker has not acknowledged, or has not yet been told to forget."""
        with self._changed:
            return bool(self._outbox) or bool(self._gone)

    def coalesce(self) -> None:
        """Forget the states that jobs passed through: whoever was offline is told the newest only."""
        with self._changed:
            self._outbox.coalesce()

    def mark_published(self, acknowledged: Iterable[tuple[int, int]]) -> None:
        """Note that the broker acknowledged statuses; reaches the disk with the next transaction.

        A crash before that publishes them once more, which changes nothing for a reader of retained messages.

        Args:
            acknowledged: the sequence number of each job, and the number that `unpublished` gave with it.
        """
        with self._changed:
            for seq, number in acknowledged:
                self._outbox.acknowledge(seq, number)

    def mark_cleared(self, seq: int) -> None:
        """Note that the broker has forgotten the status of a deleted job; on disk with the next transaction."""
        with self._changed:
            gone = self._gone.pop(seq, None)
            if gone is not None:
                del self._gone_ids[gone.job_id]
                self._buried.append(seq)
                self._notify()

    def publish_again(self) -> None:
        """Let every status be published again: the broker has lost what it retained.

        After a crash in the middle of that the rest is still published: the watermark goes back, on disk. When the disk
        refuses just now, it goes with the next transaction.
        """
        with self._changed:
            self._outbox.owe_all(self._revisions(), self._journal.transaction)
            with contextlib.suppress(LedgerError):
                self._commit([], ())
            self._notify()

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` after every change, under the ledger's lock: it must only set a flag."""
        self._observers.append(observer)

    def count_rejected(self) -> None:
        """Count a refused message; reaches the disk with the next transaction."""
        with self._changed:
            self._rejected += 1
            self._notify()

    def processing(self) -> tuple[int, ...]:
        """Return the sequence numbers of the jobs in `processing`: one at most, or none."""
        with self._changed:
            return tuple(self._processing)

    def _notify(self) -> None:
        self._changed.notify_all()
        for observer in self._observers:
            observer()

    # -- upkeep ---------------------------------------------------------------------------------------------------

    def retire(self, *, before: float, keep: int, limit: int = 200) -> tuple[int, list[str]]:
        """Delete finished jobs that ended before `before` (seconds since the epoch) or are beyond the newest `keep`.

        Oldest first, at most `limit` in one transaction, so that others do not wait long. The broker is then told to
        forget their statuses.

        Returns:
            How many were deleted, and the names in the spool folder that they leave behind.

        Raises:
            LedgerError: the disk refused; nothing was deleted.
        """
        with self._changed:
            beyond = max(0, len(self._finished) - keep)
            oldest = enumerate(islice(self._finished, limit))
            retired = [seq for n, seq in oldest if n < beyond or self._rows[str(seq)]["completed_at"] < before]
            if not retired:
                return 0, []
            rows = [(seq, self._rows[str(seq)]) for seq in retired]
            changes = [Change(TABLE, seq, None) for seq in retired]
            changes += [Change(GONE, seq, {"job_id": row["job_id"]}) for seq, row in rows]
            changes.append(Change(COUNTERS, 1, {"last_seq": self._last_seq}))  # numbers are never used again
            self._commit(changes, ())
            for seq, row in rows:
                self._forget(seq, row)
            self._notify()
            return len(rows), [row["audio"][1] for _, row in rows if row.get("audio", ("", ""))[0] == "spool"]

    def _forget(self, seq: int, row: Mapping[str, Any]) -> None:
        self._gone[seq] = Gone(seq, row["job_id"])
        self._gone_ids[row["job_id"]] = seq
        self._outbox.forget(seq)
        del self._finished[seq]
        self._register.remove(seq, row)

    def maintain(self) -> None:
        """Write a checkpoint when the journal has outgrown it; others go on working meanwhile.

        The journal may grow as large as the checkpoint, so that the cost per transaction does not depend on
        the number of jobs. One caller at a time.

        Raises:
            LedgerError: the disk refused; the old files still hold everything.
        """
        journal = self._journal
        if journal.journal_bytes < max(_CHECKPOINT_BYTES, journal.checkpoint_bytes):
            return
        try:
            with journal.checkpointing:
                with self._changed:
                    if self._closed:  # the lock is given back: the files may be another process's by now
                        return
                    snapshot = journal.snapshot()
                journal.write_checkpoint(snapshot)
                with self._changed:
                    journal.cut_journal(snapshot)
        except OSError as exc:
            raise LedgerError(f"No checkpoint of {self.path} could be written: {exc.strerror}.") from exc

    def close(self) -> None:
        """Write a checkpoint, so that `ledger.json` alone is complete, and release the lock; can be called twice.

        Raises:
            LedgerError: the disk refused; the journal still holds everything.
        """
        with self._journal.checkpointing, self._changed:
            if self._closed:
                return
            try:
                if self._rejected != self._rejected_on_disk or self._buried:
                    self._commit([], ())
                self._journal.mark = self._outbox.watermark(self._journal.transaction)
                self._db.close()
            finally:
                self._closed = True
                self._changed.notify_all()
                self._journal.abandon()
                self._file_lock.release()
