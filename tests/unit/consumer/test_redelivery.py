"""When a packet id no longer identifies a redelivery."""

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

from cesar_mqtt.consumer.incoming import IncomingMessage
from cesar_mqtt.consumer.redelivery import RedeliveryTracker
from cesar_mqtt.jobs import NewJob
from cesar_mqtt.mqtt.messages import Delivery, Receipt
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds

if TYPE_CHECKING:
    from cesar_mqtt.ledger.ledger import Ledger


class FakeLedger:
    """A ledger that knows only the jobs with packet ids."""

    def __init__(self, *job_ids: str) -> None:
        self.job_ids = set(job_ids)

    def release_packet_ids(self, job_ids: Collection[str]) -> None:
        self.job_ids.difference_update(job_ids)

    def release_all_packet_ids(self, *, keep: Collection[str] = ()) -> None:
        self.job_ids.intersection_update(keep)


class Bench:
    def __init__(self, *job_ids: str) -> None:
        self.ledger = FakeLedger(*job_ids)
        self.tracker = RedeliveryTracker(cast("Ledger", self.ledger))

    def took(self, *plans: IncomingMessage) -> set[str]:
        """Append and acknowledge these, and return the jobs that have packet ids then."""
        jobs = [plan.job for plan in plans if plan.job is not None]
        self.ledger.job_ids |= {job.job_id for job in jobs if job.packet_id is not None}
        self.tracker.on_acknowledged(plans, [job.job_id for job in jobs])
        return self.ledger.job_ids

    def updated(self, session: int = 0, **received: int) -> set[str]:
        counts = {int(name.removeprefix("connection_")): count for name, count in received.items()}
        self.tracker.update(RedeliveryBounds(session, counts))
        return self.ledger.job_ids


def plan(
    job_id: str | None,
    connection: int = 1,
    *,
    qos: int = 1,
    dup: bool = False,
    retain: bool = False,
    named: bool = False,
) -> IncomingMessage:
    delivery = Delivery("cesar/jobs", b"", qos, retain, dup, Receipt(connection, 1))
    mark = 1 if qos and not retain and not named else None
    job = None if job_id is None else NewJob(job_id, "same", None, "base", packet_id=mark, redelivered=dup)
    return IncomingMessage(delivery, job)


def test_a_message_acknowledged_behind_our_acknowledgement_proves_its_receipt() -> None:
    bench = Bench()
    assert bench.took(plan("a"), plan(None), plan("b"), plan("c")) == {"a", "b", "c"}
    assert bench.updated(connection_1=0) == {"a", "b", "c"}
    assert bench.updated(connection_1=2) == {"b", "c"}
    assert bench.took(plan("d", qos=0), plan("e", named=True), plan("f")) == {"b", "c", "f"}
    assert bench.updated(connection_1=5) == {"f"}
    assert bench.updated() == {"f"}
    assert bench.updated(connection_1=6) == set()


def test_acknowledgements_are_counted_by_connection() -> None:
    bench = Bench()
    bench.took(plan("a"), plan("b"))
    assert bench.took(plan("b", 2, dup=True)) == {"a", "b"}, "a, too, may still be sent again by this connection"
    assert bench.updated(connection_1=2) == {"a", "b"}
    assert bench.updated(connection_2=1) == {"a"}


def test_a_new_message_on_a_later_connection_ends_earlier_redeliveries() -> None:
    bench = Bench("from an earlier process")
    assert "from an earlier process" in bench.took(plan("a", dup=True), plan("r", retain=True), plan(None))
    assert bench.took(plan("b"), plan("c"), plan("d")) == {"a", "b", "c", "d"}
    assert bench.took(plan("c", 2, dup=True)) == {"a", "b", "c", "d"}
    assert bench.took(plan("e", 2), plan("f", 2)) == {"c", "e", "f"}
    bench.ledger.job_ids.add("kept")
    assert bench.took(plan("g", 2)) == {"c", "e", "f", "g", "kept"}, "once for a connection"


def test_a_batch_may_reach_over_a_lost_connection() -> None:
    bench = Bench()
    assert bench.took(plan("a", 1), plan("b", 1), plan("b", 2, dup=True), plan("c", 2)) == {"b", "c"}
    assert bench.updated(connection_1=2, connection_2=1) == {"c"}


def test_a_new_session_ends_everything() -> None:
    bench = Bench("old")
    bench.took(plan("a", 1))
    assert bench.updated(session=2) == set()
    assert not bench.tracker.can_be_redelivered(plan("b", 1).delivery)
    assert bench.tracker.can_be_redelivered(plan("b", 2).delivery)
    assert bench.took(plan("b", 2)) == {"b"}
    assert bench.updated(session=2, connection_2=0) == {"b"}, "it began only once"
    assert bench.updated(session=2, connection_2=1) == set()


def test_a_message_of_qos_0_does_not_end_earlier_redeliveries() -> None:
    """Redeliveries precede new messages only at QoS 1; a job would have run twice."""
    bench = Bench()
    bench.took(plan("a"))
    assert bench.took(plan("q", 2, qos=0)) == {"a"}
    assert bench.took(plan("a", 2, dup=True)) == {"a"}
    assert bench.took(plan("b", 2)) == {"a", "b"}
