"""The in-memory index: everything that the life of a job needs without a search; the ledger serialises every call."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from cesar_mqtt.jobs import DeletedJob, JobState, NewJob
from cesar_mqtt.ledger.deduplication import DeduplicationIndex
from cesar_mqtt.ledger.documents import is_rejection, retry_rejection
from cesar_mqtt.ledger.expiry_heap import ExpiryHeap
from cesar_mqtt.ledger.queue import JobQueue, level_of
from cesar_mqtt.ledger.tombstones import Tombstones

Rows = Mapping[str, Mapping[str, Any]]

WINDOWS_PER_JOB = 100_000
"""The document id of a window is its job's sequence number times this, plus its own number. That is enough for a
recording of 34 days in windows of 30 s."""


def window_id(seq: int, number: int) -> int:
    """Return the document id of a job's window. Raises ValueError for more windows than a job can have."""
    if number >= WINDOWS_PER_JOB:
        raise ValueError(f"A job can have at most {WINDOWS_PER_JOB} windows.")
    return seq * WINDOWS_PER_JOB + number


class Index:
    """Which jobs there are, their order, and what the broker still has to clear."""

    def __init__(self, jobs: Rows, *, gone: Rows, windows: Rows, counters: Mapping[str, Any]) -> None:
        """Build it from the tables of a ledger that was just opened."""
        tombstones = sorted((int(key), document) for key, document in gone.items())
        ordered = sorted((int(key), document) for key, document in jobs.items())
        self.tombstones = Tombstones(tombstones)
        self.deleted_total: int = counters.get("deleted", 0)
        self.deduplication = DeduplicationIndex(
            ordered, newest_deleted_id=self.tombstones.newest_id, released_until=counters.get("settled", 0)
        )
        self.queue = JobQueue(
            (seq, _level_of(document)) for seq, document in ordered if document["state"] == JobState.QUEUED
        )
        self.processing = [seq for seq, document in ordered if document["state"] == JobState.PROCESSING]
        """At most one job, unless a test claims more."""
        for seq, document in ordered:
            if "expires_at" in document and not JobState(document["state"]).final:
                self.queue.set_expiry(seq, document["expires_at"])
        ended = sorted((document["revision"], seq) for seq, document in ordered if JobState(document["state"]).final)
        ends = [(seq, _end_of(jobs[str(seq)]), is_rejection(jobs[str(seq)])) for _, seq in ended]
        self.finished = ExpiryHeap((seq, at) for seq, at, rejected in ends if not rejected)
        """When each job ended, in the order of those transactions: a clock that was wrong does not change the order."""
        self.rejected = ExpiryHeap((seq, at) for seq, at, rejected in ends if rejected)
        """The same for rejected requests that are recorded as jobs: they have a quota of their own."""
        self.retryable = {seq: None for _, seq in ended if retry_rejection(jobs[str(seq)]) is None}
        """The finished jobs that can be retried, in the order in which they ended."""
        self.ended_total = {state: counters.get(state.value, 0) for state in JobState if state.final}
        """How many jobs have entered each final state since the ledger was created."""
        self.windows: dict[int, int] = {}
        """How many windows are stored of each job that has any."""
        self.orphaned_windows: list[int] = []
        """Ids of window documents that no job can use, since the job or an earlier window is lost; none if undamaged.
        """
        for doc_id in sorted(map(int, windows)):
            seq, number = divmod(doc_id, WINDOWS_PER_JOB)
            if str(seq) in jobs and number == self.windows.get(seq, 0):
                self.windows[seq] = number + 1
            else:
                self.orphaned_windows.append(doc_id)
        # The counter alone would be enough, if it could not be lost with a damaged line.
        seqs = chain(
            (seq for seq, _ in ordered + tombstones), (doc_id // WINDOWS_PER_JOB for doc_id in self.orphaned_windows)
        )
        self.last_seq = max(counters.get("last_seq", 0), max(seqs, default=0))
        """The greatest sequence number that was ever given to a job."""

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, seq: int, request: NewJob, now: float) -> None:
        """Add a new job, whose number is the greatest so far; one with a `failure` has ended `now`."""
        self.last_seq = seq
        self.deduplication.add(seq, request)
        if request.failure is None:
            self.queue.add(seq, level_of(request.priority, preempted=False))
            if request.expires_at is not None:
                self.queue.set_expiry(seq, request.expires_at)
        else:
            self.rejected[seq] = now
            self.ended_total[JobState.ERROR] += 1

    def move(self, seq: int, before: JobState, after: JobState, document: Mapping[str, Any]) -> None:
        """Move a job from one state to another; `document` is the one that it has now."""
        if before is JobState.PROCESSING:
            self.processing.remove(seq)
        elif before is JobState.QUEUED:
            self.queue.remove(seq)
        else:
            del self.finished[seq]
            self.retryable.pop(seq, None)
        if after is JobState.PROCESSING:
            self.processing.append(seq)
        elif after is JobState.QUEUED:
            if "preempted" in document:
                self.queue.drop_expiry(seq)
            self.queue.add(seq, _level_of(document))
        else:
            self.ended_total[after] += 1
            self.finished[seq] = _end_of(document)
            if retry_rejection(document) is None:
                self.retryable[seq] = None
            self.queue.drop_expiry(seq)

    def delete(self, deleted: DeletedJob, document: Mapping[str, Any]) -> None:
        """Replace a job that is not processing by its tombstone."""
        self.tombstones.add(deleted)
        self.deleted_total += 1
        self.retryable.pop(deleted.seq, None)
        if deleted.seq in self.finished:
            del self.finished[deleted.seq]
        elif deleted.seq in self.rejected:
            del self.rejected[deleted.seq]
        else:
            self.queue.remove(deleted.seq)
            self.queue.drop_expiry(deleted.seq)
        self.deduplication.remove(deleted.seq, document)
        self.set_window_count(deleted.seq, 0)

    def forget(self, seq: int, document: Mapping[str, Any]) -> None:
        """Remove a job without a trace."""
        self.retryable.pop(seq, None)
        if seq in self.processing:
            self.processing.remove(seq)
        elif seq in self.finished:
            del self.finished[seq]
        elif seq in self.rejected:
            del self.rejected[seq]
        else:
            self.queue.remove(seq)
        self.queue.drop_expiry(seq)
        self.deduplication.remove(seq, document)
        self.set_window_count(seq, 0)

    def set_window_count(self, seq: int, count: int) -> None:
        """Record that the first `count` windows of a job are stored."""
        if count:
            self.windows[seq] = count
        else:
            self.windows.pop(seq, None)

    # -- queries -----------------------------------------------------------------------------------------------------

    def window_ids(self, seq: int, *, start: int = 0) -> Iterator[int]:
        """Yield the document ids of a job's windows, in order, from window `start` on."""
        return (window_id(seq, number) for number in range(start, self.windows.get(seq, 0)))

    def in_states(self, states: Collection[JobState]) -> list[int]:
        """Return all jobs in these states, ascending; with one final state also the jobs in the other final states."""
        parts: list[Iterable[int]] = [self.finished] if any(state.final for state in states) else []
        parts += [self.rejected] if JobState.ERROR in states else []
        parts += [self.queue] if JobState.QUEUED in states else []
        parts += [self.processing] if JobState.PROCESSING in states else []
        return sorted(chain.from_iterable(parts))


def _level_of(document: Mapping[str, Any]) -> int:
    return level_of(document.get("priority", 0), preempted="preempted" in document)


def _end_of(document: Mapping[str, Any]) -> float:
    """Return when a job ended; a damaged document without that time never becomes old."""
    at = document.get("completed_at")
    return at if isinstance(at, float | int) else math.inf
