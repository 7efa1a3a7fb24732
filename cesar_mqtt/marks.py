"""Which jobs bear the same mark, such as a packet id; the ledger owns it and serialises every call."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Mark = TypeVar("Mark", bound=Hashable)


class Marks(Generic[Mark]):
    """For each mark the sequence numbers that bear it; the latest of them counts."""

    def __init__(self, borne: Iterable[tuple[Mark, int]] = ()) -> None:
        """Start with pairs of mark and sequence number, in ascending order of the numbers."""
        self._bearers: dict[Mark, list[int]] = {}
        for mark, seq in borne:
            self.add(mark, seq)

    def add(self, mark: Mark, seq: int) -> None:
        """Note a bearer that is newer than all others."""
        self._bearers.setdefault(mark, []).append(seq)

    def remove(self, mark: Mark, seq: int) -> None:
        """Forget a bearer; the one before it counts again."""
        bearers = self._bearers[mark]
        bearers.remove(seq)
        if not bearers:
            del self._bearers[mark]

    def latest(self, mark: Mark) -> int | None:
        """Return the newest bearer; None: nobody bears the mark."""
        bearers = self._bearers.get(mark)
        return bearers[-1] if bearers else None
