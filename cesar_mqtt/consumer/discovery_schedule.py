"""When the consumer announces itself to Home Assistant, and when it withdraws what it announced otherwise before.

For the publisher's thread.
"""

import random
from collections.abc import Callable, Iterable, Mapping

from cesar_mqtt.consumer.own_topics import OwnTopics

_SPREAD_S = (0.2, 3.0)
"""After its birth message: everything in a house answers to it, and need not do so at the same moment."""
_WITHDRAWN_S = 3.0
"""What is announced again under the same ids has to wait until what was withdrawn is gone: Home Assistant loses the
rest of a device's message whose first entity it is still removing."""


class DiscoverySchedule:
    """Puts the discovery messages among the consumer's own topics when it is time.

    They are said at each connection and after each birth message, although the broker may have them: Home Assistant
    passes over what it knows, and a device that a user has removed there comes back.
    """

    def __init__(
        self,
        own: OwnTopics,
        *,
        monotonic: Callable[[], float],
        spread: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Wire it; there is nothing to announce yet.

        Args:
            own: where the messages go, under their whole topics.
            monotonic: the clock, in seconds.
            spread: gives a number between two.
        """
        self._own = own
        self._monotonic = monotonic
        self._spread = spread
        self._messages: Mapping[str, bytes] = {}
        self._stale: tuple[str, ...] = ()
        self._due: float | None = None

    def announce(self, messages: Mapping[str, bytes], *, stale: Iterable[str] = ()) -> None:
        """Announce these, by topic, from the next connection on; once, what is retained on the stale topics goes."""
        self._messages = messages
        self._stale = tuple(stale)

    def connected(self) -> None:
        """Take note of a new connection."""
        if not self._messages:
            return
        for topic in self._stale:
            self._own.retain(topic, b"")
        self._due = self._monotonic() + (_WITHDRAWN_S if self._stale else 0.0)
        self._stale = ()

    def born(self) -> None:
        """Take note that Home Assistant has started."""
        if self._messages and self._due is None:
            self._due = self._monotonic() + self._spread(*_SPREAD_S)

    def run_once(self) -> None:
        """Announce if it is time; the consumer's state is said again with it."""
        if self._due is None or self._monotonic() < self._due:
            return
        self._due = None
        for topic, payload in self._messages.items():
            self._own.retain(topic, payload)
        self._own.say_again("state", *self._messages)

    def waits_s(self) -> list[float]:
        """Return the seconds until something is due; empty: nothing is."""
        return [] if self._due is None else [self._due - self._monotonic()]
