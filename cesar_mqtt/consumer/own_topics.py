"""The retained topics about the consumer itself, and which of them the broker has; for the publisher's thread."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Topic:
    """One topic: the newest payload, and whether the broker has it."""

    payload: bytes
    version: int = 0
    published: int = -1
    sent: int = -1
    """The version that is on its way."""
    retained: tuple[tuple[int, bytes], ...] = ()
    """What the broker may retain, by version: what it has acknowledged last, and what was sent since."""


class OwnTopics:
    """The newest payload of each topic, by the topic's last level; by the whole of it where it is not our own."""

    def __init__(self) -> None:
        """Start with none."""
        self._topics: dict[str, _Topic] = {}

    def retain(self, name: str, payload: bytes) -> None:
        """Let the broker retain `payload`, or nothing if it is empty; nothing is due if that is so already."""
        topic = self._topics.setdefault(name, _Topic(payload))
        if topic.payload != payload:
            topic.payload = payload
            topic.version += 1

    def due(self) -> Iterator[tuple[str, bytes, int]]:
        """Yield what has to be sent: name, payload, and the version to say in `acknowledge`; counts as sent."""
        for name, topic in self._topics.items():
            if topic.version not in (topic.published, topic.sent):
                topic.sent = topic.version
                topic.retained = (*topic.retained, (topic.version, topic.payload))
                yield name, topic.payload, topic.version

    def acknowledge(self, name: str, version: int) -> None:
        """Note that the broker has what was sent."""
        topic = self._topics[name]
        topic.published = max(topic.published, version)
        topic.retained = tuple(sent for sent in topic.retained if sent[0] >= topic.published)

    @property
    def settled(self) -> bool:
        """Whether the broker has everything."""
        return all(topic.published == topic.version for topic in self._topics.values())

    def interrupt(self) -> None:
        """Note that what is on its way will not be acknowledged."""
        for topic in self._topics.values():
            topic.sent = -1

    def say_again(self, *names: str) -> None:
        """Let these be sent again, or all of them when none is named, although the broker may have them.

        Not what was withdrawn: Home Assistant logs a withdrawal of what it does not know.
        """
        for name in names or tuple(self._topics):
            if name in self._topics and self._topics[name].payload:
                self._topics[name].published = self._topics[name].sent = -1

    def retained(self, name: str) -> tuple[bytes, ...]:
        """Return what the broker may retain, as far as is known here; empty: nothing is known."""
        return tuple(payload for _, payload in self._topics[name].retained) if name in self._topics else ()

    def forget_retained(self) -> None:
        """Note that nothing is known any more of what the broker retains."""
        for topic in self._topics.values():
            topic.retained = ()
