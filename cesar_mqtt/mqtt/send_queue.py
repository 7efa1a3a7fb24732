"""Outgoing messages from `publish` to their PUBACK: waiting, in flight, acknowledged.

`publish` is for any thread, one at a time; all else is for the network thread.
"""

from collections import deque
from typing import Protocol

from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.codec import encode_publish
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, PacketTooLargeError, Publication, PublishTicket, Refusal

log = get_logger(__name__)

MAX_IN_FLIGHT = 20
"""Unacknowledged messages at most, as mosquitto asks for; further ones wait."""

_MAX_WAITING = 60_000
"""Fewer than there are packet ids, so that one is always free."""
_MAX_PACKET_ID = 65_535


class PacketSink(Protocol):
    """Where packets go: a `BufferedSocket`."""

    @property
    def has_unsent(self) -> bool:
        """Whether some packets have not been written yet."""

    def send(self, buffer: bytes) -> object:
        """Take a packet to be written."""


class SendQueue:
    """The outgoing messages of one connection, in the order of `publish`.

    Attributes:
        max_in_flight: how many messages may be in flight.
        limit_bytes: the largest packet that the broker accepts.
        has_refused: whether the last PUBACK was a refusal.
        acks_received: how many of our own acknowledgements the broker has received for certain: it reads in order, and
            has acknowledged a message that was sent behind them.
    """

    def __init__(self, connection: int, *, five: bool, limit_bytes: int | None) -> None:
        """Start empty; `five`: the connection speaks MQTT 5."""
        self.max_in_flight = MAX_IN_FLIGHT
        self.limit_bytes = limit_bytes or MAX_PACKET_BYTES
        self.acks_received = 0
        self.has_refused = False
        self._connection = connection
        self._five = five
        self._mid = 0
        self._waiting: deque[tuple[PublishTicket, Publication, bytes]] = deque()
        self._in_flight: dict[int, tuple[PublishTicket, Publication, int]] = {}
        self._unwritten: list[PublishTicket] = []
        self._published: list[tuple[PublishTicket, Refusal | None]] = []
        self._unrouted: list[PublishTicket] = []

    @property
    def has_waiting(self) -> bool:
        """Whether a message has not been sent yet."""
        return bool(self._waiting)

    def publish(self, publication: Publication) -> PublishTicket | None:
        """Enqueue a message; None: the queue is full (60,000 messages).

        Raises:
            PacketTooLargeError: the packet exceeds the broker's limit.
        """
        mid = self._free_packet_id()
        packet = encode_publish(publication, mid, five=self._five)
        if len(packet) > self.limit_bytes:
            raise PacketTooLargeError(len(packet), self.limit_bytes)
        if len(self._waiting) >= _MAX_WAITING:
            return None
        self._mid = mid
        ticket = PublishTicket(self._connection, mid)
        self._waiting.append((ticket, publication, packet))
        return ticket

    def send(self, sink: PacketSink, *, acks_sent: int = 0) -> None:
        """Send as many messages as may be in flight, after `acks_sent` acknowledgements on this connection."""
        while self._waiting and self._may_be_in_flight(self._waiting[0][1]):
            ticket, publication, packet = self._waiting.popleft()
            if publication.qos:
                self._in_flight[ticket.mid] = ticket, publication, acks_sent
            else:
                self._unwritten.append(ticket)
            sink.send(packet)

    def _may_be_in_flight(self, publication: Publication) -> bool:
        in_flight = self._in_flight
        if not in_flight:
            return True
        if publication.alone or len(in_flight) >= self.max_in_flight:
            return False
        return not (len(in_flight) == 1 and next(iter(in_flight.values()))[1].alone)

    def on_flushed(self, sink: PacketSink) -> None:
        """Count messages of QoS 0 as published once everything is written."""
        if self._unwritten and not sink.has_unsent:
            self._published += [(ticket, None) for ticket in self._unwritten]
            self._unwritten.clear()

    def on_acknowledged(self, mid: int, refusal: Refusal | None, *, unrouted: bool = False) -> None:
        """Handle a PUBACK: of a refused message, one that no subscription matched (`unrouted`), or one that arrived."""
        if mid not in self._in_flight:
            return
        ticket, publication, acks_sent = self._in_flight.pop(mid)
        self.acks_received = max(self.acks_received, acks_sent)
        self.has_refused = refusal is not None
        if refusal is not None:
            log.warning("The broker refused a message on %s: %s", publication.topic, refusal, action="publish_refused")
        if unrouted:
            self._unrouted.append(ticket)
        self._published.append((ticket, refusal))

    def take_unrouted(self) -> list[PublishTicket]:
        """Return those of the accepted messages that no subscription matched (MQTT 5), since the last call."""
        unrouted, self._unrouted = self._unrouted, []
        return unrouted

    @property
    def unacknowledged(self) -> tuple[PublishTicket, ...]:
        """The messages that are in flight, oldest first."""
        return tuple(ticket for ticket, _, _ in self._in_flight.values())

    @property
    def oldest_in_flight(self) -> tuple[PublishTicket, str] | None:
        """The message that the broker has to acknowledge next, with its topic (MQTT 5, section 4.6); None: none is."""
        for ticket, publication, _ in self._in_flight.values():
            return ticket, publication.topic
        return None

    def take_published(self) -> list[tuple[PublishTicket, Refusal | None]]:
        """Return the messages that the broker has accepted (None) or refused since the last call."""
        published, self._published = self._published, []
        return published

    def _free_packet_id(self) -> int:
        """Return the next packet id that no message has.

        The waiting messages have the newest ids, and are 5,000 fewer than there are ids: those are never reached.
        """
        mid = self._mid % _MAX_PACKET_ID + 1
        while mid in self._in_flight:  # unacknowledged since the last time round
            mid = mid % _MAX_PACKET_ID + 1
        return mid
