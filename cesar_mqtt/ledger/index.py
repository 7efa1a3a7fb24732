"""The index: what the way of a job needs to know without a search, in memory; the ledger serialises every call."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from cesar_mqtt.jobs import DeletedJob, JobState, NewJob
from cesar_mqtt.ledger.deduplication import Register
from cesar_mqtt.ledger.expiries import Times
from cesar_mqtt.ledger.queue import JobQueue
from cesar_mqtt.ledger.tombstones import Tombstones

Rows = Mapping[str, Mapping[str, Any]]

WINDOWS_PER_JOB = 100_000
"""A window's document id is its job's number times this, and its own number: more than 34 days of windows of 30 s."""


def window_id(seq: int, number: int) -> int:
    """Return the document id of a job's window. Raises ValueError for more windows than a job can have."""
    if number >= WINDOWS_PER_JOB:
        raise ValueError(f"A job can have {WINDOWS_PER_JOB} windows at most.")
    return seq * WINDOWS_PER_JOB + number


class Index:
    """Which jobs there are, in which order they wait, what has ended, and what the broker has yet to forget.

    Attributes:
        register: which requests are known.
        queue: the jobs that wait.
        processing: the job in work, if there is one.
        finished: the numbers of the jobs that have ended, in the order in which they did, and when that was: a clock
            may have been wrong, so the times need not have the same order.
        ended: how many jobs have ended in each final state since the ledger was made.
        last_seq: the greatest number that was ever given out.
        deleted: what is still known of deleted jobs.
        deleted_total: how many jobs have been deleted since the ledger was made.
        windows: how many finished windows are kept of each job that has any.
        orphans: document ids of windows that no job can use, for its row or a window before them is lost; a whole
            ledger has none.
    """

    def __init__(self, jobs: Rows, *, gone: Rows, windows: Rows, counters: Mapping[str, Any]) -> None:
        """Build it from the tables of a ledger that was just opened."""
        buried = sorted((int(key), document) for key, document in gone.items())
        order = sorted((int(key), document) for key, document in jobs.items())
        self.deleted = Tombstones(buried)
        self.deleted_total: int = counters.get("deleted", 0)
        self.register = Register(order, answered=self.deleted.answered, settled=counters.get("settled", 0))
        self.queue = JobQueue(seq for seq, document in order if document["state"] == JobState.QUEUED)
        self.processing = [seq for seq, document in order if document["state"] == JobState.PROCESSING]
        for seq, document in order:
            if "expires_at" in document and not JobState(document["state"]).final:
                self.queue.expire(seq, document["expires_at"])
        ends = sorted((document["revision"], seq) for seq, document in order if JobState(document["state"]).final)
        self.finished = Times((seq, _end_of(jobs[str(seq)])) for _, seq in ends)
        self.ended = {state: counters.get(state.value, 0) for state in JobState if state.final}
        self.windows: dict[int, int] = {}
        self.orphans: list[int] = []
        for doc_id in sorted(map(int, windows)):
            seq, number = divmod(doc_id, WINDOWS_PER_JOB)
            if str(seq) in jobs and number == self.windows.get(seq, 0):
                self.windows[seq] = number + 1
            else:
                self.orphans.append(doc_id)
        # The counter alone would do, if it could not be lost with a damaged line.
        numbers = chain((seq for seq, _ in order + buried), (doc_id // WINDOWS_PER_JOB for doc_id in self.orphans))
        self.last_seq = max(counters.get("last_seq", 0), max(numbers, default=0))

    def add(self, seq: int, request: NewJob, now: float) -> None:
        """Note a new job, whose number is greater than all others; one that cannot be done ends `now`."""
        self.last_seq = seq
        self.register.add(seq, request)
        if request.failure is None:
            self.queue.add(seq)
            if request.expires_at is not None:
                self.queue.expire(seq, request.expires_at)
        else:
            self.finished[seq] = now
            self.ended[JobState.ERROR] += 1

    def move(self, seq: int, before: JobState, after: JobState, document: Mapping[str, Any]) -> None:
        """Note that a job has gone from one state to another, and what of it is new."""
        if before is JobState.PROCESSING:
            self.processing.remove(seq)
        elif before is JobState.QUEUED:
            self.queue.remove(seq)
        else:
            del self.finished[seq]
        if after is JobState.PROCESSING:
            self.processing.append(seq)
        elif after is JobState.QUEUED:
            self.queue.put_back(seq)
        else:
            self.ended[after] += 1
            self.finished[seq] = _end_of(document)
            self.queue.end(seq)

    def bury(self, gone: DeletedJob, document: Mapping[str, Any]) -> None:
        """Note that a job, which was not in work, is deleted."""
        self.deleted.add(gone)
        self.deleted_total += 1
        if gone.seq in self.finished:
            del self.finished[gone.seq]
        else:
            self.queue.remove(gone.seq)
            self.queue.end(gone.seq)
        self.register.remove(gone.seq, document)
        self.keep_windows(gone.seq, 0)

    def window_ids(self, seq: int, *, start: int = 0) -> Iterator[int]:
        """Yield the document ids of a job's windows, in order, from window `start` on."""
        return (window_id(seq, number) for number in range(start, self.windows.get(seq, 0)))

    def keep_windows(self, seq: int, count: int) -> None:
        """Note that of a job the first so many windows are kept."""
        if count:
            self.windows[seq] = count
        else:
            self.windows.pop(seq, None)

    def numbers(self, states: Collection[JobState]) -> list[int]:
        """Return the numbers of all jobs in these states, ascending, perhaps with others that have ended."""
        parts: list[Iterable[int]] = [self.finished] if any(state.final for state in states) else []
        parts += [self.queue] if JobState.QUEUED in states else []
        parts += [self.processing] if JobState.PROCESSING in states else []
        return sorted(chain.from_iterable(parts))


def _end_of(document: Mapping[str, Any]) -> float:
    """Return when a job has ended; one of which that is not known never becomes old."""
    at = document.get("completed_at")
    return at if isinstance(at, _NUMBER) else math.inf


_NUMBER = (float, int)
