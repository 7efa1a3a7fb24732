"""The register by itself: which requests are new ones, and for which jobs the answer has to outlast a restart."""

from typing import Any

from cesar_mqtt.jobs import Admission, NewJob
from cesar_mqtt.ledger.deduplication import Register

ACCEPTED, SAME = Admission.ACCEPTED, Admission.SAME


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
        self.register = Register([], answered=lambda _: None)
        self.judge(*requests)

    def judge(self, *requests: NewJob) -> list[tuple[Admission, str]]:
        """Decide, and take in what is accepted."""
        verdicts, new = self.register.judge(requests, room=100)
        for seq, job in enumerate(new.values(), start=max(self.documents, default=0) + 1):
            document: dict[str, Any] = {"job_id": job.job_id, "fingerprint": job.fingerprint}
            document |= {} if job.packet_id is None else {"packet_id": job.packet_id}
            document |= {"anonymous": True} if job.anonymous else {}
            self.documents[seq] = document
            self.register.add(seq, job)
        return verdicts

    def restart(self) -> None:
        self.register = Register(
            self.documents.items(), answered=lambda print_: f"deleted {print_}", settled=self.register.settled
        )

    def delete(self, seq: int) -> None:
        self.register.remove(seq, self.documents.pop(seq))


def test_the_packet_id_of_a_job_that_was_deleted_means_nothing_any_more() -> None:
    desk = Desk(delivered("deleted", 7), delivered("kept", 8))
    desk.delete(1)
    assert desk.judge(again(7)) == [(ACCEPTED, "again")]
    assert desk.register.repeatable == ["kept", "again"]


def test_when_nothing_of_the_former_bearer_can_come_again_the_new_one_is_still_known() -> None:
    """Else a redelivery of the newer message was taken for a new one, and the job done twice."""
    desk = Desk(delivered("old", 7), delivered("new", 7))
    assert desk.register.repeatable == ["new"]
    desk.register.settle(["old", "of which nothing is known"])
    assert desk.judge(again(7)) == [(SAME, "new")]


def test_after_a_restart_those_are_known_that_can_come_again_and_no_others() -> None:
    desk = Desk(*(delivered(f"job-{packet_id}", packet_id) for packet_id in range(1, 5)))
    desk.register.settle(["job-2"])
    desk.restart()
    assert desk.judge(again(1), again(3)) == [(SAME, "job-1"), (SAME, "job-3")]
    desk.register.settle(["job-1", "job-2", "job-3"])
    desk.restart()
    assert desk.judge(again(4)) == [(SAME, "job-4")]
    assert desk.judge(again(3)) == [(ACCEPTED, "again")], "this packet id was free for another message"
    desk.register.settle(["job-4", "again"])
    desk.restart()
    assert desk.register.repeatable == []


def test_a_retained_request_without_an_id_is_known_by_what_it_asks_also_after_a_restart() -> None:
    retained = request("retained", "asked", anonymous=True, retained=True)
    desk = Desk(request("first", "asked", anonymous=True), request("other"), request("named", "asked"))
    assert desk.judge(retained) == [(SAME, "first")]
    desk.restart()
    assert desk.judge(retained) == [(SAME, "first")]
    desk.judge(request("second", "asked", anonymous=True))
    desk.restart()
    assert desk.judge(retained) == [(SAME, "second")], "what is retained is the newest"
    desk.delete(4)
    assert desk.judge(retained) == [(SAME, "first")]
    desk.delete(1)
    assert desk.judge(retained) == [(SAME, "deleted asked")]


def test_a_retained_request_is_known_by_what_came_just_before_it() -> None:
    retained = request("retained", anonymous=True, retained=True)
    live = [request("named"), request("first", anonymous=True), request("second", anonymous=True)]
    assert Desk().judge(*live, request("named too"), retained)[-1] == (SAME, "second")
    assert Desk().judge(live[0], retained)[-1] == (ACCEPTED, "retained"), "who gave it an id, asked for another job"


def test_a_retained_request_with_an_id_is_not_the_job_of_one_without() -> None:
    desk = Desk(request("uuid", anonymous=True))
    assert desk.judge(request("mine", retained=True)) == [(ACCEPTED, "mine")]


def test_redelivered_requests_with_ids_of_their_own_are_jobs_of_their_own() -> None:
    """They bear no packet id, which is not the same as bearing the same one."""
    others = [request("a"), request("b", redelivered=True), request("c", redelivered=True)]
    assert Desk().judge(*others) == [(ACCEPTED, "a"), (ACCEPTED, "b"), (ACCEPTED, "c")]


def test_a_redelivery_of_another_message_than_the_one_just_before_it_is_a_job_of_its_own() -> None:
    verdicts = Desk().judge(delivered("a", 7), request("b", "other", packet_id=7, redelivered=True))
    assert verdicts == [(ACCEPTED, "a"), (ACCEPTED, "b")]
