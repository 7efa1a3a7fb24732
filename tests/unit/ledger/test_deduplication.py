"""The deduplication index: which requests are new, and what a restart must remember."""

from typing import Any

from cesar_mqtt.jobs import Admission, NewJob
from cesar_mqtt.ledger.deduplication import DeduplicationIndex
from tests.factories import new_job

ACCEPTED, DUPLICATE = Admission.ACCEPTED, Admission.DUPLICATE


def request(job_id: str, fingerprint: str = "same", **fields: Any) -> NewJob:
    return new_job(job_id, None, fingerprint=fingerprint, **fields)


def delivered(job_id: str, packet_id: int, **fields: Any) -> NewJob:
    return request(job_id, packet_id=packet_id, **fields)


def redelivery(packet_id: int, **fields: Any) -> NewJob:
    return request("again", packet_id=packet_id, redelivered=True, **fields)


class LedgerStub:
    """A deduplication index with the part of the ledger that it needs: the documents and the released packet ids."""

    def __init__(self, *requests: NewJob) -> None:
        self.documents: dict[int, dict[str, Any]] = {}
        self.index = DeduplicationIndex([], newest_deleted_id=lambda _: None)
        self.admit(*requests)

    def admit(self, *requests: NewJob) -> list[tuple[Admission, str]]:
        """Admit requests and add the accepted ones."""
        admissions, accepted = self.index.admit(requests, room=100)
        for seq, job in enumerate(accepted.values(), start=max(self.documents, default=0) + 1):
            document: dict[str, Any] = {"job_id": job.job_id, "fingerprint": job.fingerprint}
            document |= {} if job.packet_id is None else {"packet_id": job.packet_id}
            document |= {"anonymous": True} if job.has_generated_id else {}
            self.documents[seq] = document
            self.index.add(seq, job)
        return admissions

    def restart(self) -> None:
        self.index = DeduplicationIndex(
            self.documents.items(),
            newest_deleted_id=lambda print_: f"deleted {print_}",
            released_until=self.index.released_until,
        )

    def delete(self, seq: int) -> None:
        self.index.remove(seq, self.documents.pop(seq))


def test_the_packet_id_of_a_deleted_job_is_released() -> None:
    ledger = LedgerStub(delivered("deleted", 7), delivered("kept", 8))
    ledger.delete(1)
    assert ledger.admit(redelivery(7)) == [(ACCEPTED, "again")]
    assert ledger.index.jobs_with_packet_id == ["kept", "again"]


def test_releasing_an_older_job_with_the_same_packet_id_keeps_the_newer_one() -> None:
    """Otherwise a redelivery of the newer message became a second job."""
    ledger = LedgerStub(delivered("old", 7), delivered("new", 7))
    assert ledger.index.jobs_with_packet_id == ["new"]
    ledger.index.release_packet_ids(["old", "unknown"])
    assert ledger.admit(redelivery(7)) == [(DUPLICATE, "new")]


def test_after_a_restart_only_unreleased_packet_ids_identify_a_redelivery() -> None:
    ledger = LedgerStub(*(delivered(f"job-{packet_id}", packet_id) for packet_id in range(1, 5)))
    ledger.index.release_packet_ids(["job-2"])
    ledger.restart()
    assert ledger.admit(redelivery(1), redelivery(3)) == [(DUPLICATE, "job-1"), (DUPLICATE, "job-3")]
    ledger.index.release_packet_ids(["job-1", "job-2", "job-3"])
    ledger.restart()
    assert ledger.admit(redelivery(4)) == [(DUPLICATE, "job-4")]
    assert ledger.admit(redelivery(3)) == [(ACCEPTED, "again")], "its packet id was released"
    ledger.index.release_packet_ids(["job-4", "again"])
    ledger.restart()
    assert ledger.index.jobs_with_packet_id == []


def test_a_retained_request_without_an_id_is_identified_by_its_fingerprint() -> None:
    retained = request("retained", "asked", has_generated_id=True, retained=True)
    ledger = LedgerStub(request("first", "asked", has_generated_id=True), request("other"), request("named", "asked"))
    assert ledger.admit(retained) == [(DUPLICATE, "first")]
    ledger.restart()
    assert ledger.admit(retained) == [(DUPLICATE, "first")]
    ledger.admit(request("second", "asked", has_generated_id=True))
    ledger.restart()
    assert ledger.admit(retained) == [(DUPLICATE, "second")], "the broker retains the newest one"
    ledger.delete(4)
    assert ledger.admit(retained) == [(DUPLICATE, "first")]
    ledger.delete(1)
    assert ledger.admit(retained) == [(DUPLICATE, "deleted asked")]


def test_a_retained_request_is_identified_by_the_newest_request_of_the_same_batch() -> None:
    retained = request("retained", has_generated_id=True, retained=True)
    live = [request("named"), request("first", has_generated_id=True), request("second", has_generated_id=True)]
    assert LedgerStub().admit(*live, request("named too"), retained)[-1] == (DUPLICATE, "second")
    assert LedgerStub().admit(live[0], retained)[-1] == (ACCEPTED, "retained"), "a request with an id is another job"


def test_a_retained_request_with_an_id_is_not_the_job_of_one_without() -> None:
    ledger = LedgerStub(request("uuid", has_generated_id=True))
    assert ledger.admit(request("mine", retained=True)) == [(ACCEPTED, "mine")]


def test_redelivered_requests_with_their_own_ids_are_separate_jobs() -> None:
    """They have no packet id: that must not count as the same one."""
    others = [request("a"), request("b", redelivered=True), request("c", redelivered=True)]
    assert LedgerStub().admit(*others) == [(ACCEPTED, "a"), (ACCEPTED, "b"), (ACCEPTED, "c")]


def test_a_redelivery_with_other_content_is_a_separate_job() -> None:
    admissions = LedgerStub().admit(delivered("a", 7), request("b", "other", packet_id=7, redelivered=True))
    assert admissions == [(ACCEPTED, "a"), (ACCEPTED, "b")]
