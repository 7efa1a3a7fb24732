"""The line in which jobs wait: their order, their places, who is not ready yet; the ledger serialises every call."""

import math
from bisect import bisect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

from cesar_mqtt.ledger.expiries import Times

HEAD = 10
"""So many of the first jobs in the queue are told their position whenever it changes (the contract's section 2)."""


class JobQueue:
    """Sequence numbers of queued jobs, first in, first out. Times are seconds of whatever clocks the caller has."""

    def __init__(self, order: Iterable[int]) -> None:
        """Start with the jobs that a restart found queued, oldest first."""
        self._order = OrderedDict.fromkeys(order)
        self._not_before: dict[int, float] = {}
        self._expires_at: dict[int, float] = {}
        self._expiries = Times()
        """The same for the jobs that wait."""
        self._places: dict[int, tuple[int, float | None]] = {
            seq: (rank, None) for rank, seq in enumerate(islice(self._order, HEAD, None), start=HEAD + 1)
        }

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def add(self, seq: int) -> None:
        """Let a new job wait behind all others."""
        self._order[seq] = None
        self._places[seq] = (len(self._order), None)

    def put_back(self, seq: int) -> None:
        """Let a job wait again, in the place that its number gives it."""
        rank = 1
        if seq > next(iter(self._order), seq):  # others that were accepted before it wait, too
            order = list(self._order)
            rank += bisect(order, seq)
            self._order = OrderedDict.fromkeys([*order[: rank - 1], seq, *order[rank - 1 :]])
        else:
            self._order[seq] = None
            self._order.move_to_end(seq, last=False)
        self._places[seq] = (rank, None)
        if seq in self._expires_at:
            self._expiries[seq] = self._expires_at[seq]

    def remove(self, seq: int) -> None:
        """Let a job wait no longer."""
        del self._order[seq]
        self._places.pop(seq, None)
        self._not_before.pop(seq, None)
        if seq in self._expires_at:
            self._expiries.pop(seq, None)

    def delay(self, seq: int, until: float) -> None:
        """Let those behind a job go first until then."""
        self._not_before[seq] = until

    def expire(self, seq: int, at: float) -> None:
        """Note from when on a job is no longer worth starting."""
        self._expires_at[seq] = at
        if seq in self._order:
            self._expiries[seq] = at

    def end(self, seq: int) -> None:
        """Take note that a job has ended: it may wait once more, but then it does not expire."""
        self._expires_at.pop(seq, None)

    def expired(self, now: float, limit: int) -> list[int]:
        """Return jobs that still wait and are no longer worth starting, at most so many; as often as they are there."""
        return self._expiries.until(now, limit)

    def all_ready(self, now: float, time: float) -> Iterator[int]:
        """Yield the jobs that may be begun, oldest first; delays are counted by `now`, expiries by `time`."""
        return (
            seq
            for seq in self._order
            if self._not_before.get(seq, now) <= now and self._expires_at.get(seq, math.inf) > time
        )

    def next_ready_in(self, now: float, time: float) -> float | None:
        """Return in how many seconds a delayed job will be ready; None: none is that is still worth starting."""
        worth = (at for seq, at in self._not_before.items() if self._expires_at.get(seq, math.inf) > time)
        first = min(worth, default=None)
        return None if first is None else max(0.0, first - now)

    def place(self, seq: int) -> tuple[int | None, float | None]:
        """Return a job's position, from 1, and since when it has it, if that is later than its last change."""
        return self._places.get(seq, (None, None))

    def number_head(self, now: float) -> list[int]:
        """Give the first jobs their new positions; return those whose position changed."""
        moved = [
            (rank, seq)
            for rank, seq in enumerate(islice(self._order, HEAD), start=1)
            if self._places.get(seq, (0, None))[0] != rank
        ]
        for rank, seq in moved:
            self._places[seq] = (rank, now)
        return [seq for _, seq in moved]
