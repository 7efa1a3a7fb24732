"""The messages that are on their way to the broker and not yet acknowledged; for the publisher's thread."""

from collections import Counter
from collections.abc import Collection, Hashable
from typing import NamedTuple

from cesar_mqtt.consumer.transient_messages import TransientMessage

MOST = 200
"""How many at most; keeps the client's own queue short."""


class PendingAck(NamedTuple):
    """What a ticket stands for: a job's status or result, one of the consumer's own topics, or a note.

    A message that is one of several (a result before its status, say) bears no number: brokers acknowledge in the
    order in which they were told (MQTT 5, section 4.6), so the acknowledgement of the last one speaks for all.
    """

    seq: int | None = None
    number: int = 0
    gone: bool = False
    topic: str | None = None
    note: TransientMessage | None = None


class InFlight:
    """Messages by the tickets that the client gave for them."""

    def __init__(self) -> None:
        """Start with none."""
        self._sent: dict[Hashable, PendingAck] = {}
        self._telling: Counter[int] = Counter()
        self._clearing: set[int] = set()

    def __len__(self) -> int:
        """How many there are; any thread may ask."""
        return len(self._sent)

    @property
    def room(self) -> int:
        """How many more may be sent."""
        return MOST - len(self._sent)

    @property
    def telling(self) -> Collection[int]:
        """The jobs whose status is on its way, by `seq`."""
        return self._telling

    @property
    def clearing(self) -> Collection[int]:
        """The deleted jobs whose topics are being cleared, by `seq`."""
        return self._clearing

    def add(self, ticket: Hashable, sent: PendingAck) -> None:
        """Take note of what was handed to the client."""
        self._sent[ticket] = sent
        if sent.seq is None:
            return
        if sent.gone:
            self._clearing.add(sent.seq)
        elif sent.number:
            self._telling[sent.seq] += 1

    def acknowledge(self, ticket: Hashable) -> PendingAck | None:
        """Take note of a PUBACK and return what it is for; None: for nothing, or for a connection that was lost."""
        sent = self._sent.pop(ticket, None)
        if sent is None or sent.seq is None:
            return sent
        if sent.gone:
            self._clearing.discard(sent.seq)
        elif sent.number:
            self._telling[sent.seq] -= 1
            if not self._telling[sent.seq]:
                del self._telling[sent.seq]
        return sent

    def interrupt(self) -> list[TransientMessage]:
        """Take note that nothing will be acknowledged any more; return the notes that were on their way, in order."""
        lost = [sent.note for sent in self._sent.values() if sent.note is not None]
        self._sent.clear()
        self._telling.clear()
        self._clearing.clear()
        return lost
