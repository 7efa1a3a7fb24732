"""The outbox: which states of jobs the broker has not acknowledged; in memory. The ledger serialises every call."""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count, islice
from typing import Any

from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.documents import job_from

HISTORY_LIMIT = 1000
"""The most superseded states that are kept to be published one by one; beyond, only the newest state of a job is."""

PendingStatus = tuple[int, Job]
"""The number to hand to `acknowledge`, and the job to publish.

The number is the job's revision when that state is published for the first time, and negative for a republication.
"""

Snapshot = tuple[int, Mapping[str, Any], int | None, float | None]
"""A job at one moment: sequence number, document (never changed afterwards), queue position and since when."""


class Outbox:
    """Jobs whose newest state the broker has not acknowledged, oldest change first.

    A change of state, once it is on disk, is enqueued with `enqueue`: until it is acknowledged the watermark stays
    below it, so that a restart publishes it. `republish` is for a job without a change of state, such as one with a new
    queue position: it is in memory only.
    """

    def __init__(self, revisions: Iterable[tuple[int, int]], *, announced_revision: int = 0) -> None:
        """Start with the pending changes on disk.

        Args:
            revisions: revision and sequence number of every change above the watermark.
            announced_revision: changes up to this one were acknowledged before: they are republished only.
        """
        self._pending = OrderedDict((seq, revision) for revision, seq in sorted(revisions))
        """The number of the newest state to publish, by job, in the order of publication."""
        self._unacknowledged = self._pending.copy()
        """The newest revision by job, ascending: the watermark lies below the first one."""
        self._not_taken = {seq for seq, revision in self._pending.items() if revision > announced_revision}
        """Jobs whose newest change is in `_pending` and not in the history, and was not taken yet: a republication must
        not replace its number, or the change would never be published as new."""
        self._acknowledged_before = self._pending.keys() - self._not_taken
        """Jobs whose newest change was acknowledged, while a republication of it is pending."""
        self._republication = count(-1, -1)
        self._history: deque[tuple[int, Snapshot]] = deque(maxlen=HISTORY_LIMIT)
        """Every change that was not taken yet, in order."""
        self.dropped = 0
        """How many changes were never taken, or taken and lost with the connection, before the job changed again."""
        for seq in sorted(self._acknowledged_before, key=self._pending.__getitem__):
            self.republish(seq)

    def __bool__(self) -> bool:
        return bool(self._pending)

    def has_pending(self, exclude: Collection[int] = ()) -> bool:
        """Whether anything is to be published of a job that is not in `exclude`."""
        return any(seq not in exclude for seq in self._pending)

    def is_pending(self, seq: int) -> bool:
        """Whether anything is to be published of a job."""
        return seq in self._pending

    # -- enqueue -----------------------------------------------------------------------------------------------------

    def enqueue(self, seq: int, revision: int, state: Snapshot) -> None:
        """Enqueue the state that transaction `revision` gave to a job; every such state is taken once, in order."""
        self._pending[seq] = self._unacknowledged[seq] = revision
        self._pending.move_to_end(seq)
        self._unacknowledged.move_to_end(seq)
        self._not_taken.discard(seq)
        self._acknowledged_before.discard(seq)
        if len(self._history) == HISTORY_LIMIT:
            self._before_eviction(*self._history[0])
        self._history.append((revision, state))

    def _before_eviction(self, revision: int, state: Snapshot) -> None:
        """Keep a job's newest change in `_pending`, since the history has no room for it."""
        seq, *_ = state
        if self._unacknowledged.get(seq) == revision:
            self._pending[seq] = revision
            self._not_taken.add(seq)
        else:
            self.dropped += 1

    def republish(self, seq: int) -> None:
        """Enqueue a job's current state once more; a change that was not taken yet stays new."""
        if seq not in self._not_taken:
            self._pending[seq] = next(self._republication)
            self._pending.move_to_end(seq)

    def enqueue_all(self, revisions: Iterable[tuple[int, int]]) -> None:
        """Enqueue the state of every job: the broker has lost its retained messages.

        Args:
            revisions: revision and sequence number of every job.
        """
        not_announced = self._unacknowledged.keys() - self._acknowledged_before
        self._unacknowledged = OrderedDict((seq, revision) for revision, seq in sorted(revisions))
        self._acknowledged_before = self._unacknowledged.keys() - not_announced
        for seq in sorted(self._unacknowledged):
            self.republish(seq)

    def coalesce(self, lost: Iterable[tuple[int, int]] = ()) -> None:
        """Drop superseded states and everything in flight; the newest state of each job is published (again).

        Args:
            lost: sequence number and number of each change that was taken, and lost with the connection.
        """
        untaken = ((seq, revision) for revision, (seq, *_) in self._history)
        self.dropped += sum(number > 0 and self._unacknowledged.get(seq) != number for seq, number in (*untaken, *lost))
        for seq in self._unacknowledged.keys() - self._acknowledged_before:
            self._pending[seq] = self._unacknowledged[seq]
            self._not_taken.add(seq)
        self._history.clear()

    def drop(self, seqs: Collection[int]) -> None:
        """Drop everything about these jobs."""
        untaken = {seq for _, (seq, *_) in self._history}
        self.dropped += sum(seq in self._not_taken and seq not in untaken for seq in seqs)
        for seq in seqs:
            self._pending.pop(seq, None)
            self._unacknowledged.pop(seq, None)
            self._not_taken.discard(seq)
            self._acknowledged_before.discard(seq)
        dropped = frozenset(seqs)
        kept = [item for item in self._history if item[1][0] not in dropped]
        self.dropped += len(self._history) - len(kept)
        self._history = deque(kept, maxlen=HISTORY_LIMIT)

    # -- publish -----------------------------------------------------------------------------------------------------

    def take(self, limit: int, exclude: Collection[int], job_of: Callable[[int], Job]) -> list[PendingStatus]:
        """Return at most `limit` states to publish.

        A newest state is returned again until it is acknowledged, unless its job is in `exclude`.
        """
        superseded = [self._history.popleft() for _ in range(min(limit, len(self._history)))]
        taken = [(revision, job_from(*state)) for revision, state in superseded]
        if len(taken) < limit:
            in_flight = {seq for _, (seq, *_) in superseded}.union(exclude)
            waiting = (item for item in self._pending.items() if item[0] not in in_flight)
            newest = list(islice(waiting, limit - len(taken)))
            taken += [(number, job_of(seq)) for seq, number in newest]
            self._not_taken.difference_update(seq for seq, _ in newest)
        return taken

    def acknowledge(self, seq: int, number: int) -> None:
        """Record a PUBACK; nothing of the job is pending any more if it is for the newest state."""
        if self._unacknowledged.get(seq) == number:
            self._acknowledged_before.add(seq)
        if self._pending.get(seq) == number:
            del self._pending[seq]
            self._unacknowledged.pop(seq, None)
            self._acknowledged_before.discard(seq)

    def watermark(self, transaction: int) -> int:
        """Return the transaction up to which the broker has acknowledged everything; `transaction` is the newest."""
        oldest = next(iter(self._unacknowledged.values()), None)
        return transaction if oldest is None else oldest - 1
