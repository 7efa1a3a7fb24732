"""Which requests the broker may still deliver again; for the intake's thread.

A request without an id is recognised by its packet id when it is delivered again. Brokers use packet ids again, some at
once, so a new request must not be taken for the redelivery of an old one: it would be lost.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from cesar_mqtt.consumer.incoming import IncomingMessage
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.mqtt.messages import Delivery
from cesar_mqtt.mqtt.receive_buffer import RedeliveryBounds


class RedeliveryTracker:
    """The acknowledged requests, and which of those acknowledgements the broker has received for certain.

    Three events prove that a request cannot be delivered again, and make the ledger release its packet id:

    - The broker has acknowledged a message that was published behind our acknowledgement, so it has read that, too.
    - On a later connection a new message has arrived: all redeliveries precede it (MQTT 5, section 4.4).
    - The broker has begun a new session.
    """

    def __init__(self, ledger: Ledger) -> None:
        """Start with a ledger that may hold packet ids of an earlier process."""
        self._ledger = ledger
        self._session = 0
        self._connection = 0
        self._acks_sent = 0
        self._unproven: deque[tuple[int, str]] = deque()
        """The acknowledgements of this connection, by number, with their jobs."""
        self._newest_connection = 0
        """The last connection on which a new message has arrived."""

    def update(self, bounds: RedeliveryBounds) -> None:
        """Release packet ids, before messages that were received up to now are parsed."""
        if bounds.session > self._session:
            self._session = bounds.session
            self._unproven.clear()
            self._ledger.release_all_packet_ids()
        received = bounds.acks_received.get(self._connection, 0)
        proven = []
        while self._unproven and self._unproven[0][0] <= received:
            proven.append(self._unproven.popleft()[1])
        if proven:
            self._ledger.release_packet_ids(proven)

    def on_acknowledged(self, messages: Sequence[IncomingMessage], job_ids: Iterable[str] = ()) -> None:
        """Record which messages were acknowledged, in that order; `job_ids` are those of the messages with a job."""
        ids, newest_connection = iter(job_ids), self._newest_connection
        for message in messages:
            delivery, job_id = message.delivery, None if message.job is None else next(ids)
            self._count(delivery)
            if message.job is None or job_id is None or not delivery.qos:
                continue
            if message.job.packet_id is not None:
                self._unproven.append((self._acks_sent, job_id))
            if not delivery.dup and not delivery.retain:
                newest_connection = delivery.receipt.connection
        if newest_connection > self._newest_connection:
            self._newest_connection = newest_connection
            self._ledger.release_all_packet_ids(keep={job_id for _, job_id in self._unproven})

    def _count(self, delivery: Delivery) -> None:
        if delivery.receipt.connection > self._connection:
            self._connection, self._acks_sent = delivery.receipt.connection, 0
            self._unproven.clear()
        self._acks_sent += delivery.qos == 1
