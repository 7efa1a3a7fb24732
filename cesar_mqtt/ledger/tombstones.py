"""Tombstones: deleted jobs whose retained messages still have to be cleared, and those cleared recently.

A broker that is killed may come back with an older saved state: it retains messages again that were cleared since. And
with MQTT 3.1.1 a broker sends retained requests at each connection, also those whose jobs were deleted since. So the
newest deleted jobs are remembered, and longer those whose requests the broker was seen to retain.
The ledger serialises every call.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from cesar_mqtt.jobs import DeletedJob
from cesar_mqtt.ledger.deduplication import FingerprintIndex
from cesar_mqtt.ledger.documents import tombstone_from

CLEARED_KEPT = 10_000
"""How many deleted jobs are remembered after the broker has cleared them: ten times the default `max_finished`."""
RETAINED_KEPT = 10_000
"""How many more of them, whose requests the broker was seen to retain: it retains one for each topic."""


class Tombstones:
    """The deleted jobs, by sequence number."""

    def __init__(self, documents: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Start with the documents on disk, in ascending order."""
        self.pending: dict[int, DeletedJob] = {}
        """Jobs of which the broker may still retain messages."""
        self._cleared: dict[int, DeletedJob] = {}
        self._kept: dict[int, DeletedJob] = {}
        """Those of the cleared ones that are remembered only because the broker retains their requests."""
        self._status_owners: dict[str, int] = {}
        self._requests = FingerprintIndex()
        for seq, document in documents:
            self._add(tombstone_from(seq, document), self._cleared if document.get("cleared") else self.pending)

    def add(self, deleted: DeletedJob) -> None:
        """Add a job that was just deleted."""
        self._add(deleted, self.pending)

    def _add(self, deleted: DeletedJob, group: dict[int, DeletedJob]) -> None:
        group[deleted.seq] = deleted
        if deleted.owns_status:
            self._status_owners[deleted.job_id] = deleted.seq
        if deleted.request_key is not None:
            self._requests.add(deleted.request_key, deleted.seq)

    def mark_cleared(self, seq: int) -> list[int] | None:
        """Record that the broker has cleared a job's messages.

        Returns:
            The tombstones to remove from the disk; None: the job was not pending.
        """
        deleted = self.pending.pop(seq, None)
        if deleted is None:
            return None
        self._cleared[seq] = deleted
        evicted = []
        while len(self._cleared) > CLEARED_KEPT:
            oldest = self._cleared.pop(next(iter(self._cleared)))
            if oldest.retained:
                self._kept[oldest.seq] = oldest
            else:
                evicted.append(oldest)
        while len(self._kept) > RETAINED_KEPT:
            evicted.append(self._kept.pop(next(iter(self._kept))))
        for other in evicted:
            self._remove_keys(other)
        return [other.seq for other in evicted]

    def clear_again(self, seqs: Collection[int] | None = None) -> list[int]:
        """Make these cleared jobs (None: all) pending again, and return their numbers: the broker may retain them."""
        cleared = self._cleared.values() if seqs is None else [self._cleared[s] for s in seqs if s in self._cleared]
        again = [deleted for deleted in cleared if deleted.owns_status or deleted.formats]
        for deleted in again:
            self.pending[deleted.seq] = replace(deleted, event_pending=False)
            del self._cleared[deleted.seq]
        return [deleted.seq for deleted in again]

    def status_owner(self, job_id: str) -> DeletedJob | None:
        """Return the deleted job whose retained status has this id; None: there is none."""
        seq = self._status_owners.get(job_id)
        return None if seq is None else self._group(seq)[seq]

    def has_messages(self, deleted: DeletedJob) -> bool:
        """Whether something is to be published, now or later, once a new job owns the status: results or the event."""
        return bool(deleted.formats) or (deleted.event_pending and deleted.seq in self.pending)

    def release_status(self, deleted: DeletedJob) -> None:
        """Leave the status to a new job with the same id."""
        group = self._group(deleted.seq)
        stays_pending = group is self.pending and self.has_messages(deleted)
        self._remove_keys(deleted)
        del group[deleted.seq]
        self._add(replace(deleted, owns_status=False), group if stays_pending or group is self._kept else self._cleared)

    def with_request(self, request_key: str) -> DeletedJob | None:
        """Return the newest deleted job whose request has this key; None: there is none."""
        seq = self._requests.newest(request_key)
        return None if seq is None else self._group(seq)[seq]

    def newest_id(self, request_key: str) -> str | None:
        """Return the id of that job."""
        deleted = self.with_request(request_key)
        return None if deleted is None else deleted.job_id

    def mark_retained(self, seq: int) -> None:
        """Record that the broker retains a job's request."""
        group = self._group(seq)
        group[seq] = replace(group[seq], retained=True)

    def _group(self, seq: int) -> dict[int, DeletedJob]:
        return next(group for group in (self.pending, self._cleared, self._kept) if seq in group)

    def _remove_keys(self, deleted: DeletedJob) -> None:
        if self._status_owners.get(deleted.job_id) == deleted.seq:
            del self._status_owners[deleted.job_id]
        if deleted.request_key is not None:
            self._requests.remove(deleted.request_key, deleted.seq)
