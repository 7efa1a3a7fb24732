"""The register: which requests are known, by id, packet id and fingerprint; the ledger serialises every call."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from cesar_mqtt.jobs import Admission, NewJob

Mark = TypeVar("Mark", bound=Hashable)


class Register:
    """Knows of every job what decides whether a request is new.

    Attributes:
        settled: the greatest number up to which no job's request can come again by its packet id.
    """

    def __init__(
        self,
        documents: Iterable[tuple[int, Mapping[str, Any]]],
        *,
        answered: Callable[[str], str | None],
        settled: int = 0,
    ) -> None:
        """Start with the documents of all jobs, in ascending order of their sequence numbers.

        Args:
            documents: the jobs.
            answered: returns, for a fingerprint, the id of the deleted job that a request without an id became.
            settled: as the attribute.
        """
        self._answered = answered
        self._jobs: dict[str, tuple[int, str]] = {}
        self._ids: dict[int, str] = {}
        self.settled = settled
        self._packet_ids: dict[int, int] = {}
        """Who bears a packet id; the latest."""
        self._borne: dict[int, int] = {}
        """The same the other way round."""
        self._anonymous = Marks[str]()
        for seq, document in documents:
            self._note(seq, document["job_id"], document["fingerprint"])
            if "packet_id" in document and seq > settled:
                self._bear(seq, document["packet_id"])
            if "anonymous" in document:
                self._anonymous.add(document["fingerprint"], seq)

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def seq(self, job_id: str) -> int | None:
        """Return the number of the job with this id; None: there is none."""
        known = self._jobs.get(job_id)
        return None if known is None else known[0]

    def add(self, seq: int, request: NewJob) -> None:
        """Note a request that became job number `seq`, which is greater than all others."""
        self._note(seq, request.job_id, request.fingerprint)
        if request.packet_id is not None:
            self._bear(seq, request.packet_id)
        if request.anonymous:
            self._anonymous.add(request.fingerprint, seq)

    def _note(self, seq: int, job_id: str, fingerprint: str) -> None:
        self._jobs[job_id] = seq, fingerprint
        self._ids[seq] = job_id

    def remove(self, seq: int, document: Mapping[str, Any]) -> None:
        """Forget a job that is deleted."""
        del self._jobs[self._ids.pop(seq)]
        self._settle(seq)
        if "anonymous" in document:
            self._anonymous.remove(document["fingerprint"], seq)

    def _bear(self, seq: int, packet_id: int) -> None:
        """Note the packet id of a request; whoever bore it before cannot come again, for it was free."""
        before = self._packet_ids.get(packet_id)
        if before is not None:
            self._settle(before)
        self._packet_ids[packet_id] = seq
        self._borne[seq] = packet_id

    @property
    def repeatable(self) -> list[str]:
        """The jobs whose requests may come again by their packet ids."""
        return [self._ids[seq] for seq in self._borne]

    def settle(self, job_ids: Iterable[str]) -> None:
        """Take nothing for a redelivery of these any more."""
        for job_id in job_ids:
            if job_id in self._jobs:
                self._settle(self._jobs[job_id][0])

    def _settle(self, seq: int) -> None:
        packet_id = self._borne.pop(seq, None)
        if packet_id is None:
            return
        del self._packet_ids[packet_id]
        self.settled = max(self.settled, seq)
        if self._borne:
            self.settled = next(iter(self._borne)) - 1

    def judge(self, requests: Sequence[NewJob], *, room: int) -> tuple[list[tuple[Admission, str]], dict[str, NewJob]]:
        """Decide on each request as if those before it were known already.

        Args:
            requests: in the order in which they came.
            room: how many more jobs may wait.

        Returns:
            For each request the verdict and the id of the job that it is; and the accepted ones by id.
        """
        new: dict[str, NewJob] = {}
        verdicts = []
        for request in requests:
            earlier = self._first_delivery(request, new)
            job_id = earlier or request.job_id
            known = new[job_id].fingerprint if job_id in new else self._jobs.get(job_id, (0, None))[1]
            if earlier is not None:
                verdict = Admission.SAME
            elif known is not None:
                verdict = Admission.SAME if known == request.fingerprint else Admission.CONFLICT
            elif request.failure is None and room <= 0:
                verdict = Admission.FULL
            else:
                verdict = Admission.ACCEPTED
                new[job_id] = request
                room -= request.failure is None
            verdicts.append((verdict, job_id))
        return verdicts, new

    def _first_delivery(self, request: NewJob, new: dict[str, NewJob]) -> str | None:
        """Return the id of the job that an earlier delivery of the same message made, if there is one.

        A redelivery has the DUP flag and the packet id of the first (MQTT 5, section 4.4), so two messages that
        happen to ask for the same are two jobs. What comes back because it is retained has neither: it is the job that
        its first, live delivery made, even if that was deleted since.
        """
        if request.retained and request.anonymous:
            for name, other in reversed(new.items()):
                if other.anonymous and other.fingerprint == request.fingerprint:
                    return name
            twin = self._anonymous.latest(request.fingerprint)
            job_id = self._answered(request.fingerprint) if twin is None else self._ids[twin]
            if job_id is not None:
                return job_id
        if not request.redelivered or request.packet_id is None:
            return None
        for name, other in reversed(new.items()):
            if other.packet_id == request.packet_id:
                return name if other.fingerprint == request.fingerprint else None
        bearer = self._packet_ids.get(request.packet_id)
        job_id = None if bearer is None else self._ids[bearer]
        return job_id if job_id is not None and self._jobs[job_id][1] == request.fingerprint else None


class Marks(Generic[Mark]):
    """For each mark the sequence numbers that bear it; the latest of them counts."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._bearers: dict[Mark, list[int]] = {}

    def add(self, mark: Mark, seq: int) -> None:
        """Note a bearer."""
        self._bearers.setdefault(mark, []).append(seq)

    def remove(self, mark: Mark, seq: int) -> None:
        """Forget a bearer; the one before it counts again. One that is not known is passed over."""
        bearers = self._bearers.get(mark, [])
        if seq in bearers:
            bearers.remove(seq)
        if not bearers:
            self._bearers.pop(mark, None)

    def latest(self, mark: Mark) -> int | None:
        """Return the newest bearer; None: nobody bears the mark."""
        bearers = self._bearers.get(mark, ())
        return max(bearers, default=None)
