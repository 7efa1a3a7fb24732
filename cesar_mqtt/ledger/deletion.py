"""Deletion: of a job that somebody names, or of those that retention does not keep; and what the broker has to forget.

Every method may be called from any thread. What a method says is done is on disk when it returns.
"""

from collections.abc import Collection, Sequence
from itertools import islice

from cesar_mqtt.jobs import DeletedJob, IllegalTransitionError, Job
from cesar_mqtt.ledger.base import COUNTERS, GONE, JOBS, WINDOWS
from cesar_mqtt.ledger.documents import gone_document, gone_with, in_spool
from cesar_mqtt.ledger.queries import Views
from cesar_mqtt.ledger.storage import Change


class Retirement(Views):
    """The books, of which jobs can be taken."""

    def delete(self, job_id: str) -> tuple[Job, list[str]] | None:
        """Delete a job that waits or has ended; the broker is then told to forget it.

        Returns:
            The job as it was, and the names in the spool folder that it leaves behind; None: there is no such job.

        Raises:
            IllegalTransitionError: it is in work.
            LedgerError: the disk refused; the job stays.
        """
        with self._changed:
            seq = self._index.register.seq(job_id)
            if seq is None:
                return None
            if seq in self._index.processing:
                raise IllegalTransitionError(f"Job {job_id} is processing: cancel it first.")
            job = self._job(seq)
            return job, self._delete([seq])

    def retire(self, *, before: float, keep: int, limit: int = 200) -> tuple[int, list[str]]:
        """Delete finished jobs that ended by `before` (seconds since the epoch) or are beyond the newest `keep`.

        Oldest first, at most `limit` in one transaction, so that others do not wait long. The broker is then told to
        forget their statuses.

        Returns:
            How many were deleted, and the names in the spool folder that they leave behind.

        Raises:
            LedgerError: the disk refused; nothing was deleted.
        """
        with self._changed:
            finished = self._index.finished
            beyond = islice(finished, min(limit, max(0, len(finished) - keep)))
            retired = list(dict.fromkeys([*beyond, *finished.until(before, limit)]))[:limit]
            return len(retired), self._delete(retired)

    def _delete(self, seqs: Sequence[int]) -> list[str]:
        if not seqs:
            return []
        rows = [self._rows[str(seq)] for seq in seqs]
        gone = [gone_with(seq, row) for seq, row in zip(seqs, rows, strict=True)]
        changes = [Change(JOBS, seq, None) for seq in seqs]
        changes += [change for seq in seqs for change in self._without_windows(seq)]
        changes += [Change(GONE, job.seq, gone_document(job)) for job in gone]
        # Numbers are never used again, so the last one must outlast its job.
        counters = {"last_seq": self._index.last_seq, "deleted": self._index.deleted_total + len(seqs)}
        changes.append(Change(COUNTERS, 1, counters))
        self._commit(changes)
        for job, row in zip(gone, rows, strict=True):
            self._index.bury(job, row)
        self._outbox.forget(seqs)
        self._number_the_head()
        self._notify()
        return [name for row in rows for name in in_spool(row)]

    def _without_windows(self, seq: int, *, start: int = 0) -> list[Change]:
        return [Change(WINDOWS, doc_id, None) for doc_id in self._index.window_ids(seq, start=start)]

    def gone(self, limit: int, *, but: Collection[int] = ()) -> list[DeletedJob]:
        """Return deleted jobs of which the broker may still retain something, until `mark_cleared`."""
        with self._changed:
            pending = self._index.deleted.pending
            return list(islice((gone for seq, gone in pending.items() if seq not in but), limit))

    def mark_cleared(self, seq: int) -> None:
        """Note that the broker has forgotten a deleted job; on disk with the next transaction."""
        with self._changed:
            pushed_out = self._index.deleted.clear(seq)
            if pushed_out is not None:
                self._tidied.append(Change(GONE, seq, {"cleared": True}))
                self._tidied += [Change(GONE, other, None) for other in pushed_out]
                self._notify()
