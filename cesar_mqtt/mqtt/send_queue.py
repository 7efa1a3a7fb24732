"""What was published, from its taking to its PUBACK: what waits, what is in flight, what the broker has.

`publish` is for any thread, one at a time; all else is for the network thread.
"""

from collections import deque
from typing import Protocol

from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.codec import write_publish
from cesar_mqtt.mqtt.messages import MAX_PACKET_BYTES, PacketTooLargeError, Publication, PublishTicket

log = get_logger(__name__)

IN_FLIGHT = 20
"""Published and not yet acknowledged, at most: what mosquitto asks for. The others wait."""

_MOST_WAITING = 60_000
_MOST_PACKET_ID = 65_535


class Sink(Protocol):
    """Where packets go."""

    @property
    def unsent(self) -> bool:
        """Whether some of them are still to be written."""

    def send(self, buffer: bytes) -> object:
        """Take a packet."""


class SendQueue:
    """The messages of one connection on their way to the broker, in the order of `publish`.

    Attributes:
        window: how many may be in flight.
        limit_bytes: the largest packet that the broker takes.
        heard: how much of what was sent before, as the caller of `send` counts it, the broker is known to have read: it
            reads in order, and has acknowledged what came behind.
    """

    def __init__(self, connection: int, *, five: bool, limit_bytes: int | None) -> None:
        """Begin a connection; `five`: it speaks MQTT 5."""
        self.window = IN_FLIGHT
        self.limit_bytes = limit_bytes or MAX_PACKET_BYTES
        self.heard = 0
        self._connection = connection
        self._five = five
        self._mid = 0
        self._waiting: deque[tuple[PublishTicket, Publication, bytes]] = deque()
        self._in_flight: dict[int, tuple[PublishTicket, str, int]] = {}
        self._written: list[PublishTicket] = []
        self._published: list[tuple[PublishTicket, str | None]] = []

    @property
    def waits(self) -> bool:
        """Whether there is something that was not sent yet."""
        return bool(self._waiting)

    def publish(self, publication: Publication) -> PublishTicket | None:
        """Take a message; None: 60,000 wait already.

        Raises:
            PacketTooLargeError: it is over the broker's limit.
        """
        mid = self._free_packet_id()
        packet = write_publish(publication, mid, five=self._five)
        if len(packet) > self.limit_bytes:
            raise PacketTooLargeError(len(packet), self.limit_bytes)
        if len(self._waiting) >= _MOST_WAITING:
            return None
        self._mid = mid
        ticket = PublishTicket(self._connection, mid)
        self._waiting.append((ticket, publication, packet))
        return ticket

    def send(self, sink: Sink, *, behind: int = 0) -> None:
        """Send what the window lets through, behind so many others."""
        while self._waiting and len(self._in_flight) < self.window:
            ticket, publication, packet = self._waiting.popleft()
            if publication.qos:
                self._in_flight[ticket.mid] = ticket, publication.topic, behind
            else:
                self._written.append(ticket)
            sink.send(packet)

    def note_written(self, sink: Sink) -> None:
        """Take note that what was sent at QoS 0 is written, if it is."""
        if self._written and not sink.unsent:
            self._published += [(ticket, None) for ticket in self._written]
            self._written.clear()

    def settle(self, mid: int, reason: str | None) -> None:
        """Take note of a PUBACK; with a reason, the broker refused the message."""
        ticket, topic, behind = self._in_flight.pop(mid, (None, "", 0))
        if ticket is None:
            return
        self.heard = max(self.heard, behind)
        if reason is not None:
            log.warning("The broker refused a message on %s: %s", topic, reason, action="publish_refused")
        self._published.append((ticket, reason))

    def take_published(self) -> list[tuple[PublishTicket, str | None]]:
        """Return what the broker has taken, or refused with a reason, since the last call."""
        published, self._published = self._published, []
        return published

    def _free_packet_id(self) -> int:
        """Return the next packet id that nothing has.

        What waits has the ids that were given out last, and is 5,000 short of all there are: those are not reached.
        """
        mid = self._mid % _MOST_PACKET_ID + 1
        while mid in self._in_flight:  # not acknowledged since the last time round
            mid = mid % _MOST_PACKET_ID + 1
        return mid
