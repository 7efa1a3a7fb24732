"""The messages that are not retained and wait until they can be sent; for the publisher's thread."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

MOST = 10_000
MOST_BYTES = 16 << 20
_WARN_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class TransientMessage:
    """A message that is not retained: whoever listens now hears it.

    Attributes:
        keep: whether it is said later when there is no connection now, or the connection is lost before its PUBACK.
    """

    topic: str
    payload: bytes
    keep: bool = True
    correlation_data: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """About how much memory it takes."""
        return len(self.topic) + len(self.payload) + len(self.correlation_data or b"")


class TransientMessages:
    """Notes in their order: at most 10,000, and 16 MiB of them, except that one always fits. The oldest give way."""

    def __init__(self, *, monotonic: Callable[[], float]) -> None:
        """Start with none; `monotonic` is the clock, in seconds."""
        self._monotonic = monotonic
        self._waiting: deque[TransientMessage] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._warn_at = -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def first(self) -> TransientMessage:
        """The one whose turn it is; there has to be one."""
        return self._waiting[0]

    def add(self, note: TransientMessage) -> None:
        """Let a note wait behind all others."""
        self._waiting.append(note)
        self._waiting_bytes += note.size_bytes
        while len(self) > MOST or (self._waiting_bytes > MOST_BYTES and len(self) > 1):
            self.drop_first()
            self._dropped += 1

    def drop_first(self) -> None:
        """Let the first one wait no longer."""
        self._waiting_bytes -= self._waiting.popleft().size_bytes

    def interrupt(self, lost: Iterable[TransientMessage]) -> None:
        """Take note that the connection is lost, and with it these, which are before all others."""
        notes = (*lost, *self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        for note in notes:
            if note.keep:
                self.add(note)

    def warn(self) -> None:
        """Say how many had to give way, now and then."""
        if self._dropped and self._monotonic() >= self._warn_at:
            message = "More is to be said than can be sent: the %d oldest answers, refusals and segments were dropped."
            log.warning(message, self._dropped, action="notes_dropped")
            self._dropped = 0
            self._warn_at = self._monotonic() + _WARN_EVERY_S
