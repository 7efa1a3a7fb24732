"""The books of the ledger: its files, its index and its outbox, under one lock, and the one way to change them.

Every method may be called from any thread, unless it says that the caller holds the lock.
"""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from cesar_mqtt.errors import LedgerError, LedgerInUseError
from cesar_mqtt.jobs import STATES, TRANSITIONS, IllegalTransitionError, Job, JobState
from cesar_mqtt.ledger.documents import job_of
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.ledger.index import Index
from cesar_mqtt.ledger.outbox import Outbox
from cesar_mqtt.ledger.storage import Change, JournalStorage
from cesar_mqtt.ledger.tables import JournalDB

JOBS = "jobs"
WINDOWS = "windows"
"""Finished parts of recordings; documents of their own, so that a job's document stays small."""
COUNTERS = "counters"
GONE = "gone"
"""Deleted jobs of which the broker may still retain something."""

_CHECKPOINT_BYTES = 8 << 20
_MANY = 10_000


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


class Books:
    """What the ledger is kept in. A change is on disk before the index and the outbox know of it.

    Attributes:
        path: `ledger.json`; the journal and the lock stand beside it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, disk: Disk | None = None) -> None:
        """Open or create the ledger at `path`, whose folder must exist; for `clock` and `disk` see `Ledger`."""
        self.path = path
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._observers: list[Callable[[], None]] = []
        self._waiting = 0
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
                self._look_through()
        except BaseException:
            self._give_up()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_through(self) -> None:
        """Build what is in memory from what is on disk."""
        counters = self._journal.rows(COUNTERS).get("1", {})
        self._index = Index(
            self._rows, gone=self._journal.rows(GONE), windows=self._journal.rows(WINDOWS), counters=counters
        )
        self._rejected = self._rejected_on_disk = counters.get("rejected", 0)
        self._settled_on_disk: int = counters.get("settled", 0)
        self._paused = bool(counters.get("paused", False))
        self._tidied: list[Change] = []
        mark = self._journal.mark
        self._told: int = counters.get("told", 0)
        revisions = ((revision, seq) for revision, seq in self._revisions() if revision > mark)
        self._outbox = Outbox(revisions, told=self._told)
        self._number_the_head()  # what the broker knows of their positions is not on disk
        if len(self._rows) > _MANY:
            # The garbage collector would look through all of it again and again, and everybody would wait: a tenth of
            # a second for 100,000 jobs. Documents hold no circles, so it need not.
            gc.collect()
            gc.freeze()

    def _revisions(self) -> Iterator[tuple[int, int]]:
        """Yield the last transaction and the number of every job."""
        return ((document["revision"], int(key)) for key, document in self._rows.items())

    @property
    def _rows(self) -> Mapping[str, Mapping[str, Any]]:
        return self._journal.rows(JOBS)

    # -- one funnel for every change; the caller holds the lock ------------------------------------------------------

    def _commit(self, changes: list[Change]) -> None:
        """Write the changes, with the outbox's watermark."""
        if self._closed:
            raise LedgerError(f"The ledger {self.path} is closed.")
        if self._rejected != self._rejected_on_disk:
            changes.append(Change(COUNTERS, 1, {"rejected": self._rejected}))
        settled = self._index.register.settled
        if settled != self._settled_on_disk:
            changes.append(Change(COUNTERS, 1, {"settled": settled}))
        if self._tidied:
            changes[:0] = self._tidied
        journal = self._journal
        journal.commit(changes, mark=self._outbox.watermark(journal.transaction))
        self._rejected_on_disk, self._settled_on_disk = self._rejected, settled
        self._tidied.clear()

    def _move(
        self,
        seq: int,
        state: JobState,
        fields: Mapping[str, Any],
        *,
        dropped: tuple[str, ...] = (),
        also: Iterable[Change] = (),
    ) -> None:
        """Take one job from its state to `state`, durably, with other changes in the same transaction."""
        rows, key = self._rows, str(seq)
        row = rows.get(key)
        if row is None:
            raise IllegalTransitionError(f"There is no job number {seq} to become {state}.")
        before = STATES[row["state"]]
        if state not in TRANSITIONS[before]:
            raise IllegalTransitionError(f"Job {row['job_id']} is {before} and cannot become {state}.")
        document = {
            "state": state.value,
            "revision": self._journal.transaction + 1,
            "updated_at": self._clock(),
            **fields,
        }
        changes = [Change(JOBS, seq, document, dropped), *also]
        if state.final:
            changes.append(Change(COUNTERS, 1, {state.value: self._index.ended[state] + 1}))
        self._commit(changes)
        self._index.move(seq, before, state, document)
        if before is JobState.QUEUED or state is JobState.QUEUED:
            self._number_the_head()
        self._pass(seq, rows[key])
        self._notify()

    def _pass(self, seq: int, document: Mapping[str, Any]) -> None:
        """Let the broker be told of the state that a job has now."""
        self._outbox.owe(seq, document["revision"], (seq, document, *self._index.queue.place(seq)))

    def _number_the_head(self) -> None:
        """Give the first jobs their new positions, and let the broker be told of those that changed."""
        for seq in self._index.queue.number_head(self._clock()):
            self._outbox.tell(seq)

    def _job(self, seq: int) -> Job:
        return job_of(seq, self._rows[str(seq)], *self._index.queue.place(seq))

    def _notify(self) -> None:
        if self._waiting:
            self._changed.notify_all()
        for observer in self._observers:
            observer()

    # -- who waits for changes ---------------------------------------------------------------------------------------

    def observe(self, observer: Callable[[], None]) -> None:
        """Call `observer` after every change, under the ledger's lock: it must only set a flag."""
        self._observers.append(observer)

    def wake(self) -> None:
        """Let everybody who waits here look again at what it waits for."""
        with self._changed:
            self._changed.notify_all()

    # -- the outbox --------------------------------------------------------------------------------------------------

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

    @property
    def has_unpublished(self) -> bool:
        """Whether there is a status that the broker has not acknowledged, or has not yet been told to forget."""
        with self._changed:
            return bool(self._outbox) or bool(self._index.deleted.pending)

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

    def publish_again(self, *, went_back: bool = False) -> None:
        """Let every status be published again: the broker has lost what it retained.

        If it went back to what it retained earlier, it is also told again to forget the newest jobs that were deleted.
        After a crash in the middle of that the rest is still published: the watermark goes back, on disk, with a note
        of where it was, for up to there nothing is news. When the disk refuses just now, it goes with the next
        transaction.
        """
        with self._changed:
            self._told = max(self._told, self._outbox.watermark(self._journal.transaction))
            self._tidied.append(Change(COUNTERS, 1, {"told": self._told}))
            self._outbox.owe_all(self._revisions())
            if went_back:
                self._tidied += [Change(GONE, seq, {"cleared": False}) for seq in self._index.deleted.clear_again()]
            with contextlib.suppress(LedgerError):
                self._commit([])
            self._notify()

    def count_rejected(self) -> None:
        """Count a refused message; reaches the disk with the next transaction."""
        with self._changed:
            self._rejected += 1
            self._notify()

    # -- files -------------------------------------------------------------------------------------------------------

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
                settled = self._index.register.settled
                if self._rejected != self._rejected_on_disk or settled != self._settled_on_disk or self._tidied:
                    self._commit([])
                self._journal.mark = self._outbox.watermark(self._journal.transaction)
                self._db.close()
            finally:
                self._closed = True
                self._changed.notify_all()
                self._give_up()

    def _give_up(self) -> None:
        """Leave the files as they are to whoever comes next."""
        self._journal.abandon()
        self._file_lock.release()
