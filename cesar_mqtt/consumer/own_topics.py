"""The retained topics about the consumer itself: the newest payload of each, what the broker has, and the activity.

For the publisher's thread, except `ActivityTracker.set_degraded`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from cesar_mqtt.jobs import Totals
from cesar_mqtt.protocol.consumer_payloads import Activity


@dataclass(slots=True)
class _Topic:
    payload: bytes
    version: int = 0
    acknowledged: int = -1
    """The newest version that the broker has acknowledged; -1: none."""
    in_flight: int = -1
    """The version that is in flight; -1: none."""
    retained: tuple[tuple[int, bytes], ...] = ()
    """What the broker may retain, by version: the newest that it has acknowledged, and those that were sent since."""


class OwnTopics:
    """The newest payload of each topic.

    Topics are named by their last level, such as `queue`; foreign ones, such as those of Home Assistant, by their full
    name.
    """

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}

    def retain(self, name: str, payload: bytes) -> None:
        """Have the broker retain `payload`, or nothing if it is empty; an unchanged payload is not sent again."""
        topic = self._topics.setdefault(name, _Topic(payload))
        if topic.payload != payload:
            topic.payload = payload
            topic.version += 1

    def take_due(self, *, without: Collection[str] = ()) -> Iterator[tuple[str, bytes, int]]:
        """Yield what has to be sent: name, payload, and the version for `acknowledge`. It counts as in flight then.

        `state` comes last: who sees `online` has the activity of this start then, and not the one before the last stop.
        """
        for name, topic in sorted(self._topics.items(), key=lambda item: item[0] == "state"):
            if name not in without and topic.version not in (topic.acknowledged, topic.in_flight):
                topic.in_flight = topic.version
                topic.retained = (*topic.retained, (topic.version, topic.payload))
                yield name, topic.payload, topic.version

    def acknowledge(self, name: str, version: int) -> None:
        topic = self._topics[name]
        topic.acknowledged = max(topic.acknowledged, version)
        topic.retained = tuple(sent for sent in topic.retained if sent[0] >= topic.acknowledged)

    def is_acknowledged(self, without: Collection[str] = ()) -> bool:
        """Whether the broker has the newest payload of every topic, `without` these."""
        return all(topic.acknowledged == topic.version for name, topic in self._topics.items() if name not in without)

    def on_disconnected(self) -> None:
        """Nothing that is in flight will be acknowledged."""
        for topic in self._topics.values():
            topic.in_flight = -1

    def republish(self, *names: str) -> None:
        """Send these topics again, or all if none is named, although the broker may have them.

        Withdrawn topics (empty payload) are left out: Home Assistant warns of a withdrawal of what it does not know.
        """
        for name in names or tuple(self._topics):
            if name in self._topics and self._topics[name].payload:
                self._topics[name].acknowledged = self._topics[name].in_flight = -1

    def retained(self, name: str) -> tuple[bytes, ...]:
        """Return what the broker may retain on a topic, as far as this process knows; empty: nothing is known."""
        return tuple(payload for _, payload in self._topics[name].retained) if name in self._topics else ()

    def forget_retained(self) -> None:
        """Assume nothing any more about what the broker retains."""
        for topic in self._topics.values():
            topic.retained = ()


class ActivityTracker:
    """What the consumer is doing, as one word: a stop, a failing disk or a pause takes precedence over the worker.

    Attributes:
        worker: what the worker does.
        draining: whether no further job is started.
    """

    def __init__(self) -> None:
        self.worker: Activity = "starting"
        self.draining = False
        self._degraded: set[str] = set()

    def set_degraded(self, thread: str, *, on: bool) -> bool:
        """Record whether the disk refuses the writes of a thread, and return whether that has changed.

        Each name is for one thread.
        """
        if on == (thread in self._degraded):
            return False
        (self._degraded.add if on else self._degraded.discard)(thread)
        return True

    def current(self, totals: Totals) -> Activity:
        if self.draining:
            return "draining"
        if self._degraded:
            return "degraded"
        if self.worker not in ("idle", "processing"):
            return self.worker
        # The ledger knows of a job before the worker reports it, and between two jobs the consumer is not idle.
        if totals.processing or (self.worker == "processing" and totals.queued and not totals.paused):
            return "processing"
        return "paused" if totals.paused else "idle"
