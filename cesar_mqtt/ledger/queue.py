"""The queue: the order of waiting jobs, their positions, delays and expiries; the ledger serialises every call."""

import math
from collections.abc import Iterable, Iterator
from itertools import count, islice

from sortedcontainers import SortedList

from cesar_mqtt.ledger.expiry_heap import ExpiryHeap

POSITIONS_TRACKED = 10
"""So many of the first jobs have their status published when their position changes: more would flood the broker."""

_NO_POSITION = (None, None)
_LEVEL = 1 << 52
"""The distance between two levels in `JobQueue._order`: more than there will ever be jobs."""


def level_of(priority: int, *, preempted: bool) -> int:
    """Return the level of a job in the queue: jobs of a higher level go first, equal ones by their numbers."""
    return 2 * priority + preempted


class JobQueue:
    """Sequence numbers of queued jobs: by priority, then the one that was preempted, then first in, first out.

    A preempted job was the first of its priority when it was started, so a second one has a greater number.
    No call takes longer than the logarithm of the number of jobs, except for the jobs that it returns or skips.
    Delays are on the monotonic clock (`now`), expiries on the wall clock (`time`); both in seconds.
    """

    def __init__(self, levels: Iterable[tuple[int, int]] = ()) -> None:
        """Start with the jobs that were queued on disk: the number and the level of each."""
        level_by_seq = dict(levels)
        self._keys = {seq: seq - level * _LEVEL for seq, level in level_by_seq.items()}
        self._order = SortedList(self._keys.values())
        """One integer for each job: as keys of a sorted list they take a third of the memory of tuples."""
        self.preempted = {seq for seq, level in level_by_seq.items() if level % 2}
        """The preempted jobs among them."""
        self._not_before: dict[int, float] = {}
        self._expires_at: dict[int, float] = {}
        """Of all jobs that have not ended, queued or not."""
        self._expiries = ExpiryHeap()
        """Of queued jobs only."""
        self._first: list[int] = []
        """The first `POSITIONS_TRACKED` jobs, as they were before the first change that `_moved` stands for."""
        self._moved = bool(self._keys)
        """Whether positions may have changed since their last update, other than by jobs added at the end."""
        self._unplaced: dict[int, None] = {}
        """Jobs that were added since the last update of positions, in that order."""
        self._positions: dict[int, tuple[int, float | None]] = {
            seq: (position, None)
            for position, seq in enumerate(islice(self, POSITIONS_TRACKED, None), start=POSITIONS_TRACKED + 1)
        }
        """The position that was last given to each queued job, and since when, if later than its last change of state.
        Jobs that never were among the first ten keep the one that they had when they were queued."""

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return (key % _LEVEL for key in self._order)

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, seq: int, level: int = 0) -> None:
        """Insert a job at the place that its level and its number give it; `update_positions` gives it a position."""
        key = self._keys[seq] = seq - level * _LEVEL
        order = self._order
        order.add(key)
        self._unplaced[seq] = None
        length = len(order)
        if self._moved or (length > 1 and key != order[-1]):
            self._moved = True
        else:
            self._positions[seq] = (length, None)
            if length <= POSITIONS_TRACKED:
                self._first.append(seq)
        if level % 2:
            self.preempted.add(seq)
        if seq in self._expires_at:
            self._expiries[seq] = self._expires_at[seq]

    def remove(self, seq: int) -> None:
        """Remove a job that is started, cancelled or deleted."""
        self._order.remove(self._keys.pop(seq))
        if not self._order:
            self._first.clear()
            self._moved = False
        elif seq in self._first:
            self._moved = True
        self.preempted.discard(seq)
        self._unplaced.pop(seq, None)
        self._positions.pop(seq, None)
        self._not_before.pop(seq, None)
        self._expiries.pop(seq, None)

    def delay(self, seq: int, until: float) -> None:
        """Keep a job from being started before `until`; the jobs behind it go first."""
        self._not_before[seq] = until

    def set_expiry(self, seq: int, at: float) -> None:
        """Let a job expire if it is still queued at this time; kept while it is processing, for a requeue."""
        self._expires_at[seq] = at
        if seq in self._keys:
            self._expiries[seq] = at

    def drop_expiry(self, seq: int) -> None:
        """Forget when a job would have expired that has ended, or was preempted: it does not expire any more."""
        self._expires_at.pop(seq, None)

    def update_positions(self, now: float) -> list[int]:
        """Give each added job its position, and the first `POSITIONS_TRACKED` jobs their current ones.

        Returns:
            The jobs whose position changed, those included that are no longer among the first.
        """
        if not self._moved:
            self._unplaced.clear()
            return []
        positions = self._positions
        for seq in self._unplaced:
            positions[seq] = (self._rank(seq), None)
        self._unplaced.clear()
        self._moved = False
        first = [key % _LEVEL for key in islice(self._order, POSITIONS_TRACKED)]
        current = [(seq, self._rank(seq)) for seq in self._first if seq in self._keys and seq not in first]
        current[:0] = zip(first, count(1))
        self._first = first
        moved = [(seq, position) for seq, position in current if positions.get(seq, _NO_POSITION)[0] != position]
        for seq, position in moved:
            positions[seq] = (position, now)
        return [seq for seq, _ in moved]

    def _rank(self, seq: int) -> int:
        key, order = self._keys[seq], self._order
        return len(order) if key == order[-1] else int(order.bisect_right(key))

    # -- queries -----------------------------------------------------------------------------------------------------

    def all_ready(self, now: float, time: float) -> Iterator[int]:
        """Yield the jobs that may be started, in order."""
        for key in self._order:
            seq = key % _LEVEL
            if self._not_before.get(seq, now) <= now and self._expires_at.get(seq, math.inf) > time:
                yield seq

    def next_ready_in(self, now: float, time: float) -> float | None:
        """Return in how many seconds a delayed job will be ready; None: no job is delayed, or all of them expired."""
        alive = (at for seq, at in self._not_before.items() if self._expires_at.get(seq, math.inf) > time)
        first = min(alive, default=None)
        return None if first is None else max(0.0, first - now)

    def expired(self, time: float, limit: int) -> list[int]:
        """Return at most `limit` jobs that have expired and are still queued."""
        return self._expiries.due(time, limit)

    def position(self, seq: int) -> tuple[int | None, float | None]:
        """Return a job's position from 1, and since when it has it, if that is later than its last change of state."""
        return self._positions.get(seq, _NO_POSITION)

    def oldest(self) -> int | None:
        """Return the job that was accepted first, whatever its priority; None: the queue is empty."""
        first: list[int] = []
        index = 0
        while index < len(self._order):  # once for each level that has a job
            key = self._order[index]
            first.append(key % _LEVEL)
            index = self._order.bisect_left(key - first[-1] + _LEVEL)
        return min(first, default=None)
