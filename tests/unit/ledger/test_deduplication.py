"""The register by itself: which requests are new ones, and for which jobs the answer has to outlast a restart."""

from typing import Any

from cesar_mqtt.jobs import Admission, NewJob
from cesar_mqtt.ledger.deduplication import DeduplicationIndex

ACCEPTED, DUPLICATE = Admission.ACCEPTED, Admission.DUPLICATE


def request(job_id: str, fingerprint: str = "same", **fields: Any) -> NewJob:
    return NewJob(job_id, fingerprint, None, "base", **fields)


def delivered(job_id: str, packet_id: int, **fields: Any) -> NewJob:
    return request(job_id, packet_id=packet_id, **fields)


def again(packet_id: int, **fields: Any) -> NewJob:
    return request("again", packet_id=packet_id, redelivered=True, **fields)


class Desk:
    """A register, with the ledger's side of it: the documents, and up to which number none is known by a packet id."""

    def __init__(self, *requests: NewJob) -> None:
        self.documents: dict[int, dict[str, Any]] = {}
        self.register = DeduplicationIndex([], newest_deleted_id=lambda _: None)
        self.admit(*requests)

    def admit(self, *requests: NewJob) -> list[tuple[Admission, str]]:
        """Decide, and take in what is accepted."""
        admissions, accepted = self.register.admit(requests, room=100)
        for seq, job in enumerate(accepted.values(), start=max(self.documents, default=0) + 1):
            document: dict[str, Any] = {"job_id": job.job_id, "fingerprint": job.fingerprint}
            document |= {} if job.packet_id is None else {"packet_id": job.packet_id}
            document |= {"anonymous": True} if job.has_generated_id else {}
            self.documents[seq] = document
            self.register.add(seq, job)
        return admissions

    def restart(self) -> None:
        self.register = DeduplicationIndex(
            self.documents.items(),
            newest_deleted_id=lambda print_: f"deleted {print_}",
            released_until=self.register.released_until,
        )

    def delete(self, seq: int) -> None:
        self.register.remove(seq, self.documents.pop(seq))


def test_the_packet_id_of_a_job_that_was_deleted_means_nothing_any_more() -> None:
    desk = Desk(delivered("deleted", 7), delivered("kept", 8))
    desk.delete(1)
    assert desk.admit(again(7)) == [(ACCEPTED, "again")]
    assert desk.register.jobs_with_packet_id == ["kept", "again"]


def test_when_nothing_of_the_former_bearer_can_come_again_the_new_one_is_still_known() -> None:
    """Else a redelivery of the newer message was taken for a new one, and the job done twice."""
    desk = Desk(delivered("old", 7), delivered("new", 7))
    assert desk.register.jobs_with_packet_id == ["new"]
    desk.register.release_packet_ids(["old", "of which nothing is known"])
    assert desk.admit(again(7)) == [(DUPLICATE, "new")]


def test_after_a_restart_those_are_known_that_can_come_again_and_no_others() -> None:
    desk = Desk(*(delivered(f"job-{packet_id}", packet_id) for packet_id in range(1, 5)))
    desk.register.release_packet_ids(["job-2"])
    desk.restart()
    assert desk.admit(again(1), again(3)) == [(DUPLICATE, "job-1"), (DUPLICATE, "job-3")]
    desk.register.release_packet_ids(["job-1", "job-2", "job-3"])
    desk.restart()
    assert desk.admit(again(4)) == [(DUPLICATE, "job-4")]
    assert desk.admit(again(3)) == [(ACCEPTED, "again")], "this packet id was free for another message"
    desk.register.release_packet_ids(["job-4", "again"])
    desk.restart()
    assert desk.register.jobs_with_packet_id == []


def test_a_retained_request_without_an_id_is_known_by_what_it_asks_also_after_a_restart() -> None:
    retained = request("retained", "asked", has_generated_id=True, retained=True)
    desk = Desk(request("first", "asked", has_generated_id=True), request("other"), request("named", "asked"))
    assert desk.admit(retained) == [(DUPLICATE, "first")]
    desk.restart()
    assert desk.admit(retained) == [(DUPLICATE, "first")]
    desk.admit(request("second", "asked", has_generated_id=True))
    desk.restart()
    assert desk.admit(retained) == [(DUPLICATE, "second")], "what is retained is the newest"
    desk.delete(4)
    assert desk.admit(retained) == [(DUPLICATE, "first")]
    desk.delete(1)
    assert desk.admit(retained) == [(DUPLICATE, "deleted asked")]


def test_a_retained_request_is_known_by_what_came_just_before_it() -> None:
    retained = request("retained", has_generated_id=True, retained=True)
    live = [request("named"), request("first", has_generated_id=True), request("second", has_generated_id=True)]
    assert Desk().admit(*live, request("named too"), retained)[-1] == (DUPLICATE, "second")
    assert Desk().admit(live[0], retained)[-1] == (ACCEPTED, "retained"), "who gave it an id, asked for another job"


def test_a_retained_request_with_an_id_is_not_the_job_of_one_without() -> None:
    desk = Desk(request("uuid", has_generated_id=True))
    assert desk.admit(request("mine", retained=True)) == [(ACCEPTED, "mine")]


def test_redelivered_requests_with_ids_of_their_own_are_jobs_of_their_own() -> None:
    """They bear no packet id, which is not the same as bearing the same one."""
    others = [request("a"), request("b", redelivered=True), request("c", redelivered=True)]
    assert Desk().admit(*others) == [(ACCEPTED, "a"), (ACCEPTED, "b"), (ACCEPTED, "c")]


def test_a_redelivery_of_another_message_than_the_one_just_before_it_is_a_job_of_its_own() -> None:
    verdicts = Desk().admit(delivered("a", 7), request("b", "other", packet_id=7, redelivered=True))
    assert verdicts == [(ACCEPTED, "a"), (ACCEPTED, "b")]
