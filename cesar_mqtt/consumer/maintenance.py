"""The upkeep of the ledger and the spool while the consumer runs: checkpoints, expired jobs, retention.

For the main thread, between its looks at everything else.
"""

import threading
import time
from collections.abc import Callable

from cesar_mqtt.config import RetentionSettings
from cesar_mqtt.errors import LedgerError
from cesar_mqtt.jobs import Job
from cesar_mqtt.ledger.ledger import Ledger
from cesar_mqtt.ledger.spool import Spool
from cesar_mqtt.logs import get_logger

log = get_logger(__name__)

_DAY_S = 86_400.0
_BATCH = 200
_GAP_S = 0.01
_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 300.0


class Maintenance:
    """Does what is due; after the disk refused, it waits longer before each further try."""

    def __init__(
        self,
        retention: RetentionSettings,
        ledger: Ledger,
        spool: Spool,
        *,
        on_ended: Callable[[Job], None] = lambda _job: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wire it; nothing happens here. `on_ended` is told of each job that expired."""
        self._retention = retention
        self._ledger = ledger
        self._spool = spool
        self._on_ended = on_ended
        self._clock = clock
        self._monotonic = monotonic
        self._began = clock() - monotonic()
        self._delay_s = 0.0
        self._not_before = 0.0

    def run_once(self, stop: threading.Event) -> None:
        """Do what is due now; returns early when `stop` is set."""
        if self._monotonic() < self._not_before:
            return
        try:
            self._ledger.checkpoint_if_due()
            for job in self._ledger.expire():
                self._on_ended(job)
            self._retire(stop)
        except LedgerError as exc:
            self._delay_s = min(_RETRY_MOST_S, max(_RETRY_FIRST_S, self._delay_s * 2))
            self._not_before = self._monotonic() + self._delay_s
            log.warning("%s Next try in %.0f s.", exc, self._delay_s, action="upkeep")
        else:
            self._delay_s = 0.0

    def _retire(self, stop: threading.Event) -> None:
        """Delete what retention no longer keeps, a few at a time, so that nobody waits for it."""
        # A clock that is set right long after the start, as on a machine without a battery, makes nothing old.
        now = min(self._clock(), self._began + self._monotonic())
        before = now - self._retention.days * _DAY_S
        deleted = _BATCH
        while deleted == _BATCH and not stop.wait(_GAP_S):
            deleted, spooled = self._ledger.delete_finished(
                before=before, keep=self._retention.max_finished, limit=_BATCH
            )
            self._spool.remove(spooled)
            if deleted:
                log.debug("Deleted %d finished jobs", deleted, action="retired")
