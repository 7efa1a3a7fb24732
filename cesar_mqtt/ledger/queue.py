"""The queue: the order of waiting jobs, their positions, delays and expiries; the ledger serialises every call."""

import math
from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from cesar_mqtt.ledger.expiry_heap import ExpiryHeap

POSITIONS_TRACKED = 10
"""So many of the first jobs have their status published when their position changes: more would flood the broker."""


class JobQueue:
    """Sequence numbers of queued jobs, first in, first out.

    Delays are on the monotonic clock (`now`), expiries on the wall clock (`time`); both in seconds.
    """

    def __init__(self, order: Iterable[int]) -> None:
        """Start with the jobs that were queued on disk, oldest first."""
        self._order = OrderedDict.fromkeys(order)
        self._not_before: dict[int, float] = {}
        self._expires_at: dict[int, float] = {}
        """Of all jobs that have not ended, queued or not."""
        self._expiries = ExpiryHeap()
        """Of queued jobs only."""
        self._positions: dict[int, tuple[int, float | None]] = {
            seq: (position, None)
            for position, seq in enumerate(islice(self._order, POSITIONS_TRACKED, None), start=POSITIONS_TRACKED + 1)
        }
        """The position that was last given to each queued job, and since when, if later than its last change of state.
        Jobs beyond the first ten keep the one that they had when they were queued."""

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, seq: int) -> None:
        """Append a new job."""
        self._order[seq] = None
        self._positions[seq] = (len(self._order), None)

    def requeue(self, seq: int) -> None:
        """Insert a job at the position that its number gives it."""
        position = 1
        if seq > next(iter(self._order), seq):  # an older job is queued, too
            order = list(self._order)
            position += bisect(order, seq)
            self._order = OrderedDict.fromkeys([*order[: position - 1], seq, *order[position - 1 :]])
        else:
            self._order[seq] = None
            self._order.move_to_end(seq, last=False)
        self._positions[seq] = (position, None)
        if seq in self._expires_at:
            self._expiries[seq] = self._expires_at[seq]

    def remove(self, seq: int) -> None:
        """Remove a job that is started, cancelled or deleted."""
        del self._order[seq]
        self._positions.pop(seq, None)
        self._not_before.pop(seq, None)
        self._expiries.pop(seq, None)

    def delay(self, seq: int, until: float) -> None:
        """Keep a job from being started before `until`; the jobs behind it go first."""
        self._not_before[seq] = until

    def set_expiry(self, seq: int, at: float) -> None:
        """Let a job expire if it is still queued at this time; kept while it is processing, for a requeue."""
        self._expires_at[seq] = at
        if seq in self._order:
            self._expiries[seq] = at

    def drop_expiry(self, seq: int) -> None:
        """Forget when a job that has ended would have expired: after a retry it does not expire."""
        self._expires_at.pop(seq, None)

    def update_positions(self, now: float) -> list[int]:
        """Give the first `POSITIONS_TRACKED` jobs their current positions; return the jobs whose position changed."""
        moved = [
            (position, seq)
            for position, seq in enumerate(islice(self._order, POSITIONS_TRACKED), start=1)
            if self._positions.get(seq, (0, None))[0] != position
        ]
        for position, seq in moved:
            self._positions[seq] = (position, now)
        return [seq for _, seq in moved]

    # -- queries -----------------------------------------------------------------------------------------------------

    def all_ready(self, now: float, time: float) -> Iterator[int]:
        """Yield the jobs that may be started, oldest first."""
        return (
            seq
            for seq in self._order
            if self._not_before.get(seq, now) <= now and self._expires_at.get(seq, math.inf) > time
        )

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
        return self._positions.get(seq, (None, None))
