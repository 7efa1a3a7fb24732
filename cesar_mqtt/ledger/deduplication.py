"""Deduplication: which requests are known, by id, packet id and fingerprint; the ledger serialises every call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cesar_mqtt.jobs import Admission, NewJob


class DeduplicationIndex:
    """Holds of every job what decides whether a request is new.

    A request without an id is recognised by its packet id until the packet id is released: from then on the broker may
    give it to another message.
    """

    def __init__(
        self,
        documents: Iterable[tuple[int, Mapping[str, Any]]],
        *,
        newest_deleted_id: Callable[[str], str | None],
        released_until: int = 0,
    ) -> None:
        """Start with the jobs on disk.

        Args:
            documents: the documents of all jobs, in ascending order of their sequence numbers.
            newest_deleted_id: returns, for a `request_key`, the id of the newest deleted job with that request.
            released_until: as the attribute.
        """
        self.released_until = released_until
        """The packet ids of all jobs up to this number are released. On disk as the counter `settled`."""
        self._newest_deleted_id = newest_deleted_id
        self._jobs: dict[str, tuple[int, str]] = {}
        self._ids: dict[int, str] = {}
        self._seq_by_packet_id: dict[int, int] = {}
        """The newest job of each packet id that is not released."""
        self._packet_id_by_seq: dict[int, int] = {}
        self._fingerprints = FingerprintIndex()
        """Of jobs whose requests had no id."""
        for seq, document in documents:
            self._add(seq, document["job_id"], document["fingerprint"])
            if "packet_id" in document and seq > released_until:
                self._take_packet_id(seq, document["packet_id"])
            if "anonymous" in document:
                self._fingerprints.add(document["fingerprint"], seq)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def seq(self, job_id: str) -> int | None:
        """Return the sequence number of the job with this id; None: there is none."""
        known = self._jobs.get(job_id)
        return None if known is None else known[0]

    # -- changes -----------------------------------------------------------------------------------------------------

    def add(self, seq: int, request: NewJob) -> None:
        """Add the request that became job number `seq`, the greatest so far."""
        self._add(seq, request.job_id, request.fingerprint)
        if request.packet_id is not None:
            self._take_packet_id(seq, request.packet_id)
        if request.has_generated_id:
            self._fingerprints.add(request.fingerprint, seq)

    def _add(self, seq: int, job_id: str, fingerprint: str) -> None:
        self._jobs[job_id] = seq, fingerprint
        self._ids[seq] = job_id

    def remove(self, seq: int, document: Mapping[str, Any]) -> None:
        """Remove a deleted job."""
        del self._jobs[self._ids.pop(seq)]
        self._release(seq)
        if "anonymous" in document:
            self._fingerprints.remove(document["fingerprint"], seq)

    def _take_packet_id(self, seq: int, packet_id: int) -> None:
        # A packet id that comes with a new message was free: the earlier message cannot be redelivered any more.
        self.release_packet_id(packet_id)
        self._seq_by_packet_id[packet_id] = seq
        self._packet_id_by_seq[seq] = packet_id

    def release_packet_id(self, packet_id: int) -> None:
        """Take no later message for a redelivery of the request that came with this packet id."""
        earlier = self._seq_by_packet_id.get(packet_id)
        if earlier is not None:
            self._release(earlier)

    @property
    def jobs_with_packet_id(self) -> list[str]:
        """The jobs whose requests may still be redelivered and recognised by their packet ids."""
        return [self._ids[seq] for seq in self._packet_id_by_seq]

    def release_packet_ids(self, job_ids: Iterable[str]) -> None:
        """Take no later message for a redelivery of these jobs' requests."""
        for job_id in job_ids:
            if job_id in self._jobs:
                self._release(self._jobs[job_id][0])

    def _release(self, seq: int) -> None:
        packet_id = self._packet_id_by_seq.pop(seq, None)
        if packet_id is None:
            return
        del self._seq_by_packet_id[packet_id]
        self.released_until = max(self.released_until, seq)
        if self._packet_id_by_seq:
            self.released_until = next(iter(self._packet_id_by_seq)) - 1

    # -- admission ---------------------------------------------------------------------------------------------------

    def admit(self, requests: Sequence[NewJob], *, room: int) -> tuple[list[tuple[Admission, str]], dict[str, NewJob]]:
        """Decide on each request as if the ones before it were already in the ledger; changes nothing here.

        Args:
            requests: in the order of their arrival.
            room: how many more jobs the queue may take.

        Returns:
            For each request the decision and the id of its job; and the accepted requests by id.
        """
        accepted: dict[str, NewJob] = {}
        admissions = []
        for request in requests:
            earlier = self._earlier_delivery(request, accepted)
            job_id = earlier or request.job_id
            known = accepted[job_id].fingerprint if job_id in accepted else self._jobs.get(job_id, (0, None))[1]
            if earlier is not None:
                admission = Admission.DUPLICATE
            elif known is not None:
                admission = Admission.DUPLICATE if known == request.fingerprint else Admission.CONFLICT
            elif request.failure is None and room <= 0:
                admission = Admission.FULL
            else:
                admission = Admission.ACCEPTED
                accepted[job_id] = request
                room -= request.failure is None
            admissions.append((admission, job_id))
        return admissions, accepted

    def _earlier_delivery(self, request: NewJob, accepted: dict[str, NewJob]) -> str | None:
        """Return the id of the job that an earlier delivery of the same message became; None: there was none.

        A redelivery has the DUP flag and the packet id of the first delivery (MQTT 5, section 4.4), so two messages
        with equal content are two jobs. A retained message has neither: it is the job of its first, live delivery, even
        if that job was deleted since.
        """
        if request.retained:
            known_id = self._job_of_retained(request, accepted)
            if known_id is not None:
                return known_id
        if not request.redelivered or request.packet_id is None:
            return None
        for job_id, other in reversed(accepted.items()):
            if other.packet_id == request.packet_id:
                return job_id if other.fingerprint == request.fingerprint else None
        seq = self._seq_by_packet_id.get(request.packet_id)
        known_id = None if seq is None else self._ids[seq]
        return known_id if known_id is not None and self._jobs[known_id][1] == request.fingerprint else None

    def _job_of_retained(self, request: NewJob, accepted: dict[str, NewJob]) -> str | None:
        if request.has_generated_id:
            for job_id, other in reversed(accepted.items()):
                if other.has_generated_id and other.fingerprint == request.fingerprint:
                    return job_id
            seq = self._fingerprints.newest(request.fingerprint)
            if seq is not None:
                return self._ids[seq]
        return self._newest_deleted_id(request.request_key)


class FingerprintIndex:
    """Sequence numbers by fingerprint, or by another key of requests; several jobs may have the same one."""

    def __init__(self) -> None:
        self._seqs: dict[str, list[int]] = {}

    def add(self, fingerprint: str, seq: int) -> None:
        self._seqs.setdefault(fingerprint, []).append(seq)

    def remove(self, fingerprint: str, seq: int) -> None:
        """Remove a number, known or not; the next newest one counts from then on."""
        seqs = self._seqs.get(fingerprint, [])
        if seq in seqs:
            seqs.remove(seq)
        if not seqs:
            self._seqs.pop(fingerprint, None)

    def newest(self, fingerprint: str) -> int | None:
        return max(self._seqs.get(fingerprint, ()), default=None)
