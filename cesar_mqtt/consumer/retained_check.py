"""The witness: what the broker shows of the consumer's own queue tells whether it has lost what it retained.

For the publisher's thread.
"""

from enum import Enum

from cesar_mqtt.protocol.consumer_payloads import standing_in


class Loss(Enum):
    """What the broker has lost."""

    ALL = "all"
    """It retained nothing."""
    NEWEST = "newest"
    """It went back to what it retained earlier: it was killed, and came back with its last save."""


class RetainedCheck:
    """The queue message that the broker retains, read back at each connection.

    A broker that has lost something looks as if it had not: it may still know the session. Or the process before this
    one may have died right after it had begun a new one, and nobody knows.
    """

    def __init__(self, standing: tuple[int, ...]) -> None:
        """Start with what the ledger counts: the process before this one ended by saying that."""
        self._standing = standing
        self._said: tuple[bytes, ...] = ()
        """What the broker might retain when the connection was made, of what this process has said."""
        self._looked = False
        """Whether it was ever compared, or need not be any more."""
        self._seen = False
        """Whether it was, by this connection."""
        self._shown = False
        """Whether the broker has ever shown a retained one."""

    def connected(self, said: tuple[bytes, ...], *, session_present: bool) -> bool:
        """Begin a connection; whether nobody can tell any more what the broker had before.

        That is so if something was said by a connection that was lost before the look. A broker may never show it, if
        it does not let us read it: then that counts only once.
        """
        before, self._said = self._said, said
        unknown = said != before and not self._seen and (self._shown or not self._looked)
        self._seen = not session_present
        self._looked |= unknown or not session_present
        return unknown

    def look(self, payload: bytes | None, said: tuple[bytes, ...]) -> Loss | None:
        """Compare what the broker shows with what it has acknowledged; None: it has lost nothing.

        Args:
            payload: what it retains; None: what came first was our own, newest message, so it retained nothing before.
                The latter is believed only at first, and of a broker that has shown something before.
            said: what it may retain by now, for it may have been told more before we got to look.
        """
        expected = not self._looked or (self._shown and not self._seen)
        self._looked = self._seen = True
        if payload is None:
            return Loss.ALL if expected else None
        self._shown = True
        is_right = payload in (*self._said, *said) if self._said else standing_in(payload) == self._standing
        return None if is_right else Loss.NEWEST
