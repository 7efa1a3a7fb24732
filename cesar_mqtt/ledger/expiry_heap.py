"""Times by sequence number that find the earliest ones without a search; the ledger serialises every call."""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

_STALE_ALLOWED = 16


class ExpiryHeap(dict[int, float]):
    """A dict of times with a heap beside it; set and delete single items only, since the other methods skip the heap.

    Deletion is lazy: the heap keeps the entry until it comes to the top, or until most entries are stale. Times may lie
    weeks ahead, so without that limit entries of jobs deleted long ago would pile up.
    """

    def __init__(self, times: Iterable[tuple[int, float]] = ()) -> None:
        super().__init__(times)
        self._rebuild()

    def __setitem__(self, seq: int, at: float) -> None:
        super().__setitem__(seq, at)
        heappush(self._heap, (at, seq))
        if len(self._heap) > 2 * len(self) + _STALE_ALLOWED:
            self._rebuild()

    def due(self, now: float, limit: int) -> list[int]:
        """Return at most `limit` numbers whose time is not after `now`, earliest first; they stay in the dict."""
        due: dict[int, float] = {}
        while self._heap and self._heap[0][0] <= now and len(due) < limit:
            at, seq = heappop(self._heap)
            if self.get(seq) == at:
                due[seq] = at
        for seq, at in due.items():
            heappush(self._heap, (at, seq))
        return list(due)

    def _rebuild(self) -> None:
        self._heap = [(at, seq) for seq, at in self.items()]
        heapify(self._heap)
