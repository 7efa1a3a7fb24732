"""The outbox: what the broker has still to be told of, in memory; the ledger owns it and serialises every call."""

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count, islice
from typing import Any

from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.documents import job_of

TRAIL = 1000
"""So many changes of state are kept one by one; beyond that, only the newest of a job counts."""

Item = tuple[int, Job]
"""The number to say when the broker has acknowledged it, and what to tell.

The number is the job's revision as long as that is news, and negative for what is said again.
"""

Moment = tuple[int, Mapping[str, Any], int | None, float | None]
"""A job's number, its document, which is never changed, its place in the queue and since when it has that."""


class Outbox:
    """Jobs whose newest state the broker has not acknowledged, oldest change first.

    `owe` is for a change that is on disk: until it is acknowledged, the watermark stays below it, so that a restart
    knows of it. `tell` is for what is worth telling again without a change, such as a new position in the queue.
    """

    def __init__(self, revisions: Iterable[tuple[int, int]], *, told: int = 0) -> None:
        """Start with what a restart found: revision and sequence number of every change above the watermark.

        Up to the revision `told` the broker has heard of all of them before; they are no news.
        """
        self._newest = OrderedDict((seq, revision) for revision, seq in sorted(revisions))
        self._owed = self._newest.copy()
        self._unsaid = {seq for seq, revision in self._newest.items() if revision > told}
        self._heard = self._newest.keys() - self._unsaid
        """Jobs whose newest change has been acknowledged as news, while something is to be said of them again."""
        self._again = count(-1, -1)
        self._trail: deque[tuple[int, Moment]] = deque(maxlen=TRAIL)
        for seq in sorted(self._heard, key=self._newest.__getitem__):
            self.tell(seq)

    def __bool__(self) -> bool:
        return bool(self._newest)

    def tell(self, seq: int) -> None:
        """Let the broker be told of a job once more; a change that it is still to be told of stays news."""
        if seq not in self._unsaid:
            self._newest[seq] = next(self._again)
            self._newest.move_to_end(seq)

    def owe(self, seq: int, revision: int, moment: Moment) -> None:
        """Let the broker be told of a change that transaction `revision` brought, and of each such state, in order."""
        newest, owed = self._newest, self._owed
        newest[seq] = owed[seq] = revision
        newest.move_to_end(seq)
        owed.move_to_end(seq)
        self._unsaid.discard(seq)
        self._heard.discard(seq)
        if len(self._trail) == TRAIL:
            self._crowd_out(*self._trail[0])
        self._trail.append((revision, moment))

    def _crowd_out(self, revision: int, moment: Moment) -> None:
        """Have the newest change of a job told as news in its turn, for the trail has no room for it."""
        seq, *_ = moment
        if self._owed.get(seq) == revision:
            self._newest[seq] = revision
            self._unsaid.add(seq)

    def owe_all(self, revisions: Iterable[tuple[int, int]]) -> None:
        """Let the broker be told of everything: it has lost what it knew. What it has heard before is no news."""
        news = self._owed.keys() - self._heard
        self._owed = OrderedDict((seq, revision) for revision, seq in sorted(revisions))
        self._heard = self._owed.keys() - news
        for seq in sorted(self._owed):
            self.tell(seq)

    def coalesce(self) -> None:
        """Forget the states that jobs passed through, and what is on its way; the newest is still told, or again."""
        for seq in self._owed.keys() - self._heard:
            self._newest[seq] = self._owed[seq]
            self._unsaid.add(seq)
        self._trail.clear()

    def forget(self, seqs: Collection[int]) -> None:
        """Drop whatever was to be told of these jobs."""
        for seq in seqs:
            self._newest.pop(seq, None)
            self._owed.pop(seq, None)
            self._unsaid.discard(seq)
            self._heard.discard(seq)
        dropped = frozenset(seqs)
        self._trail = deque((item for item in self._trail if item[1][0] not in dropped), maxlen=TRAIL)

    def take(self, limit: int, but: Collection[int], render: Callable[[int], Job]) -> list[Item]:
        """Return what to tell next; a newest state is returned again until `acknowledge`, unless it is in `but`."""
        passed = [self._trail.popleft() for _ in range(min(limit, len(self._trail)))]
        taken = [(number, job_of(*moment)) for number, moment in passed]
        if len(taken) < limit:
            on_the_way = {seq for _, (seq, *_) in passed}.union(but)
            waiting = (item for item in self._newest.items() if item[0] not in on_the_way)
            newest = list(islice(waiting, limit - len(taken)))
            taken += [(number, render(seq)) for seq, number in newest]
            self._unsaid.difference_update(seq for seq, _ in newest)
        return taken

    def acknowledge(self, seq: int, number: int) -> None:
        """Note a PUBACK; it ends what there is to tell of `seq` if it is for the newest."""
        if self._owed.get(seq) == number:
            self._heard.add(seq)
        if self._newest.get(seq) == number:
            del self._newest[seq]
            self._owed.pop(seq, None)
            self._heard.discard(seq)

    def watermark(self, transaction: int) -> int:
        """Return the transaction up to which the broker has acknowledged everything; `transaction` is the newest."""
        oldest = next(iter(self._owed.values()), None)
        return transaction if oldest is None else oldest - 1
