"""The newest rejections, for the command `rejected`. Any thread may call it."""

from collections import deque
from itertools import islice

from cesar_mqtt.protocol.commands import MAX_REJECTIONS
from cesar_mqtt.protocol.payloads import Rejection


class RecentRejections:
    """Keeps the newest `MAX_REJECTIONS` in memory: a restart forgets them, and a burst of them costs no disk."""

    def __init__(self) -> None:
        self._newest: deque[Rejection] = deque(maxlen=MAX_REJECTIONS)

    def add(self, rejection: Rejection) -> None:
        self._newest.appendleft(rejection)

    def newest(self, limit: int) -> list[Rejection]:
        """Return at most `limit`, the newest first."""
        return list(islice(self._newest.copy(), limit))
