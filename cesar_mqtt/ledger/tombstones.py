"""Tombstones: deleted jobs whose retained messages still have to be cleared, and those cleared recently.

A broker that is killed may come back with an older saved state: it retains messages again that were cleared since, and
sends retained requests again whose jobs were deleted since. So the newest deleted jobs are remembered for a while.
The ledger serialises every call.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cesar_mqtt.jobs import DeletedJob
from cesar_mqtt.ledger.deduplication import FingerprintIndex
from cesar_mqtt.ledger.documents import tombstone_from

CLEARED_KEPT = 10_000
"""How many deleted jobs are remembered after the broker has cleared them: ten times the default `max_finished`."""


class Tombstones:
    """The deleted jobs, by sequence number."""

    def __init__(self, documents: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Start with the documents on disk, in ascending order."""
        self.pending: dict[int, DeletedJob] = {}
        """Jobs of which the broker may still retain messages."""
        self._cleared: dict[int, DeletedJob] = {}
        self._status_owners: dict[str, int] = {}
        self._fingerprints = FingerprintIndex()
        for seq, document in documents:
            self._add(tombstone_from(seq, document), self._cleared if document.get("cleared") else self.pending)

    def add(self, deleted: DeletedJob) -> None:
        """Add a job that was just deleted."""
        self._add(deleted, self.pending)

    def _add(self, deleted: DeletedJob, group: dict[int, DeletedJob]) -> None:
        group[deleted.seq] = deleted
        if deleted.owns_status:
            self._status_owners[deleted.job_id] = deleted.seq
        if deleted.fingerprint is not None and (deleted.owns_status or deleted.formats):
            self._fingerprints.add(deleted.fingerprint, deleted.seq)

    def mark_cleared(self, seq: int) -> list[int] | None:
        """Record that the broker has cleared a job's messages.

        Returns:
            The tombstones to remove from the disk; None: the job was not pending.
        """
        deleted = self.pending.pop(seq, None)
        if deleted is None:
            return None
        if not deleted.owns_status and not deleted.formats:
            return [seq]
        self._cleared[seq] = deleted
        evicted = [] if len(self._cleared) <= CLEARED_KEPT else [next(iter(self._cleared))]
        for other in evicted:
            self._remove_keys(self._cleared.pop(other))
        return evicted

    def clear_again(self) -> list[int]:
        """Make every cleared job pending again, and return their numbers: the broker came back with an older state."""
        seqs = list(self._cleared)
        for deleted in self._cleared.values():
            self.pending[deleted.seq] = replace(deleted, event_pending=False)
        self._cleared.clear()
        return seqs

    def status_owner(self, job_id: str) -> DeletedJob | None:
        """Return the deleted job whose retained status has this id; None: there is none."""
        seq = self._status_owners.get(job_id)
        return None if seq is None else self._group(seq)[seq]

    def outlives_status(self, deleted: DeletedJob) -> bool:
        """Whether a tombstone is still needed once a new job owns the status: for results, or for the event."""
        return bool(deleted.formats) or (deleted.event_pending and deleted.seq in self.pending)

    def release_status(self, deleted: DeletedJob) -> None:
        """Leave the status to a new job with the same id."""
        group = self._group(deleted.seq)
        self._remove_keys(deleted)
        if self.outlives_status(deleted):
            self._add(replace(deleted, owns_status=False), group)
        else:
            del group[deleted.seq]

    def newest_id(self, fingerprint: str) -> str | None:
        """Return the id of the newest deleted job whose request had no id and this fingerprint; None: there is none."""
        seq = self._fingerprints.newest(fingerprint)
        return None if seq is None else self._group(seq)[seq].job_id

    def _group(self, seq: int) -> dict[int, DeletedJob]:
        return self.pending if seq in self.pending else self._cleared

    def _remove_keys(self, deleted: DeletedJob) -> None:
        if self._status_owners.get(deleted.job_id) == deleted.seq:
            del self._status_owners[deleted.job_id]
        if deleted.fingerprint is not None:
            self._fingerprints.remove(deleted.fingerprint, deleted.seq)
