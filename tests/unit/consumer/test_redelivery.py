"""When a packet id no longer identifies a redelivery."""

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

from cesar_mqtt.consumer.incoming import IncomingMessage
from cesar_mqtt.consumer.redelivery import RedeliveryTracker
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds
from tests.factories import delivery, new_job

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

    def acknowledged(self, *messages: IncomingMessage) -> set[str]:
        """Append and acknowledge these, and return the jobs that have packet ids then."""
        jobs = [message.job for message in messages if message.job is not None]
        self.ledger.job_ids |= {job.job_id for job in jobs if job.packet_id is not None}
        self.tracker.on_acknowledged(messages, [job.job_id for job in jobs])
        return self.ledger.job_ids

    def updated(self, session: int = 0, **received: int) -> set[str]:
        counts = {int(name.removeprefix("connection_")): count for name, count in received.items()}
        self.tracker.update(RedeliveryBounds(session, counts))
        return self.ledger.job_ids


def message(
    job_id: str | None,
    connection: int = 1,
    *,
    qos: int = 1,
    dup: bool = False,
    retain: bool = False,
    named: bool = False,
) -> IncomingMessage:
    incoming = delivery(connection=connection, qos=qos, dup=dup, retain=retain)
    packet_id = 1 if qos and not retain and not named else None
    job = None if job_id is None else new_job(job_id, packet_id=packet_id, redelivered=dup)
    return IncomingMessage(incoming, job)


def test_a_message_acknowledged_behind_our_acknowledgement_proves_its_receipt() -> None:
    bench = Bench()
    assert bench.acknowledged(message("a"), message(None), message("b"), message("c")) == {"a", "b", "c"}
    assert bench.updated(connection_1=0) == {"a", "b", "c"}
    assert bench.updated(connection_1=2) == {"b", "c"}
    assert bench.acknowledged(message("d", qos=0), message("e", named=True), message("f")) == {"b", "c", "f"}
    assert bench.updated(connection_1=5) == {"f"}
    assert bench.updated() == {"f"}
    assert bench.updated(connection_1=6) == set()


def test_acknowledgements_are_counted_by_connection() -> None:
    bench = Bench()
    bench.acknowledged(message("a"), message("b"))
    assert bench.acknowledged(message("b", 2, dup=True)) == {"a", "b"}, (
        "a, too, may still be sent again by this connection"
    )
    assert bench.updated(connection_1=2) == {"a", "b"}
    assert bench.updated(connection_2=1) == {"a"}


def test_a_new_message_on_a_later_connection_ends_earlier_redeliveries() -> None:
    bench = Bench("from an earlier process")
    assert "from an earlier process" in bench.acknowledged(
        message("a", dup=True), message("r", retain=True), message(None)
    )
    assert bench.acknowledged(message("b"), message("c"), message("d")) == {"a", "b", "c", "d"}
    assert bench.acknowledged(message("c", 2, dup=True)) == {"a", "b", "c", "d"}
    assert bench.acknowledged(message("e", 2), message("f", 2)) == {"c", "e", "f"}
    bench.ledger.job_ids.add("kept")
    assert bench.acknowledged(message("g", 2)) == {"c", "e", "f", "g", "kept"}, "once for a connection"


def test_a_batch_may_reach_over_a_lost_connection() -> None:
    bench = Bench()
    assert bench.acknowledged(message("a", 1), message("b", 1), message("b", 2, dup=True), message("c", 2)) == {
        "b",
        "c",
    }
    assert bench.updated(connection_1=2, connection_2=1) == {"c"}


def test_a_new_session_ends_everything() -> None:
    bench = Bench("old")
    bench.acknowledged(message("a", 1))
    assert bench.updated(session=2) == set()
    assert bench.acknowledged(message("b", 2)) == {"b"}
    assert bench.updated(session=2, connection_2=0) == {"b"}, "it began only once"
    assert bench.updated(session=2, connection_2=1) == set()


def test_a_message_of_qos_0_does_not_end_earlier_redeliveries() -> None:
    """Redeliveries precede new messages only at QoS 1; a job would have run twice."""
    bench = Bench()
    bench.acknowledged(message("a"))
    assert bench.acknowledged(message("q", 2, qos=0)) == {"a"}
    assert bench.acknowledged(message("a", 2, dup=True)) == {"a"}
    assert bench.acknowledged(message("b", 2)) == {"a", "b"}
