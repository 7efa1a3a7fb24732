"""Incoming messages between the network thread, which puts them in, and the one thread that takes them."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery

log = get_logger(__name__)

_WARN_EVERY_S = 10.0
"""Between two warnings of dropped messages."""


@dataclass(frozen=True, slots=True)
class RedeliveryBounds:
    """Which messages the broker cannot deliver again.

    Attributes:
        session: the number of the connection at which the broker began its present session: it has forgotten what
            arrived by an earlier one. 0: the session is older than the first connection.
        acks_received: by connection, how many of our acknowledgements at QoS 1 the broker has received for certain.
    """

    session: int = 0
    acks_received: Mapping[int, int] = field(default_factory=dict)


class ReceiveBuffer:
    """The messages that have not been taken yet, bounded in number and bytes, except that one message always fits.

    Args:
        max_messages: how many messages may wait.
        max_bytes: how much memory they may use together, including their properties.
        on_room: called by the taking thread when there is room again after `put` has returned False; must not block.
    """

    def __init__(self, max_messages: int, max_bytes: int, *, on_room: Callable[[], None]) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._on_room = on_room
        self._changed = threading.Condition()
        self._waiting: list[Delivery] = []
        self._waiting_bytes = 0
        self._session = 0
        self._acks_received: dict[int, int] = {}
        self._closed = False
        self._room_is_wanted = False
        self._dropped = 0
        self._warn_at = 0.0

    def put(self, delivery: Delivery) -> bool:
        """Add a message; False: there is no room for it, and the caller has to hold it back.

        Without room a message of QoS 0 is dropped, and the result is True. The receive maximum of MQTT 5 should prevent
        that, but it counts no bytes, and mosquitto 2.0.11 exceeds it. After `close` nothing is added and the result is
        True; no message of QoS 1 is lost by that, since it is not acknowledged.
        """
        with self._changed:
            if self._closed:
                return True
            size_bytes = delivery.size_bytes
            if not self._has_room(size_bytes):
                if delivery.qos:
                    self._room_is_wanted = True
                    return False
                self._drop()
                return True
            self._waiting.append(delivery)
            self._waiting_bytes += size_bytes
            if len(self._waiting) == 1:  # `take` takes all: only the first message has to wake it
                self._changed.notify_all()
            return True

    def take(self, timeout_s: float | None) -> list[Delivery]:
        """Take all messages, in order; empty: none arrived in time, or the buffer is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting, timeout_s)
            if self._closed:
                return []
            taken, self._waiting, self._waiting_bytes = self._waiting, [], 0
            wanted, self._room_is_wanted = self._room_is_wanted, False
        if wanted:
            self._on_room()
        return taken

    def start_session(self, connection: int) -> None:
        """Record that the broker began a new session, before any message of it is put in."""
        with self._changed:
            self._session = connection

    def set_acks_received(self, connection: int, count: int) -> None:
        """Record how many of our acknowledgements the broker has received."""
        with self._changed:
            self._acks_received[connection] = count

    def take_redelivery_bounds(self) -> RedeliveryBounds:
        """Return what was recorded since the last call; it is valid for all that `take` has returned before."""
        with self._changed:
            received, self._acks_received = self._acks_received, {}
            return RedeliveryBounds(self._session, received)

    def close(self) -> None:
        """Wake the taking thread; from now on nothing is added or taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._on_room()

    def _has_room(self, size_bytes: int) -> bool:
        return not self._waiting or (
            len(self._waiting) < self._max_messages and self._waiting_bytes + size_bytes <= self._max_bytes
        )

    def _drop(self) -> None:
        self._dropped += 1
        if time.monotonic() >= self._warn_at:
            message = "Receive buffer full: dropped %d messages of QoS 0. Publish with QoS 1 to have them wait."
            log.warning(message, self._dropped, action="messages_dropped")
            self._dropped = 0
            self._warn_at = time.monotonic() + _WARN_EVERY_S
