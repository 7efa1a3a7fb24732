"""Deleted jobs: what the broker has still to forget, and what it has forgotten; the ledger serialises every call.

A broker that is killed and comes back with an older save shows again what it had forgotten since, and sends requests
again whose jobs are long gone. So the newest of them are known for a while.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cesar_mqtt.jobs import DeletedJob
from cesar_mqtt.ledger.deduplication import Marks
from cesar_mqtt.ledger.documents import gone_of

KEPT = 10_000
"""So many are known after the broker has forgotten them; ten times what is kept of finished jobs by default."""


class Tombstones:
    """The deleted jobs, by their numbers.

    Attributes:
        pending: those of which the broker may still retain something.
    """

    def __init__(self, documents: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Start with the documents that a restart found."""
        self.pending: dict[int, DeletedJob] = {}
        self._cleared: dict[int, DeletedJob] = {}
        self._ids: dict[str, int] = {}
        self._anonymous = Marks[str]()
        for seq, document in documents:
            gone = gone_of(seq, document)
            self._note(gone, among=self._cleared if document.get("cleared") else self.pending)

    def add(self, gone: DeletedJob) -> None:
        """Note a job that was just deleted."""
        self._note(gone, among=self.pending)

    def _note(self, gone: DeletedJob, *, among: dict[int, DeletedJob]) -> None:
        among[gone.seq] = gone
        if gone.status:
            self._ids[gone.job_id] = gone.seq
        if gone.fingerprint is not None and (gone.status or gone.formats):
            self._anonymous.add(gone.fingerprint, gone.seq)

    def clear(self, seq: int) -> list[int] | None:
        """Note that the broker has forgotten a job; return whom there is no room for any more, None: it is no news."""
        gone = self.pending.pop(seq, None)
        if gone is None:
            return None
        if not gone.status and not gone.formats:
            return [seq]
        self._cleared[seq] = gone
        pushed_out = [] if len(self._cleared) <= KEPT else [next(iter(self._cleared))]
        for other in pushed_out:
            self._forget(self._cleared.pop(other))
        return pushed_out

    def clear_again(self) -> list[int]:
        """Let the broker forget everything once more; return the numbers of the jobs that it had forgotten."""
        numbers = list(self._cleared)
        for gone in self._cleared.values():
            self.pending[gone.seq] = replace(gone, news=False)
        self._cleared.clear()
        return numbers

    def bearer(self, job_id: str) -> DeletedJob | None:
        """Return the deleted job whose status would be cleared under this id; None: there is none."""
        seq = self._ids.get(job_id)
        return None if seq is None else self._among(seq)[seq]

    def outlasts(self, gone: DeletedJob) -> bool:
        """Whether something is left to do once a new job has the status: results to clear, or an event to tell."""
        return bool(gone.formats) or (gone.news and gone.seq in self.pending)

    def keep_status(self, gone: DeletedJob) -> None:
        """Let the status stay as it is, for a new job has it now."""
        among = self._among(gone.seq)
        self._forget(gone)
        if self.outlasts(gone):
            self._note(replace(gone, status=False), among=among)
        else:
            del among[gone.seq]

    def answered(self, fingerprint: str) -> str | None:
        """Return the id of the newest of them that was made of such a request without an id; None: none was."""
        seq = self._anonymous.latest(fingerprint)
        return None if seq is None else self._among(seq)[seq].job_id

    def _among(self, seq: int) -> dict[int, DeletedJob]:
        return self.pending if seq in self.pending else self._cleared

    def _forget(self, gone: DeletedJob) -> None:
        if self._ids.get(gone.job_id) == gone.seq:
            del self._ids[gone.job_id]
        if gone.fingerprint is not None:
            self._anonymous.remove(gone.fingerprint, gone.seq)
