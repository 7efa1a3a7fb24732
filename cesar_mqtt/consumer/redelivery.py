"""Repeats: which requests the broker may still send again; for the intake, in its thread.

A request without an id is known again by its packet id (see `Register`), as long as it can come again. Packet ids are
used again, by some brokers at once, so a request that is taken for the repetition of an old one would be lost.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from cesar_mqtt.consumer.incoming import IncomingMessage
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.mqtt.receive_buffer import Settled


class Marks(Protocol):
    """Where it is kept which jobs have a packet id by which they are known again: the ledger."""

    def settle_deliveries(self, job_ids: Collection[str]) -> None:
        """Take nothing for a redelivery of these any more."""

    def forget_deliveries(self, *, but: Collection[str] = ()) -> None:
        """Take nothing for a redelivery of any, but of these."""


class Repeats:
    """What has been acknowledged, and how much of that the broker is known to have heard.

    Three things end the time in which a message may come again:

    - The broker has acknowledged what was published behind our own acknowledgement: so that has arrived.
    - On a later connection something new has come: what has to be sent again is sent before that (MQTT 5, section 4.4).
    - The broker has begun a new session.
    """

    def __init__(self, marks: Marks) -> None:
        """Begin with a ledger that may know marks of an earlier process."""
        self._marks = marks
        self._session = 0
        self._connection = 0
        self._acknowledged = 0
        self._unproven: deque[tuple[int, str]] = deque()
        """What was acknowledged by this connection: at which place, and the job."""
        self._renewed = 0
        """The last connection by which something new has come."""

    def learn(self, settled: Settled) -> None:
        """Take note of how much the broker has heard; before what was received until then is judged."""
        if settled.session > self._session:
            self._session = settled.session
            self._unproven.clear()
            self._marks.forget_deliveries()
        heard = settled.heard.get(self._connection, 0)
        proven = []
        while self._unproven and self._unproven[0][0] <= heard:
            proven.append(self._unproven.popleft()[1])
        if proven:
            self._marks.settle_deliveries(proven)

    def can_repeat(self, delivery: Delivery) -> bool:
        """Whether the session by which a message came goes on."""
        return delivery.receipt.connection >= self._session

    def acknowledged(self, plans: Sequence[IncomingMessage], job_ids: Iterable[str] = ()) -> None:
        """Take note of what was acknowledged, in that order; ids of the jobs of those plans that have one."""
        ids, renewed = iter(job_ids), self._renewed
        for plan in plans:
            delivery, job_id = plan.delivery, None if plan.job is None else next(ids)
            self._count(delivery)
            if plan.job is None or job_id is None or not delivery.qos:
                continue
            if plan.job.packet_id is not None:
                self._unproven.append((self._acknowledged, job_id))
            if not delivery.dup and not delivery.retain:
                renewed = delivery.receipt.connection
        if renewed > self._renewed:
            self._renewed = renewed
            self._marks.forget_deliveries(but={job_id for _, job_id in self._unproven})

    def _count(self, delivery: Delivery) -> None:
        if delivery.receipt.connection > self._connection:
            self._connection, self._acknowledged = delivery.receipt.connection, 0
            self._unproven.clear()
        self._acknowledged += delivery.qos == 1
