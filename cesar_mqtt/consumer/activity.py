"""What the consumer is doing: one word, of all that goes on at once."""

from cesar_mqtt.jobs import Totals
from cesar_mqtt.protocol.consumer_payloads import Activity


class ActivityTracker:
    """What the worker does, unless something weighs more: a stop, a disk that refuses, a pause.

    Attributes:
        worker: what the worker does.
        draining: whether no further job is started.
    """

    def __init__(self) -> None:
        """Begin with the start."""
        self.worker: Activity = "starting"
        self.draining = False
        self._refused: set[str] = set()

    def refuse(self, who: str, *, on: bool) -> bool:
        """Take note of whether the disk refuses `who`, and return whether that is news. One thread for each `who`."""
        if on == (who in self._refused):
            return False
        (self._refused.add if on else self._refused.discard)(who)
        return True

    def among(self, totals: Totals) -> Activity:
        """Return the word for it."""
        if self.draining:
            return "draining"
        if self._refused:
            return "degraded"
        if self.worker not in ("idle", "processing"):
            return self.worker
        # The ledger knows of a job before the worker says so, and between two jobs there is no rest.
        if totals.processing or (self.worker == "processing" and totals.queued and not totals.paused):
            return "processing"
        return "paused" if totals.paused else "idle"
