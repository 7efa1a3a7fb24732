"""What can be seen of the ledger's jobs; nothing here changes anything.

Every method may be called from any thread, and gives values that stay as they are while the ledger goes on.
"""

from bisect import bisect
from collections.abc import Collection, Iterator
from itertools import islice

from cesar_mqtt.jobs import Job, JobState, Totals
from cesar_mqtt.ledger.base import WINDOWS, Books
from cesar_mqtt.ledger.documents import in_spool, needs_audio, window_of
from cesar_mqtt.ledger.index import window_id
from cesar_mqtt.transcript import Window


class Views(Books):
    """The books, to be looked into."""

    def get(self, job_id: str) -> Job | None:
        """Return the job as it is now, or None."""
        with self._changed:
            seq = self._index.register.seq(job_id)
            return None if seq is None else self._job(seq)

    def jobs(self, *, states: Collection[JobState] = (), after: int = 0, limit: int = 100) -> list[Job]:
        """Return jobs in the order of their acceptance, from the one behind number `after` on; no states: all."""
        with self._changed:
            return [self._job(seq) for seq in islice(self._in_states(states, after), limit)]

    def count(self, states: Collection[JobState] = ()) -> int:
        """Return how many jobs are in these states now; no states: how many there are."""
        with self._changed:
            return sum(1 for _ in self._in_states(states, 0))

    def _in_states(self, states: Collection[JobState], after: int) -> Iterator[int]:
        wanted = frozenset(states or JobState)
        numbers = self._index.numbers(wanted)
        return (seq for seq in numbers[bisect(numbers, after) :] if self._rows[str(seq)]["state"] in wanted)

    def windows(self, seq: int) -> tuple[Window, ...]:
        """Return the finished parts of a job that are kept: while it may go on, and afterwards if formats need them."""
        with self._changed:
            rows = self._journal.rows(WINDOWS)
            documents = [rows[str(doc_id)] for doc_id in self._index.window_ids(seq)]
        # Documents are replaced and never changed: nobody has to wait while many hours of speech are read.
        return tuple(window_of(number, document) for number, document in enumerate(documents))

    def finished_until(self, seq: int) -> float:
        """Return the second of a job's recording from which the work goes on; 0: from the start."""
        with self._changed:
            kept = self._index.windows.get(seq, 0)
            return float(self._journal.rows(WINDOWS)[str(window_id(seq, kept - 1))]["until_s"]) if kept else 0.0

    def is_cancelling(self, seq: int) -> bool:
        """Whether the end of a job in work was asked for. Takes no lock: it is asked many times a second."""
        row = self._rows.get(str(seq))
        return row is not None and "cancelling" in row

    def totals(self) -> Totals:
        """Return the counts for the consumer's own topics; costs the same however many jobs there are."""
        with self._changed:
            index = self._index
            oldest = next(iter(index.queue), None)
            working = index.processing[0] if index.processing else None
            return Totals(
                queued=len(index.queue),
                completed_total=index.ended[JobState.COMPLETED],
                error_total=index.ended[JobState.ERROR],
                cancelled_total=index.ended[JobState.CANCELLED],
                rejected_total=self._rejected,
                oldest_queued_at=None if oldest is None else self._rows[str(oldest)]["created_at"],
                processing=None if working is None else self._rows[str(working)]["job_id"],
                paused=self._paused,
                deleted_total=index.deleted_total,
            )

    def last_finished(self) -> Job | None:
        """Return the job that ended last, or None."""
        with self._changed:
            newest = next(reversed(self._index.finished), None)
            return None if newest is None else self._job(newest)

    def processing(self) -> tuple[int, ...]:
        """Return the sequence numbers of the jobs in `processing`: one at most, or none."""
        with self._changed:
            return tuple(self._index.processing)

    def spooled(self) -> set[str]:
        """Return the names in the spool folder that jobs still need, or may need for a retry."""
        with self._changed:
            return {name for row in self._rows.values() if needs_audio(row) for name in in_spool(row)}
