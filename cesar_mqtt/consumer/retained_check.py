"""Finds out from the broker's retained queue message whether the broker has lost retained messages.

For the publisher's thread.
"""

from enum import Enum

from cesar_mqtt.protocol.consumer_payloads import totals_in


class Loss(Enum):
    """Which retained messages the broker has lost."""

    ALL = "all"
    """It retained no queue message."""
    NEWEST = "newest"
    """Those since its last save: it was killed, and restarted from that."""


class RetainedCheck:
    """Compares the queue message that the broker retains, received at each connection, with what was published.

    A session that the broker kept does not prove that it kept the retained messages. Nor does a session show whether an
    earlier process died right after the broker had begun it.
    """

    def __init__(self, totals: tuple[int, ...]) -> None:
        """`totals` are the ledger's totals: the last queue message of the process before has the same."""
        self._totals = totals
        self._published_before: tuple[bytes, ...] = ()
        """What the broker may have retained when the connection was made, of what this process has published."""
        self._compared = False
        """True once the message was compared, or once no comparison is needed."""
        self._compared_now = False
        """Whether it was compared on this connection."""
        self._was_readable = False
        """Whether the broker has ever sent a retained queue message."""

    def on_connected(self, published: tuple[bytes, ...], *, session_present: bool) -> bool:
        """Begin a connection; True: it is unknown what the broker retained before, so it may have lost something.

        That is so if a queue message was published on a connection that was lost before the comparison. If the broker
        never sends the message, because it does not let this client read it, this returns True only once.
        """
        before, self._published_before = self._published_before, published
        unknown = published != before and not self._compared_now and (self._was_readable or not self._compared)
        self._compared_now = not session_present
        self._compared |= unknown or not session_present
        return unknown

    def compare(self, payload: bytes | None, published: tuple[bytes, ...]) -> Loss | None:
        """Compare what the broker retains with what it has acknowledged; None: it has lost nothing.

        Args:
            payload: the retained message; None: the first message was our own, newest one, so there was none retained.
                None counts only in the first comparison, and if the broker has sent a retained message before.
            published: what the broker may retain by now: more may have been published before the comparison.
        """
        expected = not self._compared or (self._was_readable and not self._compared_now)
        self._compared = self._compared_now = True
        if payload is None:
            return Loss.ALL if expected else None
        self._was_readable = True
        if self._published_before:
            is_newest = payload in (*self._published_before, *published)
        else:
            is_newest = totals_in(payload) == self._totals
        return None if is_newest else Loss.NEWEST


class UnprovenJobs:
    """The jobs whose messages were acknowledged behind the newest queue message that the broker has.

    Queue messages are a second apart. A broker that is killed and restarted from what it saved in between retains the
    newest one and may have lost what was published behind it, so `RetainedCheck` finds no loss.
    """

    def __init__(self) -> None:
        self._queue_version = -1
        """The newest queue message that was published."""
        self._behind: dict[int, int] = {}
        """By job, the queue message behind which its messages were acknowledged, or an earlier one."""
        self._doubtful: tuple[int, ...] = ()

    def on_connected(self) -> None:
        """Begin a connection: what was acknowledged by earlier ones may be lost."""
        self._doubtful = tuple(self._behind)

    def take_doubtful(self) -> tuple[int, ...]:
        """Return, once for each connection, what to publish again although the broker has the newest queue message."""
        doubtful, self._doubtful = self._doubtful, ()
        return doubtful

    def add(self, seq: int) -> None:
        """Record that the broker has acknowledged the status, or the clearing, of a job."""
        self._behind[seq] = self._queue_version

    def on_queue_published(self, version: int) -> None:
        self._queue_version = version

    def on_queue_acknowledged(self, version: int) -> None:
        self._behind = {seq: behind for seq, behind in self._behind.items() if behind >= version}
