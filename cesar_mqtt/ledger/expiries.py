"""Numbers by a time that each of them has, such as jobs by the time of their end; the ledger serialises every call."""

from collections.abc import Iterable, Iterator, MutableMapping
from heapq import heapify, heappop, heappush

_SPARE = 16


class Times(MutableMapping[int, float]):
    """A mapping that keeps the order in which numbers were added, and knows the earliest without a search.

    A heap, from which nothing is taken in the middle: an entry of a number that is gone stays until it comes first, or
    until more of them are gone than not. A change costs the logarithm of how many there are, on average; changes are
    put into the heap some at a time, for most calls are changes.
    """

    def __init__(self, times: Iterable[tuple[int, float]] = ()) -> None:
        """Start with these; the unit of a time is the caller's."""
        self._at = dict(times)
        self._heap: list[tuple[float, int]] = []
        self._late: list[tuple[float, int]] = []
        """What is to go into the heap."""
        self._rebuild()

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[int]:
        return iter(self._at)

    def __reversed__(self) -> Iterator[int]:
        return reversed(self._at)

    def __contains__(self, number: object) -> bool:
        return number in self._at

    def __getitem__(self, number: int) -> float:
        return self._at[number]

    def __setitem__(self, number: int, at: float) -> None:
        self._at[number] = at
        self._late.append((at, number))
        if len(self._late) > _SPARE:
            self._tidy()

    def __delitem__(self, number: int) -> None:
        del self._at[number]

    def until(self, time: float, limit: int) -> list[int]:
        """Return those whose time is not after `time`, earliest first, at most so many; they stay."""
        self._tidy()
        found: list[tuple[float, int]] = []
        while self._heap and self._heap[0][0] <= time and len(found) < limit:
            entry = heappop(self._heap)
            if self._counts(entry) and entry not in found[-1:]:  # equal ones come one after the other
                found.append(entry)
        for entry in found:
            heappush(self._heap, entry)
        return [number for _, number in found]

    def _counts(self, entry: tuple[float, int]) -> bool:
        at, number = entry
        return self._at.get(number) == at

    def _tidy(self) -> None:
        """Take in what is late, and forget what is gone as far as that is worth it."""
        for entry in self._late:
            if self._counts(entry):
                heappush(self._heap, entry)
        self._late.clear()
        while self._heap and not self._counts(self._heap[0]):
            heappop(self._heap)
        if len(self._heap) > 2 * len(self._at) + _SPARE:
            self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(at, number) for number, at in self._at.items()]
        heapify(self._heap)
