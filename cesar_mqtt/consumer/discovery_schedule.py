"""When discovery messages are published to Home Assistant, and which of an earlier start are withdrawn.

`DiscoverySchedule` is for the publisher's thread, `AnnouncedTopics` for the main thread.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cesar_mqtt.consumer.own_topics import OwnTopics
from cesar_mqtt.ledger.fsync import Disk
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_BIRTH_DELAY_S = (0.2, 3.0)
"""After a birth message: all devices of a house answer to it, and should not do so at the same moment."""
_WITHDRAWAL_S = 3.0
"""The time Home Assistant needs to remove withdrawn entities. A message with the same ids has to wait for that: it
drops the rest of a device's message if the first entity is still being removed."""


class DiscoverySchedule:
    """Adds the discovery messages to the consumer's own topics when they are due.

    They are published at each connection and after each birth message, although the broker may retain them: Home
    Assistant ignores what it knows, and a device that a user has removed there appears again.
    """

    def __init__(
        self,
        own_topics: OwnTopics,
        *,
        monotonic: Callable[[], float],
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Start without messages.

        Args:
            own_topics: where the messages go, named by their full topics.
            monotonic: the clock, in seconds.
            spread: returns a number between two.
        """
        self._own_topics = own_topics
        self._monotonic = monotonic
        self._spread = spread
        self._messages: Mapping[str, bytes] = {}
        self._stale: tuple[str, ...] = ()
        self._due: float | None = None

    def announce(self, messages: Mapping[str, bytes], *, stale: Iterable[str] = ()) -> None:
        """Publish these messages, by topic, from the next connection on, and clear the stale topics once."""
        self._messages = messages
        self._stale = tuple(stale)

    def on_connected(self) -> None:
        for topic in self._stale:
            self._own_topics.retain(topic, b"")
        if self._messages:
            self._due = self._monotonic() + (_WITHDRAWAL_S if self._stale else 0.0)
        self._stale = ()

    def on_birth_message(self) -> None:
        """Home Assistant has started."""
        if self._messages and self._due is None:
            self._due = self._monotonic() + self._spread(*_BIRTH_DELAY_S)

    def run_once(self) -> None:
        """Publish the messages if they are due, and the consumer's state with them."""
        if self._due is None or self._monotonic() < self._due:
            return
        self._due = None
        for topic, payload in self._messages.items():
            self._own_topics.retain(topic, payload)
        self._own_topics.republish("state", *self._messages)

    def waits_s(self) -> list[float]:
        """Return the seconds until the messages are due; empty: they are not."""
        return [] if self._due is None else [self._due - self._monotonic()]


class AnnouncedTopics:
    """The discovery topics that this consumer has used and not withdrawn, in a small file in the data directory.

    After a change of the mode, the discovery prefix or the name it lists what to withdraw: Home Assistant warns of a
    withdrawal of what it does not know, so clearing all possible topics is not an option. A file that cannot be read or
    written does not stop the consumer: stale topics then stay until `discovery remove`.
    """

    def __init__(self, path: Path, *, disk: Disk | None = None) -> None:
        """The file may be missing."""
        self._path = path
        self._disk = disk or Disk()
        self._topics: frozenset[str] | None = None
        """None: `record` was not called."""

    def record(self, topics: Iterable[str]) -> frozenset[str]:
        """Record on disk that these topics are used from now on, and return the others, which are stale."""
        self._topics = frozenset(topics)
        before = self._read()
        self._write(before | self._topics)
        return before - self._topics

    def remove_stale(self) -> None:
        """Record that the stale topics have been cleared."""
        if self._topics is not None:
            self._write(self._topics)

    def _read(self) -> frozenset[str]:
        try:
            document = json.loads(self._path.read_bytes())
            return frozenset(str(topic) for topic in document["topics"])
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, KeyError, TypeError) as exc:
            message = "%s cannot be read (%s): an earlier announcement to Home Assistant may stay"
            log.warning(message, self._path.name, exc, action="announced")
            return frozenset()

    def _write(self, topics: frozenset[str]) -> None:
        if topics == self._read():
            return
        try:
            self._disk.put(self._path, [json.dumps({"topics": sorted(topics)}, indent=1).encode()])
        except OSError as exc:
            message = "%s cannot be written (%s): after a change of the discovery settings an old entry may stay"
            log.warning(message, self._path.name, exc.strerror, action="announced")
