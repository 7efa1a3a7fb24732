"""What comes in over MQTT, on its way from the network thread to whoever fetches it.

`ReceiveBuffer` is the one place where the two threads meet: the network thread puts, one other thread takes.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cesar_mqtt.logs import get_logger
from cesar_mqtt.mqtt.messages import Delivery

log = get_logger(__name__)

_WARN_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Settled:
    """What the broker need not send again.

    Attributes:
        session: the connection at which the broker began the session that it has now; what came by an earlier one, it
            does not remember. 0: it has had the session from before.
        heard: by connection, how many of our acknowledgements at QoS 1 it is known to have.
    """

    session: int = 0
    heard: Mapping[int, int] = field(default_factory=dict)


class ReceiveBuffer:
    """The messages that were not fetched yet: bounded in number and bytes, except that one message always fits.

    Args:
        max_messages: how many may wait.
        max_bytes: how much memory they may take together, with their properties.
        on_room: called, by the thread that took, when there is room again where `put` found none; must not block.
    """

    def __init__(self, max_messages: int, max_bytes: int, *, on_room: Callable[[], None]) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._on_room = on_room
        self._changed = threading.Condition()
        self._waiting: list[Delivery] = []
        self._waiting_bytes = 0
        self._session = 0
        self._heard: dict[int, int] = {}
        self._closed = False
        self._short = False
        self._dropped = 0
        self._warn_at = 0.0

    def put(self, delivery: Delivery) -> bool:
        """Add one; False: there is no room, and nothing was kept of it. Without room QoS 0 is dropped, which is True.

        The receive maximum of MQTT 5 should prevent that, but it counts no bytes, and mosquitto 2.0.11 sends more than
        it was told to. After `close` nothing is added; of QoS 1 nothing is lost by that, for it is not acknowledged.
        """
        with self._changed:
            if self._closed:
                return True
            size_bytes = delivery.size_bytes
            if not self._has_room(size_bytes):
                if delivery.qos:
                    self._short = True
                    return False
                self._drop()
                return True
            self._waiting.append(delivery)
            self._waiting_bytes += size_bytes
            if len(self._waiting) == 1:  # whoever takes, takes all: only the first has to wake it
                self._changed.notify_all()
            return True

    def take(self, timeout_s: float | None) -> list[Delivery]:
        """Take all there is, in order; empty: nothing came in that time, or closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting, timeout_s)
            if self._closed:
                return []
            taken, self._waiting, self._waiting_bytes = self._waiting, [], 0
            short, self._short = self._short, False
        if short:
            self._on_room()
        return taken

    def begin_session(self, connection: int) -> None:
        """Take note that the broker has begun a new session, before anything that comes by it."""
        with self._changed:
            self._session = connection

    def hear(self, connection: int, count: int) -> None:
        """Take note that the broker has so many of our acknowledgements."""
        with self._changed:
            self._heard[connection] = count

    def take_settled(self) -> Settled:
        """Take what was noted since the last call; holds for all that `take` has returned before."""
        with self._changed:
            heard, self._heard = self._heard, {}
            return Settled(self._session, heard)

    def close(self) -> None:
        """Wake whoever waits; nothing goes in or comes out any more."""
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
            message = "More comes in than is taken: %d messages of QoS 0 were dropped. QoS 1 would have waited."
            log.warning(message, self._dropped, action="messages_dropped")
            self._dropped = 0
            self._warn_at = time.monotonic() + _WARN_EVERY_S
